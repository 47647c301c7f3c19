"""Reused memory: a buffer is borrowed for a `with` block and goes back when the block ends."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

import torch

from dilated_core.checks import check_bool, check_dtype, check_integer

# Sizes are rounded up to this, so that nearly equal requests share a storage.
_GRANULE_BYTES = 512

# An idle storage that is more than this many times larger than the request is not used for it.
_MAX_SIZE_RATIO = 2


class _Place(NamedTuple):
    """A device and, on CUDA, a stream: on another stream the earlier use may still be running."""

    device: torch.device
    stream: int


class WorkspacePool:
    """Buffers for intermediate results, kept for reuse instead of being allocated anew.

    For code that needs large tensors of similar sizes again and again: the system maps large
    allocations page by page and unmaps them each time, and page-locked memory is slow to allocate.

    A buffer belongs to one borrower until its `with` block ends, by an exception or not. Any number
    of threads may use a pool at once; none waits while another works with its buffer.

    Rules for borrowers:

    - A buffer is uninitialised memory.
    - Neither the buffer nor a view of it may be used after the block, when another borrower may
      have the memory. Copy what must stay.
    - On a GPU a buffer belongs to the stream that is current when it is borrowed, and a
      `non_blocking` copy from or to page-locked memory must be over before the block ends.

    Args:
        max_bytes: Memory that idle buffers may hold. Beyond it those that were returned longest ago
            are freed. Borrowed buffers do not count.
        pin_memory: Give page-locked memory of the CPU, which copies to a GPU faster.

    Raises:
        TypeError: If `max_bytes` is not an integer, or `pin_memory` no bool.
        ValueError: If `max_bytes` is below 0, or memory is to be page-locked without a GPU.

    Example:
        >>> pool = WorkspacePool(max_bytes=2**20)
        >>> for _ in range(3):
        ...     with pool.borrow((100, 64), dtype=torch.float32) as buffer:
        ...         _ = buffer.zero_()
        >>> pool.misses, pool.hits, pool.idle_bytes, pool.borrowed_bytes
        (1, 2, 25600, 0)
    """

    def __init__(self, max_bytes: int = 2**28, *, pin_memory: bool = False) -> None:
        max_bytes = check_integer("max_bytes", max_bytes, at_least=0)
        if check_bool("pin_memory", pin_memory) and not torch.cuda.is_available():
            raise ValueError(
                "pin_memory is True and there is no CUDA device; page-locked memory serves copies "
                "to one only, so leave it out."
            )
        self._max_bytes, self._pin_memory = max_bytes, pin_memory
        self._lock = Lock()
        self._idle: list[tuple[_Place, torch.Tensor]] = []  # the one returned longest ago first
        self._idle_bytes = self._borrowed_bytes = self._hits = self._misses = 0

    @contextmanager
    def borrow(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Generator[torch.Tensor, None, None]:
        """Lend a contiguous, uninitialised tensor for the `with` block.

        The smallest idle buffer that is large enough is used again, unless it is more than twice as
        large.

        Args:
            shape: Of the tensor.
            dtype: Of the tensor.
            device: Of the tensor.

        Raises:
            TypeError: If a size is no integer or `dtype` no dtype.
            ValueError: If a size is negative, or the device is not the CPU and the pool's memory is
                page-locked.
        """
        place = _place(torch.device(device))
        if self._pin_memory and place.device.type != "cpu":
            raise ValueError(
                f"device is {device} and the pool's memory is page-locked, which only the CPU's "
                f"can be; borrow from a pool without pin_memory."
            )
        shape = [check_integer(f"shape[{i}]", size, at_least=0) for i, size in enumerate(shape)]
        check_dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        storage = self._take(place, -(-nbytes // _GRANULE_BYTES) * _GRANULE_BYTES)
        try:
            yield storage[:nbytes].view(dtype).view(shape)
        finally:
            self._give_back(place, storage)

    @property
    def idle_bytes(self) -> int:
        """Bytes of the buffers that nobody has borrowed."""
        return self._idle_bytes

    @property
    def borrowed_bytes(self) -> int:
        """Bytes of the buffers that are borrowed now."""
        return self._borrowed_bytes

    @property
    def hits(self) -> int:
        """How often a buffer was used again."""
        return self._hits

    @property
    def misses(self) -> int:
        """How often memory was allocated."""
        return self._misses

    def clear(self) -> None:
        """Free the idle buffers. Borrowed buffers stay, and go back as usual."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._idle_bytes = 0
        idle.clear()  # freed without the lock

    def _take(self, place: _Place, nbytes: int) -> torch.Tensor:
        with self._lock:
            fitting = [
                (storage.nbytes, i)
                for i, (idle_place, storage) in enumerate(self._idle)
                if idle_place == place and nbytes <= storage.nbytes <= _MAX_SIZE_RATIO * nbytes
            ]
            if fitting:
                _, storage = self._idle.pop(min(fitting)[1])
                self._idle_bytes -= storage.nbytes
                self._borrowed_bytes += storage.nbytes
                self._hits += 1
                return storage
        storage = torch.empty(
            nbytes, dtype=torch.uint8, device=place.device, pin_memory=self._pin_memory
        )
        with self._lock:
            self._borrowed_bytes += nbytes
            self._misses += 1
        return storage

    def _give_back(self, place: _Place, storage: torch.Tensor) -> None:
        freed: list[tuple[_Place, torch.Tensor]] = []
        with self._lock:
            self._borrowed_bytes -= storage.nbytes
            if storage.nbytes > self._max_bytes:
                return
            self._idle.append((place, storage))
            self._idle_bytes += storage.nbytes
            while self._idle_bytes > self._max_bytes:
                freed.append(self._idle.pop(0))
                self._idle_bytes -= freed[-1][1].nbytes
        freed.clear()  # without the lock


def _place(device: torch.device) -> _Place:
    if device.type != "cuda":
        return _Place(device, 0)
    if device == torch.device("cuda"):  # without an index, which "cuda:0" is not equal to
        device = torch.device("cuda", torch.cuda.current_device())
    return _Place(device, torch.cuda.current_stream(device).cuda_stream)
