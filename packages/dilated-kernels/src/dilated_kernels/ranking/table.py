"""The order of the backends for given inputs: a table, and the origin of each of its lines.

A backend of this package ranks itself by it:

    def priority_for(self, inputs: AttentionInputs) -> Rank:
        return rank(self.name, inputs)

`sdpa` and `eager` belong to dilated_core and rank 10 and 0. A measurement on a machine replaces the
table there: see measured.py. Whether a backend can run at all, its `why_not` decides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from dilated_core import AttentionInputs

from dilated_kernels.availability import HALF_DTYPES, Capability, cuda_capability


class Rank(NamedTuple):
    """The rank of a backend for some inputs.

    Attributes:
        value: `backend="auto"` takes the highest that can run; below 0, only a name selects it.
        origin: Where the value comes from, as a phrase.
    """

    value: int
    origin: str


class Entry(NamedTuple):
    """A line of the table: the inputs it is for, and the rank of a backend there.

    Attributes:
        backend: Name of the backend.
        value: As in `Rank`.
        origin: As in `Rank`.
        device: Type of the device, such as "cuda"; any if None.
        from_capability: CUDA compute capability of the oldest GPUs meant; any device if None.
        dtypes: Any if empty.
        head_dims: Any if None.
        seq_lens: Any if None; otherwise the line is not for inputs of unknown length.
    """

    backend: str
    value: int
    origin: str
    device: str | None = None
    from_capability: Capability | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    head_dims: range | None = None
    seq_lens: range | None = None


_UNMEASURED = "by design, not yet measured on a GPU"

# The first line that fits decides, so lines with conditions come before the one without.
TABLE = (
    Entry(
        *("triton", -1),
        "on a CPU its kernels run in Triton's interpreter, which is for tests",
        device="cpu",
    ),
    Entry("triton", 50, _UNMEASURED),
    Entry("flash4", 44, _UNMEASURED),
    Entry("flash3", 43, _UNMEASURED),
    Entry("flash2", 42, _UNMEASURED),
    Entry("cudnn", 30, _UNMEASURED),
    Entry("xformers", 20, _UNMEASURED),
    Entry(
        *("efficient", 5),
        f"sdpa is PyTorch's flash attention here; {_UNMEASURED}",
        from_capability=(8, 0),
        dtypes=HALF_DTYPES,
        head_dims=range(257),
    ),
    Entry("efficient", 15, _UNMEASURED),
    Entry("flex", -1, "it has to be compiled for each pattern and shape"),
)


def rank(name: str, inputs: AttentionInputs) -> Rank:
    """The rank of the backend `name` for `inputs`, from the table.

    Raises:
        ValueError: If the table has no backend of that name.
    """
    for entry in _ENTRIES.get(name, ()):
        if fits(entry, inputs):
            return Rank(entry.value, entry.origin)
    raise ValueError(f"no line of the table ranks {name!r}; it has {', '.join(_ENTRIES)}.")


def fits(entry: Entry, inputs: AttentionInputs) -> bool:
    """Whether a line of the table is for these inputs, whatever its backend."""
    if entry.device is not None and inputs.device.type != entry.device:
        return False
    if entry.dtypes and inputs.dtype not in entry.dtypes:
        return False
    if entry.head_dims is not None and inputs.head_dim not in entry.head_dims:
        return False
    if entry.seq_lens is not None and inputs.seq_len not in entry.seq_lens:  # nor is None
        return False
    if entry.from_capability is None:
        return True
    # A GPU that is not there has no known capability, as when a machine without one explains ranks.
    if inputs.device.type != "cuda" or (capability := cuda_capability(inputs.device)) is None:
        return False
    return capability >= entry.from_capability


_ENTRIES: dict[str, tuple[Entry, ...]] = {
    name: tuple(entry for entry in TABLE if entry.backend == name)
    for name in dict.fromkeys(entry.backend for entry in TABLE)
}
