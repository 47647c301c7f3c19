"""The ring modules equal the oracle in one process, and refuse what they cannot honour."""

import copy
import logging
import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch
from dilated_core import DilatedAttention, DilatedPattern
from dilated_core.reference import reference_dilated_attention
from dilated_core.testing.cases import AWKWARD_CASES, Case, random_cases
from dilated_ring import (
    DistributedRingAttention,
    HilbertRingAttention,
    RingAttentionConfig,
    StandardRingAttention,
    create_ring_attention,
)
from dilated_ring.modules import ring as ring_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KINDS = ["standard", "distributed", "hilbert"]


def compare(case: Case, kind: str, **options: Any) -> None:
    """The result and every gradient against the oracle."""
    q, k, v, dout = case.tensors(dtype=torch.float64)
    call = case.options()
    exact = reference_dilated_attention(q, k, v, case.pattern, **call)
    want = torch.autograd.grad(exact, (q, k, v), dout)
    pattern = case.pattern
    ring = create_ring_attention(
        kind,
        segment_lengths=pattern.segment_lengths,
        dilation_rates=pattern.dilation_rates,
        head_offsets=pattern.head_offsets,
        padding=pattern.padding,
        scale=call.pop("scale"),
        backend="eager",
        **options,
    )
    out = ring(q, k, v, **call)
    got = torch.autograd.grad(out, (q, k, v), dout)
    for a, b in zip((out, *got), (exact, *want), strict=True):
        assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize("case", AWKWARD_CASES, ids=lambda case: case.name)
def test_awkward_cases(case: Case) -> None:
    number = AWKWARD_CASES.index(case)
    options: dict[str, Any] = {"ring_size": 1 + number % 4, "layout": "zigzag"}
    if number % 3 == 2:
        options["tile_size"] = 9 + number % 8
    compare(case, KINDS[number % 3], **options)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.differing_executors])
@given(
    case=random_cases(with_options=True),
    ring_size=st.integers(1, 5),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    exchange=st.sampled_from(["ring", "all_gather", "auto"]),
    tile_size=st.integers(8, 40),
)
def test_tiles_in_hilbert_order(
    case: Case, ring_size: int, layout: str, exchange: str, tile_size: int
) -> None:
    compare(
        case, "hilbert", ring_size=ring_size, layout=layout, exchange=exchange, tile_size=tile_size
    )


def test_both_forms_of_construction() -> None:
    config = RingAttentionConfig(segment_lengths=[8, 32], dilation_rates=[1, 4], ring_size=4)
    by_name = StandardRingAttention(segment_lengths=[8, 32], dilation_rates=[1, 4])
    assert by_name.config == RingAttentionConfig(segment_lengths=[8, 32], dilation_rates=[1, 4])
    assert StandardRingAttention(config).config == config
    assert create_ring_attention("standard", config=config).config == config
    given = create_ring_attention("standard", config=config, ring_size=2, dropout=0.5).config
    assert (given.ring_size, given.dropout, given.segment_lengths) == (2, 0.5, (8, 32))
    assert config.ring_size == 4
    assert create_ring_attention().config == RingAttentionConfig()
    for kind, expected in [
        ("auto", StandardRingAttention),
        ("standard", StandardRingAttention),
        ("distributed", DistributedRingAttention),
        ("hilbert", HilbertRingAttention),
    ]:
        assert type(create_ring_attention(kind, config=config)) is expected


def test_the_defaults_of_the_kinds() -> None:
    assert create_ring_attention("distributed").config.check_health is True
    assert create_ring_attention("distributed", check_health=False).config.check_health is False
    assert create_ring_attention("standard", check_health=True).config.check_health is True
    assert create_ring_attention("hilbert").config.tile_size == 2048
    assert create_ring_attention("hilbert", tile_size=64).config.tile_size == 64
    assert create_ring_attention("standard").config.tile_size is None


def test_one_process_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    ring_module._log_simulation.cache_clear()  # pyright: ignore[reportPrivateUsage]
    layers = [StandardRingAttention([8], [1], ring_size=8) for _ in range(2)]
    x = torch.randn(1, 20, 2, 4)
    with caplog.at_level(logging.INFO, logger="dilated_ring"):
        for ring in layers * 2:
            assert torch.allclose(ring(x, x, x), DilatedAttention([8], [1])(x, x, x), atol=1e-6)
    (record,) = caplog.records
    assert "ring_size is 8 and there is one process" in record.getMessage()
    assert repr(layers[0]).endswith("ring_size=8, in one process)")
    assert repr(StandardRingAttention([8], [1])).endswith("dilation_rates=[1])")


def test_dropout_acts_in_training_mode_only() -> None:
    x = torch.randn(1, 40, 4, 8)
    for kind in KINDS:
        ring = create_ring_attention(
            kind, segment_lengths=[16, 40], dilation_rates=[1, 2], dropout=0.5, ring_size=3
        )
        whole = DilatedAttention([16, 40], [1, 2])(x, x, x)
        assert not torch.allclose(ring(x, x, x), whole, atol=1e-3)
        torch.testing.assert_close(ring.eval()(x, x, x), whole)


