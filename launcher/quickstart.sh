#!/usr/bin/env bash
# From nothing to a trained model: installs the package, prepares text, trains a small MoEUT whose
# attention and FFN experts are sharded over 2 ranks, evaluates it, and prints a sample.
#
#     bash launcher/quickstart.sh                  train on the sources of this machine's Python
#     bash launcher/quickstart.sh --input FILES    train on any text: files, folders, JSON Lines, ...
#     bash launcher/quickstart.sh --input FILES --documents line --json-field body ...
#                                                  any option of `moa-dist prepare` may follow
#
# Requires Python 3.11 or newer and, once, network access. PYTHON=/path/to/python3 selects the interpreter.
set -euo pipefail
started_in=$PWD
cd "$(dirname "$0")/.."
source launcher/environment.sh
make_environment
export PATH="$PWD/.venv/bin:$PATH"

say() { printf '\n== %s\n' "$*"; }

name=quickstart
layout=2 # ranks that share the experts
inputs=()
options=()
prompt="" # the beginning of a document
if [ "${1:-}" = --input ]; then
    shift
    while [ $# -gt 0 ] && [[ $1 == - || $1 != -* ]]; do
        # Paths are relative to where the command was started.
        case $1 in -|/*) inputs+=("$1") ;; *) inputs+=("$started_in/$1") ;; esac
        shift
    done
    options=("$@")
    name=quickstart-$(date +%Y%m%d-%H%M%S)
fi
if [ ${#inputs[@]} -eq 0 ] && [ $((${#options[@]} + $#)) -gt 0 ]; then
    echo "usage: bash launcher/quickstart.sh [--input FILES [options of moa-dist prepare]]" >&2
    exit 2
elif [ ${#inputs[@]} -eq 0 ]; then
    prompt="def read(self, "
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    while IFS= read -r file; do inputs+=("$file"); done < <(find "$stdlib" -name '*.py' \
        -not -path '*/site-packages/*' -not -path '*/dist-packages/*' \
        -not -path '*/test/*' -not -path '*/tests/*' -not -path '*/encodings/*' | sort)
fi

gpus=$(python -m moa_dist.distributed.gpus) # fails if there are GPUs that torch cannot use

say "1/4 Prepare text: ${#inputs[@]} inputs -> data/$name"
if [ -e "data/$name/train/manifest.json" ]; then
    echo "already prepared"
else
    # Options given by the user come last, and so take precedence.
    moa-dist prepare --input "${inputs[@]}" --output "data/$name" --valid-share 0.05 \
        --vocab-size 4000 --sequence-length 256 --max-bytes 12000000 ${options[@]+"${options[@]}"}
fi

# What the user's options made the data, the model follows.
read -r vocabulary length < <(python -c 'import json, sys
manifest = json.load(open(sys.argv[1]))
print(max(manifest["vocab_size"], 4000), manifest["block_length"])' "data/$name/train/manifest.json")

if [ "$gpus" -eq 1 ]; then
    layout=1
    say "2/4 Train on the only GPU; experts are not sharded, since that needs two"
elif [ "$gpus" -ge 2 ]; then
    say "2/4 Train on 2 of $gpus GPUs"
else
    export DS_ACCELERATOR=cpu
    say "2/4 Train on the CPU, because no GPU is visible: 2 ranks that communicate through gloo"
fi
python launcher/launch.py --ranks "$layout" --config configs/quickstart.yaml \
    "name=$name" "data.train=data/$name/train" "data.valid=data/$name/valid" \
    "parallel.expert_parallel=$layout" \
    "model.vocab_size=$vocabulary" "data.sequence_length=$length"

say "3/4 Evaluate on the whole validation text, in one process"
moa-dist eval "runs/$name"

say "4/4 Generate a sample"
moa-dist generate "runs/$name" --prompt "$prompt" --tokens 120

say "Done. Results and next steps:"
echo "curves       tensorboard --logdir runs"
echo "metrics      runs/$name/metrics.jsonl"
echo "checkpoints  $(ls -d runs/$name/step-* | tail -n 1)"
echo "next         moa-dist plan configs/moeut/244m.yaml; README.md, from \"Train your own\""
