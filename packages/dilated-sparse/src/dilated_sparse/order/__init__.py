"""Orders of tokens that lie on a grid, such as tiles of an image."""
