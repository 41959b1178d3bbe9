#!/usr/bin/env bash
# Everything that a GPU can prove, the most important first, in runs of under ten minutes, results in one folder:
#
#   benchmarks/gpu_session.sh [FOLDER [PART...]]        default: benchmarks/results/gpu-session, all parts
#
# A part that is done (FOLDER/parts/PART.json says "ok") is not run again: what did not fit into one run is done by the
# next one. Needs a machine with torch, triton, nvcc and cmake; no internet. TensorRT and its headers
# (MISF_TENSORRT_HEADERS, folders separated by colons) are used where they are. Parts fail apart: one line each in
# summary.md, their output in logs/PART.log. MISF_GPU_SECONDS: the time for all parts of a run, 560 by default.
# Exit code: 0 all passed, 1 some part failed or had no time, 4 no GPU (what needs none was tried).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu-session}
shift $(($# > 0))
wanted=" $* "
mkdir -p "$out/parts" "$out/logs"
out=$(cd "$out" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
fi
budget=${MISF_GPU_SECONDS:-560}
started=$SECONDS
failed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export PYTHONUNBUFFERED=1 POLYGRAPHY_AUTOINSTALL_DEPS=0
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PATH=$PATH:$CUDA_HOME/bin
export MISF_HOME=$work/home # plugin and timing cache of this session only

# misf of this folder without an installation: the folders under one namespace, and a version for importlib.metadata.
if ! "$PYTHON" -c '
import importlib.metadata, importlib.util, pathlib
importlib.metadata.version("misf")
origin = pathlib.Path(importlib.util.find_spec("misf.plugins.dynamic_filter").origin).resolve()
raise SystemExit(not origin.is_relative_to(pathlib.Path.cwd()))' 2>/dev/null; then
    site=$work/site
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    mkdir -p "$site/misf" "$site/misf-$version.dist-info"
    for folder in training export plugins runtime; do ln -s "$PWD/$folder" "$site/misf/$folder"; done
    printf 'Metadata-Version: 2.1\nName: misf\nVersion: %s\n' "$version" >"$site/misf-$version.dist-info/METADATA"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

machine() {
    date -u
    uname -a
    nvidia-smi || true
    nvcc --version | tail -n 2 || true
    cmake --version | head -n 1 || true
    command -v nvpmodel >/dev/null && nvpmodel -q
    git log -1 --format='misf %h %s' 2>/dev/null || true
    "$PYTHON" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
    "$PYTHON" -c 'import triton; print("triton", triton.__version__)'
}
machine >"$out/machine.txt" 2>&1
device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null)

row() { # part result seconds line
    "$PYTHON" - "$out/parts/$1.json" "$device" "$@" <<'PY'
import json, pathlib, sys
path, device, part, result, seconds, line = sys.argv[1:]
fields = {"part": part, "result": result, "seconds": int(seconds), "device": device or "no GPU", "line": line}
pathlib.Path(path).write_text(json.dumps(fields) + "\n")
PY
    printf '%-20s %-10s %4s s  %s\n' "$1" "$2" "$3" "$4"
}

skip() { row "$1" "NOT RUN" 0 "$2"; }

asked() { [ "$wanted" = "  " ] || [[ "$wanted" == *" $1 "* ]]; }

pending() { asked "$1" && ! grep -q '"result": "ok"' "$out/parts/$1.json" 2>/dev/null; }

# part NAME SECONDS COMMAND...: runs it within its own time and what is left of the run's.
part() {
    local name=$1 limit=$2 left begin code line result
    shift 2
    pending "$name" || return
    left=$((budget - (SECONDS - started)))
    if [ "$left" -lt 15 ]; then
        skip "$name" "the run's $budget seconds were spent"
        failed=1
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    begin=$SECONDS
    timeout --kill-after=5 "$limit" "$@" >"$out/logs/$name.log" 2>&1
    code=$?
    line=$(grep -v '^ *$' "$out/logs/$name.log" | tail -n 1 | cut -c1-160)
    case $code in
        0) result=ok ;;
        124 | 137) result="TIMED OUT" line="after $limit seconds; $line" failed=1 ;;
        *) result="FAILED $code" failed=1 ;;
    esac
    if [ "$code" = 0 ] && grep -q 'NOT PROVED\|no NVIDIA GPU' "$out/logs/$name.log"; then # skipped tests pass
        result="NOT PROVED" line=$(grep -o 'NOT PROVED.*\|no NVIDIA GPU.*' "$out/logs/$name.log" | head -n 1 | cut -c1-160)
    fi
    row "$name" "$result" $((SECONDS - begin)) "$line"
}

module() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

finish() { # exit code
    {
        printf '# GPU session\n\n%s\n\n| part | result | seconds | last line |\n| --- | --- | ---: | --- |\n' "${device:-No GPU: nothing here proves anything of one.}"
        for name in ceilings op plugin bandwidth network-1 network-16 plugin-memcheck op-memcheck op-initcheck gradients \
            profile doctor engines compile tests-found scripts doctor-cpu rtx-builds; do
            [ -f "$out/parts/$name.json" ] && "$PYTHON" -c 'import json, sys; p = json.load(open(sys.argv[1])); print("|", " | ".join([p["part"], p["result"], str(p["seconds"]), p["line"].replace("|", "")]), "|")' "$out/parts/$name.json"
        done
    } >"$out/summary.md"
    "$PYTHON" benchmarks/gpu_report.py "$out"
    echo "results: $out"
    exit "$1"
}

