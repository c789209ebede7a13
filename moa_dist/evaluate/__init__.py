"""Perplexity and samples of trained models."""
