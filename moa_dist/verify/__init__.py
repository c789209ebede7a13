"""Comparing a layout with plain torch on one process, and rehearsing one rank of a large job."""
