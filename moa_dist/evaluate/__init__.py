"""What a trained model can do: perplexity, zero-shot tasks, generation, translation, export."""
