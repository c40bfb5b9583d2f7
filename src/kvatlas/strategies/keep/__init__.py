"""Axis *keep*: which tokens stay in the cache."""
