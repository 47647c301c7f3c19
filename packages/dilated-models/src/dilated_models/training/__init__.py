"""Training a LongNet on text: files, streams, order, loop, checkpoints, report."""
