"""How the bundled model is made and measured; used by the scripts one folder up."""
