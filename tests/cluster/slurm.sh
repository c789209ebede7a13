#!/usr/bin/env bash
# One job from Slurm, proven in a real one: two nodes on this machine, a rank on each that holds
# half of the experts; it is preempted, requeued, a launcher is killed, and it ends bit for bit
# like a job that was left alone.
#
#     bash tests/cluster/slurm.sh
#
# Needs root on Debian or Ubuntu: it installs slurmctld, slurmd, munge and iproute2 if they are
# missing. Everything runs in namespaces of its own and ends with them. About eight minutes.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
repository=$(dirname "$(dirname "$here")")
source "$here/slurm_cluster.sh"

if [[ ${1:-} != --inside ]]; then
    cd "$repository"
    if ! python -c 'import deepspeed, moa_dist' 2>/dev/null; then
        source launcher/environment.sh
        make_environment
        export PATH="$PWD/.venv/bin:$PATH"
    fi
    install_slurm
    work=$(mktemp -d)
    # Both nodes are this machine, so a rank gets one thread.
    export PYTHONPATH="$repository" OMP_NUM_THREADS=1 work
    unshare --mount --net --pid --fork --mount-proc --kill-child bash "$0" --inside &
    inside=$!
    trap 'kill -KILL "$inside" 2>/dev/null || true; rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    wait "$inside"
    exit
fi

proven() { printf 'PROVEN  %4d s  %s\n' "$SECONDS" "$*"; }

# field JOB NAME: what Slurm says of it.
field() { scontrol --oneliner show job "$1" | sed -E "s/.* $2=([^ ]*).*/\1/"; }
is() { [[ $(field "$1" "$2") == "$3" ]]; }
steps() { cat "runs/$1/metrics.jsonl" 2>/dev/null | grep -c '"kind": "step"' || true; }
reached() { (($(steps "$1") >= $2)); }
last_step() { tail -n 1 "runs/$1/metrics.jsonl" | grep -oP '"step": \K\d+'; }

# submit NAME [ARGUMENT...]: sets `job`.
submit() {
    local command
    command=$(python "$repository/launcher/job.py" slurm --config tiny.yaml --nodes 2 \
        --ranks-per-node 1 --grace 60 "name=$1" "${@:2}")
    job=$(eval "$command" | grep -o '[0-9]*$')
}

# Slurm lets two minutes pass before it starts a requeued job; that is not what is proven here.
start_again() {
    await 60 is "$job" Restarts "$1"
    await 60 nodes_idle
    is "$job" JobState RUNNING || scontrol update "JobId=$job" StartTime=now
    await 120 is "$job" JobState RUNNING
}

fail() {
    echo "FAILED: line $1" >&2
    tail -n 40 runs/*/logs/slurm-*.log >&2 || true
    exit 1
}
trap 'fail $LINENO' ERR

mkdir "$work/my jobs" # with a blank in its name
cd "$work/my jobs"
cp "$here/tiny.yaml" .
moa-dist prepare --input "$repository/moa_dist" --output data --valid-share 0.1 \
    --vocab-size 300 --sequence-length 32 --max-bytes 100000 &>prepare.log
start_slurm "$work/slurm"
echo "$(slurmctld -V): $(sinfo --noheader --Node --format '%N %T' | paste -sd ' ')"

submit calm
await 240 is "$job" JobState COMPLETED
proven "job $job ran $(steps calm) steps on $(field "$job" NodeList)"

submit disturbed
await 240 reached disturbed 5
scancel --signal=USR1 --batch "$job" # what --signal=B: sends
start_again 1
saved=$(last_step disturbed)
[[ -e runs/disturbed/$(printf 'step-%08d' "$saved") ]]
proven "preempted: saved at step $saved and requeued by its script"

await 240 reached disturbed $((saved + 5))
kill -KILL "$(pgrep -f 'launch.py .*--node-rank 1$')"
await 240 is "$job" JobState COMPLETED
is "$job" Restarts 1
grep -q 'the launchers ended with status 137 (start 1 of 3)' "runs/disturbed/logs/slurm-$job.log"
proven "continued; the launcher of node2 was killed, and the step started again: completed"
proven "$(python "$here/same_run.py" runs/calm runs/disturbed)"

submit long train.steps=100000 --time 3 # the signal comes one to two minutes before
await 240 is "$job" Restarts 1
reached long 1
proven "time limit of 3 minutes: saved at step $(last_step long) and requeued before it"
before=$(last_step long)
start_again 1
await 240 reached long $((before + 5))
scancel "$job"
await 60 is "$job" JobState CANCELLED
await 60 nodes_idle
is "$job" Restarts 1
saved=$(last_step long)
[[ -e runs/long/$(printf 'step-%08d' "$saved") ]]
proven "cancelled: saved at step $saved, not requeued"

submit wrong data.train=nowhere
await 240 is "$job" JobState FAILED
is "$job" ExitCode 2:0
is "$job" Restarts 0
grep -q 'nowhere: no such folder' "runs/wrong/logs/slurm-$job.log"
proven "an error of the user ends the job with status 2, not requeued"
