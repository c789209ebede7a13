#!/usr/bin/env bash
# From nothing to a trained model: installs the package, prepares text, trains a small MoEUT whose
# attention and FFN experts are sharded over 2 ranks, evaluates it, and prints a sample.
#
#     bash launcher/quickstart.sh                  train on the sources of this machine's Python
#     bash launcher/quickstart.sh --input FILES    train on any text files or folders
#
# Requires Python 3.11 and, once, network access. PYTHON=/path/to/python3 selects the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
source launcher/environment.sh
make_environment
export PATH="$PWD/.venv/bin:$PATH"

say() { printf '\n== %s\n' "$*"; }

name=quickstart
layout=2 # ranks that share the experts
if [ "${1:-}" = --input ] && [ $# -gt 1 ]; then
    shift
    inputs=("$@")
    name=quickstart-$(date +%Y%m%d-%H%M%S)
elif [ $# -gt 0 ]; then
    echo "usage: bash launcher/quickstart.sh [--input FILES]" >&2
    exit 2
else
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    inputs=()
    while IFS= read -r file; do inputs+=("$file"); done < <(find "$stdlib" -name '*.py' \
        -not -path '*/site-packages/*' -not -path '*/dist-packages/*' \
        -not -path '*/test/*' -not -path '*/tests/*' -not -path '*/encodings/*' | sort)
fi

say "1/4 Prepare text: ${#inputs[@]} inputs -> data/$name"
if [ -e "data/$name/train/manifest.json" ]; then
    echo "already prepared"
else
    moa-dist prepare --input "${inputs[@]}" --output "data/$name" --valid-share 0.05 \
        --vocab-size 4000 --sequence-length 256 --max-bytes 12000000
fi

gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
if [ "$gpus" -eq 1 ]; then
    layout=1
    say "2/4 Train on the only GPU; experts are not sharded, since that needs two"
elif [ "$gpus" -ge 2 ]; then
    say "2/4 Train on 2 of $gpus GPUs"
else
    export DS_ACCELERATOR=cpu
    say "2/4 Train on the CPU, because no GPU was found: 2 ranks that communicate through gloo"
fi
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
deepspeed --num_gpus "$layout" --master_port "$port" --log_level error \
    launcher/train.py --config configs/quickstart.yaml \
    "name=$name" "data.train=data/$name/train" "data.valid=data/$name/valid" \
    "parallel.expert_parallel=$layout"

say "3/4 Evaluate on the whole validation text, in one process"
moa-dist eval "runs/$name"

say "4/4 Generate a sample"
moa-dist generate "runs/$name" --prompt "def read(self, " --tokens 120

say "Done. Results and next steps:"
echo "curves       tensorboard --logdir runs/$name/tensorboard"
echo "metrics      runs/$name/metrics.jsonl"
echo "checkpoints  $(ls -d runs/$name/step-* | tail -n 1)"
echo "next         moa-dist plan configs/moeut/244m.yaml; README.md, from \"Train your own\""
