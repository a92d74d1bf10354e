"""Arguments and states: what users and checkpoints give, checked by rules, as plain Python values."""
