"""Starting a job's ranks, watching them, saying why they ended, starting them again.

`supervisor` decides and knows nothing of how ranks are started: `local` starts them on this machine
through the `deepspeed` launcher, `ssh_launcher` on the hosts of a hostfile by its pdsh path,
`leader` and `worker_node` with a launcher of our own on every node. `rank` is what runs around each of them, `link` what connects
it with the supervisor's host, and `preflight` what is found before anything starts. `slurm` and
`kubernetes` write the jobs of schedulers, which start `launcher/launch.py` on every node.
"""
