"""The command line: one thin module per command; nothing is computed here. Loads torch only where a command runs a model."""
