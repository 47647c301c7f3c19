"""Text to tokens: files, streams of bytes or tokens, vocabularies, the order of windows."""
