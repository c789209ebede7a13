"""Text to shards, sample order, streaming."""
