"""Arithmetic on tensors: selecting the lowest elements, applying and packing masks, and distributed tensors."""
