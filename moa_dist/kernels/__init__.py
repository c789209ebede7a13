"""Kernels that compute routed experts, chosen by device, type and widths."""
