"""Imports and exports transformers' JetMoE, and upcycles dense models to sparse ones."""
