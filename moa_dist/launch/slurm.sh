# The constant part of a batch script for Slurm. slurm.py writes what comes before it: `launch`, the
# command of a node's launcher; `srun`, additional options of the step; and the exit codes PREEMPTED
# and LOST_PEER.

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # below the ephemeral range

# By this secret the nodes know each other; Slurm passes it on in the environment of the step.
[[ -n ${MOA_DIST_JOB_SECRET:-} ]] ||
    MOA_DIST_JOB_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export MOA_DIST_JOB_SECRET

# "Save and stop": sent by Slurm before the end, or by `scancel --signal=USR1 --batch JOB`.
asked=0 step=
forward() { [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null; }
trap 'asked=$((asked + 1)); forward' USR1

# Run the launchers, and set `status`.
run_step() {
    # Runs in every task, with the name and number that Slurm gave to its node.
    local here='MOA_DIST_HOST=$SLURMD_NODENAME exec "$@" --node-rank "$SLURM_NODEID"' seen=-1
    srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=60 "${srun[@]}" \
        bash -c "$here" launch "${launch[@]}" --nodes "$SLURM_JOB_NUM_NODES" \
        --master-addr "${hosts[0]}" --master-port "$port" &
    step=$!
    ((asked == 0)) || forward
    until ((seen == asked)); do # a signal interrupts `wait` before the status is known
        seen=$asked
        wait "$step"
        status=$?
    done
    step=
}

# The launchers restart failed ranks; this loop restarts launchers that were killed. bash's `wait`
# occasionally returns -1 if the step ends while a signal arrives: the status is then unknown.
is_lost() { ((status == LOST_PEER || status > 128 || status < 0)); }
for start in 1 2 3; do
    run_step
    if ((asked)) || ! is_lost; then break; fi
    echo "the launchers ended with status $status (start $start of 3)"
done
if ((asked)) && is_lost; then
    status=$PREEMPTED # the signal arrived before the launchers handled it
fi

# A job that was canceled ends with this status too, but Slurm no longer reports it as running.
if ((status == PREEMPTED)) &&
    [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
    echo "preempted: requeueing the job"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
