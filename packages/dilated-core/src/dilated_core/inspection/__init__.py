"""Tools to see what attention did: rows of its matrix, and its memory."""
