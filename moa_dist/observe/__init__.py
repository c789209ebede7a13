"""What a person sees: console, TensorBoard, GPU telemetry."""
