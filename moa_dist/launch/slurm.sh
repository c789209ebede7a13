# The constant part of a batch script for Slurm: see slurm.py, which writes what comes before it,
# `launch`, the command of a node's launcher, `srun`, further options of the step, and the exit
# codes PREEMPTED and LOST_PEER.

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # below those that systems give away

# "Save and end": from Slurm before the end, or by `scancel --signal=USR1 --batch JOB`.
asked=0 step=
pass_on() { [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null; }
trap 'asked=$((asked + 1)); pass_on' USR1

# Run the launchers; ends in `status`.
run_step() {
    # In every task: the name and number that Slurm gave its node.
    local here='MOA_DIST_HOST=$SLURMD_NODENAME exec "$@" --node-rank "$SLURM_NODEID"' heard=-1
    srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=60 "${srun[@]}" \
        bash -c "$here" launch "${launch[@]}" --nodes "$SLURM_JOB_NUM_NODES" \
        --master-addr "${hosts[0]}" --master-port "$port" &
    step=$!
    ((asked == 0)) || pass_on
    until ((heard == asked)); do # a signal interrupts `wait`, which then knows no status yet
        heard=$asked
        wait "$step"
        status=$?
    done
    step=
}

# The launchers start failed ranks again; what is mended here is a launcher that was killed. bash's
# `wait` says -1 now and then if the step ends while a signal comes: then nobody knows its status.
is_lost() { ((status == LOST_PEER || status > 128 || status < 0)); }
for start in 1 2 3; do
    run_step
    if ((asked)) || ! is_lost; then break; fi
    echo "the launchers ended with status $status (start $start of 3)"
done
if ((asked)) && is_lost; then
    status=$PREEMPTED # the signal came before anybody listened
fi

# A job that was cancelled ends with this status too, but Slurm no longer calls it running.
if ((status == PREEMPTED)) &&
    [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
    echo "preempted: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
