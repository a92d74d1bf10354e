"""Arithmetic on tensors: which entries are the lowest, and how a mask is applied, packed and shared among ranks."""
