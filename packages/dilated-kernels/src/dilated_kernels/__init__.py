"""Fused kernels and adapters for dilated attention; importing this changes nothing.

Installing the package is enough: `dilated_core` finds its backends through entry points. The rooms:
`fused` holds the Triton kernels, `vendors` and `flex` the adapters to other people's kernels,
`ranking` orders the backends, `availability` tests what a machine has.
"""

from importlib.metadata import version as _version

from dilated_kernels.fused.backend import TritonBackend
from dilated_kernels.ranking.measure import measure_backends
from dilated_kernels.ranking.measured import use_measured_choice

__version__ = _version("dilated-kernels")

__all__ = ["TritonBackend", "measure_backends", "use_measured_choice"]
