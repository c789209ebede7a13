"""Observers of a training run: console, metrics file, TensorBoard and GPU telemetry.

Experiment trackers offer curves as well; these observers add what they do not: per-expert routing,
traffic by layer, and a metrics file that survives crashes and resumes without duplicate steps.
"""

from moa_dist.observe.observers import Observers

__all__ = ["Observers"]
