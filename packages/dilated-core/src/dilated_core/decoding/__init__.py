"""One token at a time against a cache that does not grow with the context."""
