"""Observers of a training run: console, metrics file, TensorBoard, GPU telemetry."""

from moa_dist.observe.observers import Observers

__all__ = ["Observers"]
