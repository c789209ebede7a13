"""The training loop, the engine, checkpoints."""
