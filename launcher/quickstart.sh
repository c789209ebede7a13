#!/usr/bin/env bash
# From nothing to a trained model: installs the package, prepares text, trains a small MoEUT whose
# attention and FFN experts are sharded over 2 ranks, evaluates it, and prints a sample.
#
#     bash launcher/quickstart.sh                  train on the sources of this machine's Python
#     bash launcher/quickstart.sh --input FILES    train on any text: files, folders, JSON Lines, ...
#     bash launcher/quickstart.sh --input FILES --documents line --json-field body ...
#                                                  any option of `moa-dist prepare` may follow
#     bash launcher/quickstart.sh ... train.steps=50
#                                                  and so may settings of the run
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
settings=()
prompt="" # the beginning of a document

# Settings of the run, key.path=value, are taken out first; a file of that name is an input.
words=()
for word in "$@"; do
    if [[ $word =~ ^[a-z_]+(\.[a-z_0-9]+)+= ]] && [ ! -e "$started_in/$word" ]; then
        settings+=("$word")
    else
        words+=("$word")
    fi
done
set -- ${words[@]+"${words[@]}"}
num_words=$#
if [ "${1:-}" = --input ]; then
    shift
    while [ $# -gt 0 ] && [[ $1 == - || $1 != -* ]]; do
        # Paths are relative to where the command was started.
        case $1 in -|/*) inputs+=("$1") ;; *) inputs+=("$started_in/$1") ;; esac
        shift
    done
    options=("$@")
    name=quickstart-$(date +%Y%m%d-%H%M%S)-$$ # two that start in one second differ
fi
if [ ${#inputs[@]} -eq 0 ] && [ "$num_words" -gt 0 ]; then
    echo "usage: bash launcher/quickstart.sh [--input FILES [options of moa-dist prepare]]" \
        "[key.path=value ...]" >&2
    exit 2
elif [ ${#inputs[@]} -eq 0 ]; then
    prompt="def read(self, "
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    while IFS= read -r file; do inputs+=("$file"); done < <(find "$stdlib" -name '*.py' \
        -not -path '*/site-packages/*' -not -path '*/dist-packages/*' \
        -not -path '*/test/*' -not -path '*/tests/*' -not -path '*/encodings/*' | sort)
fi

if [ ${#settings[@]} -gt 0 ]; then # before the work; training checks them again, with the data
    moa-dist config check configs/quickstart.yaml "${settings[@]}" >/dev/null
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
    "model.vocab_size=$vocabulary" "data.sequence_length=$length" ${settings[@]+"${settings[@]}"}

say "3/4 Evaluate on the whole validation text, in one process"
moa-dist eval "runs/$name"

say "4/4 Generate a sample"
moa-dist generate "runs/$name" --prompt "$prompt" --tokens 120

say "Done. To go on, in any shell:"
if [ -e .venv/bin/activate ]; then
    printf 'cd %q && source .venv/bin/activate\n' "$PWD"
else
    printf 'cd %q\n' "$PWD" # in a container image, where commands are on the path
fi
cat <<EOF
moa-dist report runs/$name                # metrics, routing and checkpoints as one page
moa-dist checkpoint show runs/$name       # its checkpoints
tensorboard --logdir runs                 # the training curves, until Ctrl-C
moa-dist plan configs/moeut/244m.yaml     # the next size; more in README.md, "Train your own"
EOF
