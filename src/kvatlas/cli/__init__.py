"""The command line: one thin module per command. Nothing is computed here; torch loads only where a model runs."""
