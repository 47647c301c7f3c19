"""The parts of a LongNet: self-attention, feed-forward, and the block made of both."""
