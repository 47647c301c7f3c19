"""Adapters to kernels that other packages ship."""
