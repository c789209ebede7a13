"""Predicts memory, traffic and time of a run before it starts, without a process group.

No library does this: DeepSpeed's estimators and profiler know neither experts that are spread over
ranks nor what their exchange sends, and compare no layouts.
"""
