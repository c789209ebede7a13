"""Routing, dispatch and grouped experts, shared by attention and FFN."""
