"""The LongNet language model: the model itself, sampling from it, and its files."""
