"""Hugging Face models: the adapter that runs them, the probe that decides, loading."""
