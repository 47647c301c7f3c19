"""A process that is killed or stopped: the others name it, with the store of the group or without.

These faults end processes, so `run_processes` raises; what each rank knew is in files.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing import run_processes
from dilated_ring.transport import DistributedTransport, check_agreement, reporting_failures

# Long enough for a busy machine; no survivor waits for it.
_LONG_S = 60.0
_SHORT_S = 3.0


def _hop(transport: DistributedTransport, step: str, numel: int = 1000) -> None:
    (rank,) = transport.hosted
    left = (rank - 1) % transport.size
    sends = {(rank + 1) % transport.size: torch.full((numel,), float(rank))}
    transport.start(rank, sends, {left: torch.zeros(numel)}, step=step).wait()


def _call(transport: DistributedTransport, fault: Callable[[], None] | None = None) -> None:
    (rank,) = transport.hosted
    with reporting_failures(transport, rank):
        check_agreement(transport, rank, {}, 0)
        _hop(transport, "hop 1 of 2")
        if fault:
            fault()
        _hop(transport, "hop 2 of 2")


def _kill(folder: str) -> None:
    Path(folder, "fault").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(folder: str) -> None:
    Path(folder, "stopped").write_text(str(os.getpid()))
    Path(folder, "fault").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGSTOP)


def _record(folder: str, rank: int, calls: Callable[[], None]) -> None:
    try:
        calls()
    except BaseException as error:
        ending = {
            "type": type(error).__name__,
            "text": str(error),
            "seconds": time.monotonic() - float(Path(folder, "fault").read_text()),
        }
        Path(folder, f"ending {rank}").write_text(json.dumps(ending))
        # The run ends when all processes have; a stopped one never would.
        if len(list(Path(folder).glob("ending *"))) == dist.get_world_size() - 1:
            stopped = Path(folder, "stopped")
            if stopped.exists():
                os.kill(int(stopped.read_text()), signal.SIGKILL)
        raise


def _in_one_group(folder: str, culprit: int, fault: Callable[[str], None], limit_s: float) -> None:
    transport = DistributedTransport(timeout_s=limit_s)
    rank = dist.get_rank()

    def calls() -> None:
        _call(transport)
        _call(transport, (lambda: fault(folder)) if rank == culprit else None)
        _call(transport)

    _record(folder, rank, calls)


def _killed(folder: str) -> None:
    _in_one_group(folder, 1, _kill, _LONG_S)


def _stopped(folder: str) -> None:
    _in_one_group(folder, 1, _stop, _SHORT_S)


def _use_tcp_store(port: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)


def _store_host_killed(folder: str, port: int) -> None:
    _use_tcp_store(port)
    _in_one_group(folder, 0, _kill, _LONG_S)


def _store_host_stopped(folder: str, port: int) -> None:
    _use_tcp_store(port)
    _in_one_group(folder, 0, _stop, _SHORT_S)


def _killed_in_a_mesh(folder: str) -> None:
    """Rank 3 of a 2 x 2 mesh dies in a ring along (2, 3); the ring across (0, 2) learns of it."""
    rank = dist.get_rank()
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    along = DistributedTransport(rows[rank // 2], timeout_s=_LONG_S)
    across = DistributedTransport(columns[rank % 2], timeout_s=_LONG_S)

    def calls() -> None:
        for call in range(2):
            _call(along, (lambda: _kill(folder)) if call == 1 and rank == 3 else None)
            _call(across)

    _record(folder, rank, calls)


def _exits(folder: str) -> None:
    """Rank 1 fails in code of its own, between two calls."""
    transport = DistributedTransport(timeout_s=_LONG_S)
    rank = dist.get_rank()

    def calls() -> None:
        _call(transport)
        if rank == 1:
            Path(folder, "fault").write_text(str(time.monotonic()))
            raise SystemExit(3)
        _call(transport)

    _record(folder, rank, calls)


def _endings(
    folder: Path, function: Callable[..., None], num_ranks: int, *args: object
) -> dict[int, dict]:
    with pytest.raises(RuntimeError):
        run_processes(function, num_ranks, str(folder), *args)
    files = folder.glob("ending *")
    return {int(file.name.split()[1]): json.loads(file.read_text()) for file in files}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _assert_all_name(
    endings: dict[int, dict], survivors: set[int], start: str, within_s: float
) -> None:
    assert set(endings) == survivors
    for ending in endings.values():
        assert ending["type"] == "RankFailure"
        assert ending["text"].startswith(start)
        assert ending["seconds"] < within_s


def test_survivors_of_a_killed_rank_name_it(tmp_path: Path) -> None:
    # Rank 3 has no hop with rank 1 and sees its innocent neighbours close their connections first.
    endings = _endings(tmp_path, _killed, 4)
    _assert_all_name(endings, {0, 2, 3}, "rank 1 failed: its connection to rank ", _LONG_S / 2)
    for ending in endings.values():
        assert "broke in call " in ending["text"]
        assert "The process was killed, or exited without a report" in ending["text"]


def test_a_rank_that_exits_between_calls_is_named(tmp_path: Path) -> None:
    endings = _endings(tmp_path, _exits, 3)
    del endings[1]
    _assert_all_name(endings, {0, 2}, "rank 1 failed: its connection to rank ", _LONG_S / 2)


def test_a_stopped_process_is_named_without_a_report_of_its_own(tmp_path: Path) -> None:
    endings = _endings(tmp_path, _stopped, 3)
    _assert_all_name(endings, {0, 2}, "rank 1 failed: it holds up rank ", _LONG_S / 2)
    for ending in endings.values():
        assert "It has not reported what it does" in ending["text"]


def test_the_death_of_the_host_of_the_store_is_named(tmp_path: Path) -> None:
    endings = _endings(tmp_path, _store_host_killed, 3, _free_port())
    _assert_all_name(endings, {1, 2}, "rank 0 failed: its connection to rank ", _LONG_S / 2)
    for ending in endings.values():
        assert "The store of the group cannot be reached either" in ending["text"]


def test_a_store_that_blocks_does_not_block_the_ranks(tmp_path: Path) -> None:
    endings = _endings(tmp_path, _store_host_stopped, 3, _free_port())
    assert set(endings) == {1, 2}
    for ending in endings.values():
        assert ending["type"] == "RankFailure"
        assert ending["seconds"] < _LONG_S / 2
    assert endings[1]["text"].startswith("rank 0 failed: it holds up rank 1")
    assert "The store of the group did not answer in time" in endings[1]["text"]


def test_groups_that_share_ranks_name_the_rank_that_failed_first(tmp_path: Path) -> None:
    endings = _endings(tmp_path, _killed_in_a_mesh, 4)
    start = "rank 3 failed: its connection to rank "
    _assert_all_name(endings, {0, 1, 2}, start, _LONG_S / 2)
