#!/usr/bin/env bash
# Test the batch script in a real Slurm with two nodes on this machine. Each node runs a rank that
# holds half of the experts. The job is preempted and requeued, a launcher is killed, and the job
# must end bit for bit like an undisturbed one.
#
#     bash tests/cluster/slurm.sh
#
# Needs root on Debian or Ubuntu, and installs slurmctld, slurmd, munge and iproute2 if they are
# missing. Everything runs in separate namespaces and ends with them. Takes about eight minutes.
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
    # Both nodes share this machine, so a rank gets one thread.
    export PYTHONPATH="$repository" OMP_NUM_THREADS=1 work
    unshare --mount --net --pid --fork --mount-proc --kill-child bash "$0" --inside &
    inside=$!
    trap 'kill -KILL "$inside" 2>/dev/null || true; rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    wait "$inside"
    exit
fi

passed() { printf 'PASSED  %4d s  %s\n' "$SECONDS" "$*"; }

# field JOB NAME: print a field of Slurm's description of the job.
field() { scontrol --oneliner show job "$1" | sed -E "s/.* $2=([^ ]*).*/\1/"; }
is() { [[ $(field "$1" "$2") == "$3" ]]; }
steps() { cat "runs/$1/metrics.jsonl" 2>/dev/null | grep -c '"kind": "step"' || true; }
reached() { (($(steps "$1") >= $2)); }
last_step() { tail -n 1 "runs/$1/metrics.jsonl" | grep -oP '"step": \K\d+'; }

# submit NAME [ARGUMENT...]: submit a job and set `job` to its ID.
submit() {
    local command
    command=$(python "$repository/launcher/job.py" slurm --config tiny.yaml --nodes 2 \
        --ranks-per-node 1 --grace 60 "name=$1" "${@:2}")
    job=$(eval "$command" | grep -o '[0-9]*$')
}

# Slurm waits two minutes before it starts a requeued job; skip that wait.
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
passed "job $job ran $(steps calm) steps on $(field "$job" NodeList)"

submit disturbed
await 240 reached disturbed 5
scancel --signal=USR1 --batch "$job" # as sent by --signal=B:
start_again 1
saved=$(last_step disturbed)
[[ -e runs/disturbed/$(printf 'step-%08d' "$saved") ]]
passed "preempted: saved at step $saved and requeued by its script"

await 240 reached disturbed $((saved + 5))
kill -KILL "$(pgrep -f 'launch.py .*--node-rank 1$')"
await 240 is "$job" JobState COMPLETED
is "$job" Restarts 1
grep -q 'the launchers ended with status 137 (start 1 of 3)' "runs/disturbed/logs/slurm-$job.log"
passed "continued; the launcher of node2 was killed, and the step was restarted: completed"
passed "$(python "$here/same_run.py" runs/calm runs/disturbed)"

submit long train.steps=100000 --time 3 # the signal is sent one to two minutes before the limit
await 240 is "$job" Restarts 1
reached long 1
passed "time limit of 3 minutes: saved at step $(last_step long) and requeued in time"
before=$(last_step long)
start_again 1
await 240 reached long $((before + 5))
scancel "$job"
await 60 is "$job" JobState CANCELLED # codespell:ignore
await 60 nodes_idle
is "$job" Restarts 1
saved=$(last_step long)
[[ -e runs/long/$(printf 'step-%08d' "$saved") ]]
passed "canceled: saved at step $saved, not requeued"

submit wrong data.train=nowhere
await 240 is "$job" JobState FAILED
is "$job" ExitCode 2:0
is "$job" Restarts 0
grep -q 'nowhere: no such folder' "runs/wrong/logs/slurm-$job.log"
passed "a data error ends the job with status 2, not requeued"
