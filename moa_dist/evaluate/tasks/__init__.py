"""Zero-shot tasks, one file each: reading its examples, what to score, and what the scores mean."""
