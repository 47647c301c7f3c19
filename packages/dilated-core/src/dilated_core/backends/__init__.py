"""What runs attention on a strip: the contract, the registry, and core's own two backends."""
