#!/usr/bin/env bash
# Everything that a GPU can prove, in one command of under 8 minutes, results in one folder:
#
#   benchmarks/gpu_session.sh [FOLDER]        default: benchmarks/results/gpu-session
#
# Needs a machine with torch, nvcc and cmake; no internet. TensorRT and its headers (MISF_TENSORRT_HEADERS, folders
# separated by colons) are used where they are. Parts fail apart: one line each in summary.md, their output in session.log.
# Exit code: 0 all passed, 1 some part failed, 4 no GPU (what needs none was tried).
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-benchmarks/results/gpu-session}" && cd "${1:-benchmarks/results/gpu-session}" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
fi
budget=${MISF_GPU_SECONDS:-450}
started=$SECONDS
failed=0
log=$out/session.log
summary=$out/summary.md
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$log"
printf '# GPU session\n\n| part | result | seconds | last line |\n| --- | --- | ---: | --- |\n' >"$summary"

export PYTHONUNBUFFERED=1 POLYGRAPHY_AUTOINSTALL_DEPS=0
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PATH=$PATH:$CUDA_HOME/bin
export MISF_HOME=$work/home # plugin and timing cache of this session only

row() { # part result seconds line
    printf '| %s | %s | %s | %s |\n' "$1" "$2" "$3" "${4//|//}" >>"$summary"
    printf '%-28s %-10s %4s s  %s\n' "$1" "$2" "$3" "$4"
}

# part NAME SECONDS COMMAND...: runs it within its own time and what is left of the session's.
part() {
    local name=$1 limit=$2 left begin code line
    shift 2
    left=$((budget - (SECONDS - started)))
    if [ "$left" -lt 10 ]; then
        row "$name" "NOT RUN" 0 "the session's $budget seconds were spent"
        failed=1
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
    begin=$SECONDS
    timeout --kill-after=5 "$limit" "$@" >"$work/part.log" 2>&1
    code=$?
    cat "$work/part.log" >>"$log"
    line=$(grep -v '^ *$' "$work/part.log" | tail -n 1 | cut -c1-160)
    case $code in
        0) row "$name" ok $((SECONDS - begin)) "$line" ;;
        124 | 137) row "$name" "TIMED OUT" $((SECONDS - begin)) "after $limit seconds; $line" && failed=1 ;;
        *) row "$name" "FAILED $code" $((SECONDS - begin)) "$line" && failed=1 ;;
    esac
}

skip() { row "$1" "NOT RUN" 0 "$2"; }

have() { command -v "$1" >/dev/null 2>&1; }

module() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

machine() {
    date -u
    uname -a
    nvidia-smi || true
    nvcc --version | tail -n 2 || true
    cmake --version | head -n 1 || true
    have nvpmodel && nvpmodel -q
    git log -1 --format='misf %h %s' 2>/dev/null || true
    "$PYTHON" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
}
machine >"$out/machine.txt" 2>&1

# misf without an installation: the four folders under one namespace, and a version for importlib.metadata.
if ! "$PYTHON" -c 'from importlib.metadata import version; import misf.plugins.dynamic_filter; version("misf")' 2>/dev/null; then
    site=$work/site
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    mkdir -p "$site/misf" "$site/misf-$version.dist-info"
    for folder in training export plugins runtime; do ln -s "$PWD/$folder" "$site/misf/$folder"; done
    printf 'Metadata-Version: 2.1\nName: misf\nVersion: %s\n' "$version" >"$site/misf-$version.dist-info/METADATA"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

pytest=("$PYTHON" -m pytest -o filterwarnings=default -o addopts= -q -p no:cacheprovider --tb=short)
gpu=0
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && gpu=1

if [ "$gpu" = 0 ]; then
    echo "NO GPU: nothing below proves anything of a GPU; parts that need none are tried, so that the script is known to run."
    part "GPU tests are found" 60 "${pytest[@]}" -m gpu --collect-only tests/plugins/test_cuda.py tests/plugins/test_plugin.py
    part "scripts start" 60 bash -c "'$PYTHON' benchmarks/kernel.py --help && '$PYTHON' benchmarks/latency.py --help"
    part "op and doctor" 60 "$PYTHON" -c 'from misf.runtime.checks.doctor import main; main()'
    if module tensorrt_rtx; then
        part "RTX builds" 120 "${pytest[@]}" tests/export/test_engine.py -k "fp16_engine or wrong_graph"
    else
        skip "RTX builds" "tensorrt_rtx is not installed"
    fi
    for name in "kernels" "kernel bandwidth" "whole network" "sanitizer" "plugin" "engines"; do skip "$name" "no GPU"; done
    printf '\nNo GPU: nothing here proves anything of one.\n' >>"$summary"
    echo "results: $out (exit code 4: no GPU)"
    exit 4
fi

part "kernels" 110 "${pytest[@]}" -m gpu tests/plugins/test_cuda.py
part "kernel bandwidth" 120 "$PYTHON" benchmarks/kernel.py --device cuda --output "$out"
part "whole network" 150 "$PYTHON" benchmarks/latency.py --no-compile --device cuda --size 256x256 512x512 --batch 1 16 \
    --rounds 20 --warm-up 3 --output "$out"

if have compute-sanitizer; then
    # Only our kernels: torch's own are not the subject, and watching them takes minutes.
    only=(--kernel-name kernel_substring=misf)
    # `true` never starts CUDA: without --require-cuda-init no it would fail whatever the filter.
    probe=(compute-sanitizer --require-cuda-init no)
    "${probe[@]}" "${only[@]}" true >/dev/null 2>&1 || only=(--kernel-regex kns=misf)
    "${probe[@]}" "${only[@]}" true >/dev/null 2>&1 || only=()
    # Without torch's cache each tensor is an allocation of its own: else nothing is ever out of bounds. No racecheck: no
    # kernel of ours uses shared memory.
    for tool in memcheck initcheck; do
        part "sanitizer $tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" ${only[@]+"${only[@]}"} \
            --error-exitcode 9 "$PYTHON" benchmarks/sanitize.py
    done
else
    skip "sanitizer" "compute-sanitizer is not installed"
fi

if [ -z "${MISF_TENSORRT_HEADERS:-}" ]; then
    for folder in /usr/include/x86_64-linux-gnu /usr/include/aarch64-linux-gnu shared/tensorrt-headers/*; do
        [ -f "$folder/NvInferRuntime.h" ] || folder=$folder/include
        [ -f "$folder/NvInferRuntime.h" ] && MISF_TENSORRT_HEADERS=${MISF_TENSORRT_HEADERS:+$MISF_TENSORRT_HEADERS:}$folder
    done
    export MISF_TENSORRT_HEADERS=${MISF_TENSORRT_HEADERS:-}
fi
if [ -n "$MISF_TENSORRT_HEADERS" ]; then
    part "plugin enqueue" 180 "${pytest[@]}" -m gpu tests/plugins/test_plugin.py
else
    skip "plugin enqueue" "no TensorRT headers: set MISF_TENSORRT_HEADERS"
fi

if module tensorrt || module tensorrt_rtx; then
    part "doctor with engines" 60 "$PYTHON" -c 'from misf.runtime.checks.doctor import main; main()'
    part "engines" 150 "$PYTHON" benchmarks/engine_session.py
else
    skip "engines" "neither TensorRT nor TensorRT for RTX is installed"
fi

# Last, in a folder of its own: compiling the whole network may take all the time that is left.
part "torch.compile" 150 "$PYTHON" benchmarks/latency.py --device cuda --size 256x256 --batch 1 \
    --rounds 20 --warm-up 3 --output "$out/compiled"

echo "results: $out"
exit "$failed"
