"""Tell the other ranks of a group that this one fails."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch.utils.checkpoint import (
    _StopRecomputationError,  # pyright: ignore[reportPrivateUsage]
)

from dilated_ring.transport.contract import Transport
from dilated_ring.transport.distributed import DistributedTransport
from dilated_ring.transport.errors import DisagreementError, RankFailure


@contextmanager
def reporting_failures(transport: Transport, rank: int) -> Generator[None]:
    """Tell the other ranks of an error in the block: one call, all ranks, forward or backward.

    The error itself is raised on this rank, with a note. The other ranks raise `RankFailure`, now
    if they wait for messages, else when they next use the group. A `DisagreementError` is not
    reported, because every rank raises it.

    Example::

        with reporting_failures(transport, rank):
            lengths = check_agreement(transport, rank, description, local_len)
            ...

    Args:
        transport: Ranks that share a process need no report; for them nothing is done.
        rank: The rank that runs the block.

    Raises:
        RankFailure: If a rank has failed before.
        RuntimeError: If another thread is in such a block of the same group.
    """
    watch = transport.watch if isinstance(transport, DistributedTransport) else None
    if watch is None:
        yield
        return
    watch.begin_call()
    try:
        with watch.one_thread():
            yield
    except (RankFailure, DisagreementError, _StopRecomputationError):
        # Non-reentrant checkpointing raises the last one, on all ranks alike, to leave the block
        # once it has recomputed what backward needs.
        raise
    except BaseException as error:
        watch.fail(f"{type(error).__name__}: {error}".rstrip(". ") + ".")
        note = f"The other ranks of the group were told that rank {watch.name} raised this."
        # Two groups of one call report the same error.
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise
    finally:
        watch.end_wait()
