"""Experiments: one question per file; each turns settings into points and points into samples."""
