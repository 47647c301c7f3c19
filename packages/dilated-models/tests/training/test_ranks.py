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
