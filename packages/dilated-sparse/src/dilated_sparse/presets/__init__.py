"""MoBA and NSA: attention in which each query chooses blocks of earlier keys."""
