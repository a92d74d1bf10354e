"""Which channels depend on each other, and how they are cut out of a model and found again in a checkpoint."""
