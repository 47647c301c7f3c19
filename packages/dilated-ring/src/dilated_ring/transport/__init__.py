"""How tensors get from one rank to another."""
