"""What a model is made of: its parameters and norms, what its layers are given, what a forward pass costs."""
