"""What a rank raises when another one is missing; processes that really hang are in tests/cli."""

import pytest
import torch
import torch.distributed as dist
from dilated_models.training import ranks as module
from dilated_models.training.failures import RankLost
from dilated_models.training.ranks import Ranks

errors = pytest.importorskip("dilated_ring.transport.errors")


@pytest.mark.parametrize("reports", [False, True])
def test_a_failure_that_ring_found_first_names_the_rank_as_any_other(monkeypatch, reports):
    monkeypatch.setattr(module, "_ROLL_CALL_S", 0.1)
    ranks = Ranks(torch.device("cpu"), rank=0, size=2, store=dist.HashStore())
    if reports:
        Ranks(ranks.device, rank=1, size=2, store=ranks._store)._answer("ValueError: bad rows")
    expected = "rank 1 failed: ValueError: bad rows" if reports else "rank 1 does not answer"
    with pytest.raises(RankLost, match=f"rank 0 stops: {expected}"), ranks.naming_the_missing():
        raise errors.RankFailure(1, "it holds up rank 0.")


def test_a_rank_that_came_late_is_named_by_ring(monkeypatch):
    monkeypatch.setattr(module, "_ROLL_CALL_S", 0.1)
    ranks = Ranks(torch.device("cpu"), rank=0, size=2, store=dist.HashStore())
    Ranks(ranks.device, rank=1, size=2, store=ranks._store)._answer(None)
    with pytest.raises(RankLost, match="it holds up rank 0"), ranks.naming_the_missing():
        raise errors.RankFailure(1, "it holds up rank 0.")


def variables(patch: pytest.MonkeyPatch, **changes: str) -> None:
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (usual | changes).items():
        patch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("RANK", "x", "0 to 1"),
        ("RANK", "2", "0 to 1"),
        ("WORLD_SIZE", "0", "1 to "),
        ("WORLD_SIZE", "-1", "1 to "),
        ("MASTER_PORT", "99999", "0 to 65535"),
        ("LOCAL_RANK", "", "0 to "),
        ("TORCHELASTIC_RESTART_COUNT", "1.5", "0 to "),
    ],
)
def test_a_variable_with_a_wrong_value_is_named(monkeypatch, name, value, rule):
    variables(monkeypatch, **{name: value})
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    message = f"environment has {name}='{value}'; it must be an integer from {rule}"
    with pytest.raises(ValueError, match=message), module.joined("cpu"):
        pass


def test_processes_that_do_not_meet(monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise dist.DistNetworkError("The client socket has timed out")

    variables(monkeypatch, RANK="1")
    monkeypatch.setattr(module, "rendezvous", unreachable)
    message = r"rank 1 stops: it met no other process at 127\.0\.0\.1:29500 within 3 s; start all"
    with pytest.raises(RankLost, match=message), module.joined("cpu", timeout_s=3.0):
        pass


@pytest.mark.parametrize(("local", "machines"), [("2", 2), ("4", 1), ("3", 1)])
def test_the_number_of_machines(monkeypatch, local, machines):
    variables(monkeypatch, WORLD_SIZE="4", LOCAL_WORLD_SIZE=local)
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 4)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    with module.joined("cpu") as ranks:
        assert ranks.machines == machines
