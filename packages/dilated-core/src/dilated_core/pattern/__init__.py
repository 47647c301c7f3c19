"""Which positions each head keeps: arithmetic on integers."""
