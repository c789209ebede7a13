"""Checkpoints that any layout can read: format, writing, checking, converting, averaging.

No library does this: DeepSpeed's own checkpoints fit one layout, its universal ones need a separate
conversion and know only experts that it has placed itself, and torch.distributed.checkpoint does
not know ZeRO's partitions.
"""
