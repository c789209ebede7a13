"""Compares a layout with plain torch on one process, and rehearses one rank of a large job."""
