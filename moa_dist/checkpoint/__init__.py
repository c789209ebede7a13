"""Checkpoints that any layout can read: format, writing, checking, converting, averaging."""
