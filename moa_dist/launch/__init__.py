"""Starting a job's ranks, watching them, saying why they ended, starting them again.

`supervisor` decides and knows nothing of how ranks are started; `local` starts them through the
`deepspeed` launcher; `rank` is what runs around each of them.
"""
