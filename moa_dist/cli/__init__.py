"""The moa-dist command."""
