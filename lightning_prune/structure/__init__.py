"""Changing the structure of a model: groups of units that go together, the equivalence check, the cut, its record."""
