"""Pictures: which keys a pattern selects, and which tokens a model attended to."""