def test_copies_and_pickles() -> None:
    x = torch.randn(1, 40, 4, 8)
    for kind in KINDS:
        ring = create_ring_attention(kind, segment_lengths=[16], dilation_rates=[2], ring_size=3)
        for other in (copy.deepcopy(ring), pickle.loads(pickle.dumps(ring))):
            assert other.config == ring.config
            assert torch.equal(other(x, x, x), ring(x, x, x))


class NoGroup:
    """Stands for a process group, which can be neither copied nor pickled."""

    def __deepcopy__(self, memo: Any) -> None:
        raise AssertionError("a group is copied")


def test_a_copy_shares_the_group_and_a_pickle_refuses_it() -> None:
    ring = StandardRingAttention([8], [1])
    ring.group = group = NoGroup()  # pyright: ignore[reportAttributeAccessIssue]
    assert copy.deepcopy(ring).group is group
    with pytest.raises(TypeError, match=r"process group, which exists only here.*state_dict"):
        pickle.dumps(ring)


def test_values_that_are_not_finite_are_named() -> None:
    ring = DistributedRingAttention([8, 32], [1, 4])
    q, k, v = torch.randn(3, 2, 40, 4, 8).unbind()
    k[0, 3, 1, :2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^k is not finite in 2 places on rank 0\. Every"):
        ring(q, k, v)
    # Masked keys may hold anything.
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, 3] = True
    assert ring(q, k, v, key_padding_mask=mask).isfinite().all()
    assert not StandardRingAttention([8, 32], [1, 4])(q, k, v).isfinite().all()
    large = torch.full((1, 8, 1, 4), 1e4, dtype=torch.float16)
    with pytest.raises(FloatingPointError, match="the output is not finite in 32 places on rank 0"):
        DistributedRingAttention([8], [1], scale=1e30)(large, large, large)
    with pytest.raises(TypeError, match="q is a str"):
        ring("q", v, v)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ring_size": 0}, ValueError, "ring_size is 0; it must be at least 1"),
        ({"ring_size": True}, TypeError, "ring_size is True; it must be an integer"),
        (
            {"layout": "zig"},
            ValueError,
            "layout is 'zig'; it must be one of 'contiguous', 'zigzag'",
        ),
        ({"exchange": "mail"}, ValueError, "exchange is 'mail'; it must be one of 'auto'"),
        ({"timeout_s": -1}, ValueError, "timeout_s is -1; it must be above 0"),
        ({"tile_size": 0}, ValueError, "tile_size is 0; it must be at least 1"),
        (
            {"tile_size": 8, "exchange": "all_to_all"},
            ValueError,
            "tile_size is 8 and exchange 'all",
        ),
        ({"check_health": 1}, TypeError, "check_health is 1; it must be True or False"),
        ({"max_workspace_bytes": 5}, ValueError, "max_workspace_bytes is 5; a ring has no such"),
        ({"is_causal": True}, TypeError, "no argument 'is_causal'; it is passed to forward"),
        ({"seq_len": 9}, TypeError, "no argument 'seq_len'; it is passed to forward"),
        ({"softmax_scale": 1.0}, TypeError, "it is called scale"),
        ({"use_hilbert": True}, TypeError, "no argument 'use_hilbert'; its arguments are"),
        ({"group": "cp"}, TypeError, "group is a str; it must be a ProcessGroup"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_ring_attention(segment_lengths=[8], dilation_rates=[1], **options)


def test_wrong_calls() -> None:
    x = torch.randn(1, 20, 2, 4)
    with pytest.raises(ValueError, match="kind is 'circle'; it must be one of 'auto', 'standard'"):
        create_ring_attention("circle")
    with pytest.raises(TypeError, match="config is a dict; it must be a RingAttentionConfig"):
        create_ring_attention(config={})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tile_size is 2048 and exchange 'all_to_all'"):
        create_ring_attention("hilbert", exchange="all_to_all")
    with pytest.raises(TypeError, match="forward has no argument 'dropout'; it is an option of"):
        create_ring_attention()(x, x, x, dropout=0.1)  # pyright: ignore
    with pytest.raises(TypeError, match="no argument 'seq_len'; its arguments"):
        create_ring_attention("distributed")(x, x, x, seq_len=20)
    with pytest.raises(ValueError, match="seq_len is 8 and q has 20 positions"):
        create_ring_attention(ring_size=2)(x, x, x, seq_len=8)


def test_every_option_acts() -> None:
    """None of them is read by nobody: each changes the call, or what the module checks."""
    config = RingAttentionConfig()
    call = config.call_options(is_training=True)
    beside = {"segment_lengths", "dilation_rates", "head_offsets", "padding"}  # the pattern
    of_the_module = {"ring_size", "timeout_s", "check_health", "max_workspace_bytes"}
    names = {field.name for field in fields(config)} - beside - of_the_module
    assert names == call.keys() - {"dropout_p"} | {"dropout"}
    assert config.pattern == DilatedPattern((2048, 4096, 8192), (1, 2, 4))
