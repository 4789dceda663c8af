"""What a model asks of a machine: bytes per layer and tensor class, and what fits in a budget."""
