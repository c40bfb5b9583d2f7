"""Paged storage of keys and values: an arena of slabs, blocks of one lane, tables, prefix cache, books."""
