"""Models from elsewhere and to elsewhere."""
