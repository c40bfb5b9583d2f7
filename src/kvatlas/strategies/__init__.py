"""Strategies: stages over five axes, their registry, grammar, recipes and footprints. Loads without torch."""
