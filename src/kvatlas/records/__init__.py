"""Raw samples with the facts of their run, in one embedded database: the only source of every report."""
