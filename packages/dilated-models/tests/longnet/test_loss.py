"""LongNetLM.loss is cross-entropy of the logits, forward and backward."""

import itertools
from typing import Any

import dilated_core.cross_entropy as chunks
import pytest
import torch
from dilated_models import LongNetLM
from torch.nn.functional import cross_entropy

BOUNDS = [0, 0, 9, 10, 10, 30, 37, 37]  # documents of 0, 9, 1, 0, 20, 7 and 0 tokens


def make(**options: Any) -> LongNetLM:
    torch.manual_seed(0)
    numbers = {
        "num_tokens": 31,
        "d_model": 16,
        "nhead": 4,
        "num_decoder_layers": 2,
        "dim_feedforward": 24,
        "segment_lengths": [6, 16, 40],
        "dilation_rates": [1, 3, 4],
    }
    return LongNetLM(**numbers | options, dtype=torch.float64)


def results(loss: torch.Tensor, model: LongNetLM) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize(
    "options",
    [
        {"tie_embeddings": True},
        {"activation_checkpointing": True},
        {"num_encoder_layers": 1, "final_layer_norm": False},
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_cross_entropy_of_the_logits(monkeypatch, options, packed):
    monkeypatch.setattr(chunks, "chunk_tokens", lambda classes: 8)
    model = make(**options)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(31, (37,) if packed else (3, 37), generator=generator)
    bounds = torch.tensor(BOUNDS) if packed else None
    labels = torch.full_like(tokens, -100)
    for begin, end in itertools.pairwise(BOUNDS) if packed else [(0, 37)]:
        labels[..., begin : max(begin, end - 1)] = tokens[..., begin + 1 : end]
    logits = model(tokens, cu_seqlens=bounds).view(-1, 31)
    exact = results(cross_entropy(logits, labels.flatten()), model)
    actual = results(model.loss(tokens, cu_seqlens=bounds), model)
    torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-13)
    # Labels, a count, and other numbers for tokens that do not count.
    own = torch.where((labels == -100) | (tokens % 3 == 0), 30, labels)
    logits = model(tokens, cu_seqlens=bounds).view(-1, 31)
    total = cross_entropy(logits, own.flatten(), ignore_index=30, reduction="sum")
    actual = model.loss(tokens, own, cu_seqlens=bounds, ignore_index=30, count=99)
    torch.testing.assert_close(results(actual, model), results(total / 99, model))
    each = model.loss(tokens, cu_seqlens=bounds, reduction="none")
    assert each.shape == tokens.shape
    assert torch.equal(each == 0, labels == -100)


@pytest.mark.exhaustive
def test_it_compiles():
    tokens = torch.randint(31, (2, 37))
    model = make(tie_embeddings=True).float()
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        results(compiled(tokens), model), results(model.loss(tokens), model), rtol=1e-4, atol=1e-6
    )


def test_autocast_is_that_of_the_logits():
    tokens = torch.randint(31, (2, 37))
    model = make(tie_embeddings=True).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)[:, :-1].flatten(0, 1).float()
        assert torch.equal(model.loss(tokens), cross_entropy(logits, tokens[:, 1:].flatten()))


def test_over_ranks_labels_are_given():
    with pytest.raises(
        ValueError, match="labels is None, and sequences are spread over ranks; the next"
    ):
        make().loss(torch.zeros(1, 4, dtype=torch.int64), context_parallel=object())
