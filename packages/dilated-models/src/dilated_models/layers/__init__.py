"""The parts a LongNet is made of: positions, self-attention, feed-forward, block."""
