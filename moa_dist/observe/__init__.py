"""Observers of a training run: console, metrics file, trackers and GPU telemetry.

They add what experiment trackers alone lack: routing of each expert, traffic by layer, and a
metrics file that survives crashes and resumes without duplicate steps. All trackers get the same
values by the same names.
"""

from moa_dist.observe.observers import Observers

__all__ = ["Observers"]
