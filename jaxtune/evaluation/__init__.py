"""Loss, perplexity and task metrics."""
