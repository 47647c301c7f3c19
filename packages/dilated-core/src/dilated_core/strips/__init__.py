"""The kept rows of a branch as strided views, their plan, and attention over them."""
