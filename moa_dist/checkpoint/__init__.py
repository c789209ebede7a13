"""Writes, checks, converts and averages checkpoints, which any layout can read.

No library does this: DeepSpeed's own checkpoints fit one layout, its universal ones need a separate
conversion and only support experts that DeepSpeed placed itself, and torch.distributed.checkpoint
does not support ZeRO's partitions.
"""
