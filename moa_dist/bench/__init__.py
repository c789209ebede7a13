"""Measures speed and memory as ratios within one run.

Why not a library: torch.utils.benchmark and pytest-benchmark time alternatives one after another,
so that a machine's drift passes for a difference, and neither measures memory or runs on ranks.
"""
