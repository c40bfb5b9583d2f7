"""Axis *attend*: which cached tokens a query reads."""
