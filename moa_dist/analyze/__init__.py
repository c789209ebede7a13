"""Analyzes what a trained model's experts and heads do on held-out text."""
