"""What a run sends and needs, before it runs: arithmetic alone, no process group.

No library does this: DeepSpeed's estimators and profiler know neither experts that are spread over
ranks nor what their exchange sends, and compare no layouts.
"""
