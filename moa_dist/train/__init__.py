"""The training loop, the DeepSpeed engine, and what surrounds one step."""
