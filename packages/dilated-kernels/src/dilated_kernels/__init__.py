"""Fused kernels and adapters for dilated attention; importing this changes nothing.

Installing the package is enough: `dilated_core` finds its backends through entry points.
"""

from importlib.metadata import version as _version

__version__ = _version("dilated-kernels")

__all__ = ["__version__"]
