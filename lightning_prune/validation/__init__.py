"""Validation of arguments and of states from checkpoints: plain Python values, or an error that names the rule."""
