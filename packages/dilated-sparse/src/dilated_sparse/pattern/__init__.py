"""Which blocks of the attention matrix are kept: `BlockPattern`, and functions that build one."""
