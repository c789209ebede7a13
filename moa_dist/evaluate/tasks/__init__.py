"""Defines zero-shot tasks, one per file: how to read examples, what to score, and the metrics."""
