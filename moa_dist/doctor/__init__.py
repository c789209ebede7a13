"""Diagnoses machines, installations and the ranks of a job, and says how to fix what is wrong.

GPU vendors' tools check single devices; nothing off the shelf compares the ranks of a PyTorch job.
"""
