"""Sources and sinks of streamed rows: tensors in memory and in files."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from dilated_core.checks import check_choice, check_dtype, check_integer


class MappedTensor:
    """A `(B, S, H, D)` tensor in a raw file, of which only the rows in use are in memory.

    The file holds the numbers in row-major order and nothing else, which is the format of
    `torch.from_file` and of NumPy's `tofile` and `np.memmap`.

    Args:
        path: The file.
        shape: B, S, H, D.
        dtype: Of the numbers.
        mode: `"r"` to read a file that exists; writes to the rows never reach the file. `"r+"` to
            read and write a file that exists. `"w"` likewise, but a missing file is created, full
            of zeros: a call that is repeated after a kill finds the rows that it had written.

    Raises:
        TypeError: If a size is no integer, or `dtype` no dtype.
        ValueError: If the mode is unknown, the path a folder, or the file's size not that of the
            tensor.
        FileNotFoundError: If the file is missing and `mode` is not `"w"`.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> x = MappedTensor(folder.name + "/x", (1, 1000, 2, 4), torch.float32, mode="w")
        >>> _ = x.rows(10, 12).fill_(7)
        >>> x.rows(9, 12)[0, :, 0, 0]
        tensor([0., 7., 7.])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        mode: Literal["r", "r+", "w"] = "r",
    ) -> None:
        check_choice("mode", mode, ("r", "r+", "w"))
        check_dtype(dtype)
        if len(shape) != 4:
            raise ValueError(
                f"shape is {tuple(shape)}; it must be the four numbers (batch, sequence, heads, "
                f"head_dim)."
            )
        shape = [check_integer(f"shape[{i}]", size, at_least=1) for i, size in enumerate(shape)]
        self.path, self.dtype, self.mode = Path(path), dtype, mode
        self.shape = torch.Size(shape)
        nbytes = math.prod(shape) * dtype.itemsize
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; give the path of a file.")
        if mode == "w" and not self.path.exists():
            with self.path.open("xb") as file:
                file.truncate(nbytes)
        if (size := self.path.stat().st_size) != nbytes:
            raise ValueError(
                f"{self.path} has {size} bytes and a {dtype} tensor of shape {tuple(shape)} has "
                f"{nbytes}; give the shape and dtype it was written with."
            )

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The positions from `start` to `stop`, `(B, stop − start, H, D)`, mapped while in use.

        Raises:
            TypeError: If a bound is no integer.
            ValueError: If the range is empty or not within the tensor.
        """
        start, stop = check_integer("start", start), check_integer("stop", stop)
        B, S, H, D = self.shape
        if not 0 <= start < stop <= S:
            raise ValueError(f"rows {start} to {stop} are not within the {S} of {self.path}.")
        row = H * D * self.dtype.itemsize
        first = start * row
        begin = first - first % mmap.ALLOCATIONGRANULARITY
        # One mapping for all batch rows: the rows between take address space, not memory.
        end = ((B - 1) * S + stop) * row
        is_written = self.mode != "r"
        with self.path.open("r+b" if is_written else "rb") as file:
            # Reading maps a private copy, because PyTorch has no tensors that cannot be written.
            access = mmap.ACCESS_WRITE if is_written else mmap.ACCESS_COPY
            buffer = mmap.mmap(file.fileno(), end - begin, access=access, offset=begin)
        flat = torch.frombuffer(buffer, dtype=self.dtype, offset=first - begin)
        return flat.as_strided((B, stop - start, H, D), (S * H * D, H * D, D, 1))


def tensor_source(
    q: torch.Tensor | MappedTensor,
    k: torch.Tensor | MappedTensor,
    v: torch.Tensor | MappedTensor,
    *,
    device: torch.device | str | None = None,
) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A source for `dilated_attention_streamed` that reads from tensors, in memory or in files.

    Args:
        q: `(B, S, H, D)`.
        k, v: `(B, S, H_kv, D)`.
        device: Where to attend; where the tensors are if None.

    Raises:
        TypeError: If one is neither a tensor nor a `MappedTensor`.
        ValueError: If a tensor requires a gradient, which streaming does not compute.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_kind(name, x)
        if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and streaming computes none; pass {name}.detach(), "
                f"or use dilated_attention."
            )

    def rows(x: torch.Tensor | MappedTensor, start: int, stop: int) -> torch.Tensor:
        return _rows(x, start, stop).to(device)

    return lambda start, stop: (rows(q, start, stop), rows(k, start, stop), rows(v, start, stop))


def tensor_sink(out: torch.Tensor | MappedTensor) -> Callable[[int, int, torch.Tensor], object]:
    """A sink for `dilated_attention_streamed` that writes to a tensor, in memory or in a file.

    Writing the same rows again changes nothing, so the sink needs no state for a journal.

    Args:
        out: `(B, S, H, D)`, on any device, in the dtype of q.

    Raises:
        TypeError: If it is neither a tensor nor a `MappedTensor`.
        ValueError: If it requires a gradient or was opened for reading only.
    """
    _check_kind("out", out)
    if isinstance(out, MappedTensor):
        if out.mode == "r":
            raise ValueError(f"{out.path} is open for reading; give mode='r+' or mode='w'.")
    elif out.requires_grad:
        raise ValueError("out requires a gradient, and streaming computes none; pass out.detach().")

    def sink(start: int, stop: int, rows: torch.Tensor) -> None:
        target = _rows(out, start, stop)
        if target.shape != rows.shape or target.dtype != rows.dtype:
            raise ValueError(
                f"out has shape {tuple(target.shape)} and {target.dtype} at positions {start} to "
                f"{stop}, and the results have {tuple(rows.shape)} and {rows.dtype}; they must be "
                f"equal, so give an out of the shape and dtype of q."
            )
        target.copy_(rows)

    return sink


def _check_kind(name: str, x: object) -> None:
    if not isinstance(x, (torch.Tensor, MappedTensor)):
        raise TypeError(
            f"{name} is a {type(x).__name__}; it must be a tensor or a dilated_core.MappedTensor."
        )


def _rows(x: torch.Tensor | MappedTensor, start: int, stop: int) -> torch.Tensor:
    return x.rows(start, stop) if isinstance(x, MappedTensor) else x[:, start:stop]
