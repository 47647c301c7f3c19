"""The encoder of a LongNet: its layer, and a stack of them."""
