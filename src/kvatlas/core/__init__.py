"""Vocabulary that every other package may use; it imports none of them, and no torch at run time."""
