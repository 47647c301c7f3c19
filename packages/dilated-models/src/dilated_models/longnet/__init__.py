"""LongNet (arXiv 2307.02486): its configuration and the language model."""
