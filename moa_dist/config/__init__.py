"""Configuration: typed schema, loading, checks."""
