"""Starts the ranks of a job, supervises them, explains why they ended, and restarts them.

`supervisor` decides, and does not know how ranks are started: `local` starts them on this machine
through the `deepspeed` launcher, `ssh_launcher` on the hosts of a hostfile through DeepSpeed's pdsh
support, `leader` and `worker_node` through a launcher process on every node. `rank` is the agent
that runs around each rank, `link` connects nodes with the supervisor, and `preflight` checks the
hosts before anything starts. `slurm` and `kubernetes` write jobs for schedulers, which start
`launcher/launch.py` on every node.

`torchrun` restarts ranks too, but does not say which rank failed or why, checks no hosts, and
leaves ranks behind on hosts that are cut off.
"""
