"""The slide encoder: tile embeddings with coordinates in, one embedding of the slide out."""
