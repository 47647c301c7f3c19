"""Block-sparse ring modules: their blocks, factories, options and weights."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dilated_core import (
    DilatedAttentionConfig,
    DilatedPattern,
    create_dilated_attention,
    create_multihead_dilated_attention,
)
from dilated_core.testing.processes import run_processes
from dilated_ring import (
    RingAttentionConfig,
    RingBlockSparseAttention,
    RingBlockSparseConfig,
    RingBlockSparseMultiheadAttention,
    RingMultiheadDilatedAttention,
    create_ring_attention,
    shard_sequence,
)
from dilated_sparse import (
    BlockSparseAttention,
    BlockSparseMultiheadAttention,
    SparsePatternConfig,
    block_sparse_attention,
    from_dilated,
    local_window,
)

BLOCKS = SparsePatternConfig(pattern_type="global_local", sparsity_ratio=0.3, block_size=8)


def test_a_pattern_and_what_builds_one() -> None:
    q, k, v = torch.randn(3, 2, 70, 4, 8).unbind()
    window = local_window(9, window=1)
    for ring_size in (1, 3):
        ring = RingBlockSparseAttention(window, 8, ring_size=ring_size, layout="zigzag")
        want = block_sparse_attention(q, k, v, window, 8, is_causal=True)
        torch.testing.assert_close(ring(q, k, v, is_causal=True), want)
        ring = RingBlockSparseAttention(block_pattern=BLOCKS, ring_size=ring_size)
        one = BlockSparseAttention(pattern_type="global_local", sparsity_ratio=0.3, block_size=8)
        for is_causal in (False, True):
            want = one(q, k, v, is_causal)
            torch.testing.assert_close(ring(q, k, v, is_causal), want)


def test_branches_stand_for_the_blocks_that_they_touch() -> None:
    q, k, v = torch.randn(3, 1, 50, 4, 8).unbind()
    config = RingAttentionConfig(segment_lengths=[8, 40], dilation_rates=[1, 9], ring_size=4)
    ring = create_ring_attention("block_sparse", config=config, block_size=4)
    assert type(ring) is RingBlockSparseAttention
    pattern = from_dilated(DilatedPattern([8, 40], [1, 9]), 50, 4, num_heads=4)
    assert pattern.num_heads == 4
    want = block_sparse_attention(q, k, v, pattern, 4)
    torch.testing.assert_close(ring(q, k, v), want)
    # Heads 2 and 3 of 4.
    some = create_ring_attention("block_sparse", config=config, block_size=4, head_range=(2, 4))
    got = some(*(x[:, :, 2:] for x in (q, k, v)))
    torch.testing.assert_close(got, want[:, :, 2:])


def test_names_of_the_factories() -> None:
    options: dict[str, Any] = {"block_pattern": BLOCKS, "ring_size": 2}
    ring = create_dilated_attention("ring_block_sparse", **options)
    assert type(ring) is RingBlockSparseAttention
    mha = create_multihead_dilated_attention(
        "ring_block_sparse", embed_dim=16, num_heads=2, **options
    )
    assert type(mha) is RingBlockSparseMultiheadAttention
    assert type(mha.attention) is RingBlockSparseAttention
    assert mha.attention.config.block_pattern == BLOCKS
    x = torch.randn(1, 40, 16)
    assert mha(x, x, x, is_causal=True).shape == x.shape
    # As the other names are called: by branches.
    branches = DilatedAttentionConfig(segment_lengths=[8, 16], dilation_rates=[1, 2])
    by_branches = create_multihead_dilated_attention(
        "ring_block_sparse", embed_dim=16, num_heads=2, attention_config=branches
    )
    assert by_branches.attention.config.segment_lengths == (8, 16)
    kind = RingMultiheadDilatedAttention(
        16, 2, segment_lengths=[8], dilation_rates=[1], kind="block_sparse"
    )
    assert type(kind.attention) is RingBlockSparseAttention


def multihead(layout: Any) -> float:
    """Distance of results and of summed gradients from one device with the same weights."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_kv_heads": 2, "dtype": torch.float64}
    one = BlockSparseMultiheadAttention(
        24, 6, pattern_type="global_local", sparsity_ratio=0.3, block_size=8, **options
    )
    ring = RingBlockSparseMultiheadAttention(
        24, 6, block_pattern=BLOCKS, layout=layout, check_health=True, **options
    )
    ring.load_state_dict(one.state_dict())
    x, weight = torch.randn(2, 2, 67, 24, dtype=torch.float64).unbind()
    want = one(x, x, x, is_causal=True)
    exact = torch.autograd.grad((want * weight).sum(), list(one.parameters()))
    mine, factor = (shard_sequence(t, 1, layout=layout) for t in (x, weight))
    got = ring(mine, mine, mine, is_causal=True)
    grads = torch.autograd.grad((got * factor).sum(), list(ring.parameters()))
    errors = [float((got - shard_sequence(want, 1, layout=layout)).detach().abs().max())]
    for grad, expected in zip(grads, exact, strict=True):
        dist.all_reduce(grad)
        errors.append(float((grad - expected).abs().max()))
    return max(errors)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_multihead_over_ranks_has_the_weights_of_one_device(layout: str) -> None:
    assert max(run_processes(multihead, 2, layout)) < 1e-9


