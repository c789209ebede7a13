"""Evaluates trained models (perplexity, zero-shot tasks, BLEU), generates, translates, exports."""
