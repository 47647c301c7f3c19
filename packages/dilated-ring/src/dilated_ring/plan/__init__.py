"""Which rows which rank sends to which: pure Python, without a tensor."""
