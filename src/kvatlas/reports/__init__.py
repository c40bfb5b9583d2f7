"""Records in, figures, tables and one self-contained page out; reads nothing else and imports no torch."""
