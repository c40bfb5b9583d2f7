"""Axis *place*: where keys and values live."""
