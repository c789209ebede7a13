# Sourced by slurm.sh: a Slurm cluster of two nodes, node1 and node2, on this machine.
#
# `install_slurm` installs missing Debian packages. `start_slurm FOLDER` starts the cluster with its
# files in FOLDER; call it as root in separate mount, network and process namespaces, so that nothing
# outside sees the cluster and all of it ends with them.

install_slurm() {
    local program
    for program in slurmctld slurmd munged ip; do
        if ! command -v "$program" >/dev/null; then
            apt-get update -qq
            DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends \
                slurmctld slurmd slurm-client munge iproute2 >/dev/null
            return
        fi
    done
}

start_slurm() {
    local folder=$1 host node
    host=$(hostname)
    mkdir -p "$folder"/state "$folder"/node1 "$folder"/node2
    ip link set lo up
    ip link add nodes type veth peer name other # with both ends up, the link has a carrier
    ip link set other up
    ip link set nodes up
    ip address add 10.0.0.1/24 dev nodes
    ip address add 10.0.0.2/24 dev nodes
    printf '127.0.0.1 localhost\n10.0.0.1 node1 %s\n10.0.0.2 node2\n' "$host" >"$folder/hosts"
    mount --bind "$folder/hosts" /etc/hosts

    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 0400 "$folder/munge.key"
    chmod 0755 "$folder"
    munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --seed-file="$folder/munge.seed" \
        --log-file="$folder/munged.log" &>"$folder/munged.out" &
    await 20 test -S "$folder/munge.socket"

    cat >"$folder/slurm.conf" <<CONF
ClusterName=two
SlurmctldHost=$host
SlurmUser=root
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
SlurmctldPort=16817
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=20
NodeName=node1 NodeHostname=$host NodeAddr=node1 Port=17001 CPUs=$(nproc) State=UNKNOWN
NodeName=node2 NodeHostname=$host NodeAddr=node2 Port=17002 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -D &>"$folder/slurmctld.out" &
    for node in node1 node2; do
        slurmd -D -N "$node" &>"$folder/$node.out" &
    done
    await 30 nodes_idle
}

nodes_idle() { [[ $(sinfo --noheader --Node --states idle --format %N 2>/dev/null | wc -l) == 2 ]]; }

# await SECONDS COMMAND...: wait until the command succeeds; fail with a message after that time.
await() {
    local limit=$1 end=$((SECONDS + $1))
    shift
    until "$@"; do
        if ((SECONDS > end)); then
            echo "FAILED: after $limit s still not: $*" >&2
            return 1
        fi
        sleep 0.2
    done
}