def test_dropout_acts_in_training_mode_only_and_copies_are_alike() -> None:
    x = torch.randn(1, 40, 2, 8)
    ring = RingBlockSparseAttention(BLOCKS, ring_size=3, dropout=0.5)
    plain = RingBlockSparseAttention(BLOCKS, ring_size=3)(x, x, x)
    assert not torch.allclose(ring(x, x, x), plain, atol=1e-3)
    ring.eval()
    for other in (ring, copy.deepcopy(ring), pickle.loads(pickle.dumps(ring))):
        torch.testing.assert_close(other(x, x, x), plain)
    assert repr(ring).startswith("RingBlockSparseAttention(block_pattern=SparsePatternConfig(")
    by_branches = RingBlockSparseAttention(segment_lengths=[8], dilation_rates=[1], ring_size=2)
    shown = "segment_lengths=[8], dilation_rates=[1], ring_size=2, in one process"
    assert repr(by_branches) == f"RingBlockSparseAttention({shown})"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_pattern": "window"}, TypeError, "pattern is a str; it must be"),
        ({"block_pattern": BLOCKS, "block_size": 4}, ValueError, "is for blocks of 8"),
        ({"block_size": 0}, ValueError, "block_size is 0; it must be at least 1"),
        ({"block_pattern": BLOCKS, "segment_lengths": [8]}, ValueError, "segment_lengths"),
        (
            {"block_pattern": BLOCKS, "head_offsets": "blocked"},
            ValueError,
            "head_offsets is 'blocked' and block_pattern is given",
        ),
        ({"tile_size": 8}, ValueError, "tile_size is 8; a pattern of blocks has tiles of its own"),
        ({"padding": "attended"}, ValueError, "padding is 'attended'; block-sparse attention"),
        ({"pattern": BLOCKS}, TypeError, "no argument 'pattern'"),
        ({"sparsity_ratio": 0.1}, TypeError, "no argument 'sparsity_ratio'"),
        ({"is_causal": True}, TypeError, "no argument 'is_causal'; it is passed to forward"),
        ({"exchange": "mail"}, ValueError, "exchange is 'mail'"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create_ring_attention("block_sparse", **options)


def test_configs_of_other_kinds() -> None:
    config = RingBlockSparseConfig(block_pattern=BLOCKS)
    with pytest.raises(TypeError, match="config is a RingBlockSparseConfig; it must be a RingAtt"):
        create_ring_attention("standard", config=config)
    with pytest.raises(TypeError, match="config is a dict; it must be a RingBlockSparseConfig"):
        create_ring_attention("block_sparse", config={})  # pyright: ignore
    assert create_ring_attention("block_sparse", config=config).config == config
    x = torch.randn(1, 8, 1, 4)
    with pytest.raises(TypeError, match="forward has no argument 'dropout'"):
        RingBlockSparseAttention(config)(x, x, x, dropout=0.1)  # pyright: ignore
