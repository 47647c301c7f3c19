"""dilated-core."""
