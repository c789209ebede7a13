"""Models that run on one process and know no process groups."""
