"""Kernels that compute routed experts, and the choice between them.

`routed_experts.routed_experts` is what the rest of the package calls. It takes experts, rows and a
`row_map.RowMap`, which also holds the legend of all shapes here.
"""
