"""Distributed pretraining of Transformers with expert attention and expert feed-forward layers."""
