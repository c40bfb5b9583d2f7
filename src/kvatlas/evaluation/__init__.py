"""Quality on public tasks: a model class for EleutherAI's lm-eval, and perplexity of texts."""
