"""Cut sequences into the shards of a layout, and put them together again."""
