"""Axis *encode*: in what format keys and values are stored."""
