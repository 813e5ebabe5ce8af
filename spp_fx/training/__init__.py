"""Training adapters, and measuring what it gains: data, trainer, perplexity."""
