"""Models from elsewhere and to elsewhere: transformers' JetMoE, dense models made sparse."""
