"""Parts and passes of a model: its parameters and norms, the inputs of its layers, the cost of a forward pass."""
