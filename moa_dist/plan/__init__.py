"""What a run sends and needs, before it runs: arithmetic alone, no process group."""