if [ -z "${MISF_TENSORRT_HEADERS:-}" ]; then
    for folder in /usr/include/x86_64-linux-gnu /usr/include/aarch64-linux-gnu; do
        [ -f "$folder/NvInferRuntime.h" ] && MISF_TENSORRT_HEADERS=${MISF_TENSORRT_HEADERS:+$MISF_TENSORRT_HEADERS:}$folder
    done
    export MISF_TENSORRT_HEADERS=${MISF_TENSORRT_HEADERS:-}
fi
pytest=("$PYTHON" -m pytest -o filterwarnings=default -o addopts= -q -rs -p no:cacheprovider --tb=short)

if [ -z "$device" ]; then
    echo "NO GPU: nothing below proves anything of a GPU; parts that need none are tried, so that the script is known to run."
    part tests-found 60 "${pytest[@]}" -m gpu --collect-only tests/plugins/test_cuda.py tests/plugins/test_plugin.py
    part scripts 60 bash -ec "for name in kernel latency; do '$PYTHON' benchmarks/\$name.py --help; done
        '$PYTHON' -m py_compile benchmarks/*.py
        nvcc -std=c++17 -arch=sm_90 -I plugins/dynamic_filter/kernels benchmarks/plugin_kernel.cu plugins/dynamic_filter/kernels/launch.cu -o '$work/plugin_kernel'"
    part doctor-cpu 60 "$PYTHON" -c 'from misf.runtime.checks.doctor import main; main()'
    if module tensorrt_rtx; then
        part rtx-builds 120 "${pytest[@]}" tests/export/test_engine.py -k "fp16_engine or wrong_graph"
    fi
    for name in ceilings op plugin bandwidth network-1 network-16 plugin-memcheck op-memcheck op-initcheck gradients \
        profile engines compile; do
        [ -f "$out/parts/$name.json" ] || skip "$name" "no GPU"
    done
    finish 4
fi

latency=("$PYTHON" benchmarks/latency.py --device cuda)
part ceilings 90 "$PYTHON" benchmarks/ceilings.py "$out"
part op 150 "${pytest[@]}" -m gpu tests/plugins/test_cuda.py
if [ -n "$MISF_TENSORRT_HEADERS" ]; then
    part plugin 120 "${pytest[@]}" -m gpu tests/plugins/test_plugin.py
elif pending plugin; then
    skip plugin "NOT PROVED: no TensorRT headers: set MISF_TENSORRT_HEADERS"
fi
part bandwidth 150 "$PYTHON" benchmarks/kernel.py --device cuda --repeats 20 --output "$out/forward" --gradients without
part network-1 100 "${latency[@]}" --size 256x256 512x512 --rounds 20 --warm-up 3 --output "$out/network-1"
part profile 60 "${latency[@]}" --profile --size 256x256 --output "$out"
part network-16 120 "${latency[@]}" --size 256x256 512x512 --batch 16 --rounds 8 --warm-up 2 --output "$out/network-16"

# On some virtual machines compute-sanitizer refuses the device; a program that uses CUDA tells. Only our kernels are
# watched: torch's own are not the subject, and take minutes. The filter's spelling changed between versions.
probe() { timeout 60 compute-sanitizer "$@" --error-exitcode 9 "$work/plugin_kernel" linear_half 1 4 8 8 4 3; }
refused="" only=()
if ! pending plugin-memcheck && ! pending op-memcheck && ! pending op-initcheck; then
    :
elif ! command -v compute-sanitizer >/dev/null; then
    refused="compute-sanitizer is not installed"
elif ! nvcc -std=c++17 -arch=native -I plugins/dynamic_filter/kernels benchmarks/plugin_kernel.cu \
    plugins/dynamic_filter/kernels/launch.cu -o "$work/plugin_kernel" >"$out/logs/sanitizer-probe.log" 2>&1; then
    refused="its probe was not built, see logs/sanitizer-probe.log"
elif ! probe >"$out/logs/sanitizer-probe.log" 2>&1; then
    refused="compute-sanitizer refuses this device: $(grep -i 'error\|not supported' "$out/logs/sanitizer-probe.log" | head -n 1 | cut -c1-100)"
elif probe --kernel-name kernel_substring=misf >/dev/null 2>&1; then
    only=(--kernel-name kernel_substring=misf)
elif probe --kernel-regex kns=misf >/dev/null 2>&1; then
    only=(--kernel-regex kns=misf)
fi
if [ -z "$refused" ]; then
    [ -n "$MISF_TENSORRT_HEADERS" ] && part plugin-memcheck 120 env MISF_SANITIZER=1 \
        MISF_TENSORRT_HEADERS="${MISF_TENSORRT_HEADERS%%:*}" "${pytest[@]}" -m gpu tests/plugins/test_plugin.py
    # Without torch's cache each tensor is an allocation of its own: else nothing is ever out of bounds. No racecheck: no
    # kernel of ours uses shared memory.
    for tool in memcheck initcheck; do
        part "op-$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --target-processes application-only ${only[@]+"${only[@]}"} --error-exitcode 9 "$PYTHON" benchmarks/sanitize.py
    done
else
    for name in plugin-memcheck op-memcheck op-initcheck; do
        asked "$name" && row "$name" "NOT PROVED" 0 "$refused"
    done
fi

part gradients 90 "$PYTHON" benchmarks/kernel.py --device cuda --repeats 20 --gradients only --output "$out/gradients"
if module tensorrt || module tensorrt_rtx; then
    part doctor 60 "$PYTHON" -c 'from misf.runtime.checks.doctor import main; main()'
    part engines 150 "$PYTHON" benchmarks/engine_session.py
fi
# Last: compiling the whole network may take all the time that is left.
part compile 200 "${latency[@]}" --compile --size 256x256 --rounds 20 --warm-up 3 --output "$out/compiled"
finish "$failed"
