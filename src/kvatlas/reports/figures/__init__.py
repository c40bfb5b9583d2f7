"""Figures, one module per experiment; each shows one study, so never two model roles.

matplotlib is imported here only: `Figure` objects alone, no pyplot, no global state.
"""
