"""Axis *budget*: how what a *keep* stage may hold is divided among layers and heads."""
