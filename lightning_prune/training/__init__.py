"""Pruning while a ``Trainer`` fits: the callback, its presets, and the enforcement of masks."""
