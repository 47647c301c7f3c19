"""dilated-models."""
