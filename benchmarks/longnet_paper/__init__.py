"""The experiments of the LongNet paper (arXiv 2307.02486), scaled down.

`python benchmarks/reproduce_longnet.py` runs them; docs/longnet-paper.md shows what came out.
"""
