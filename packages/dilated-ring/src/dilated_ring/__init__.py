"""Dilated attention over a sequence that is spread over ranks, exact on any number of them."""

from importlib.metadata import version as _version

from dilated_ring.layout import Layout

__version__ = _version("dilated-ring")

__all__ = ["Layout"]
