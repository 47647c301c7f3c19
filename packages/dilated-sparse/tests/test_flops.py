"""`FlopCounterMode` counts the pairs that masks count one by one."""

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_sparse import (
    BlockPattern,
    block_sparse_attention,
    dilated_sparse,
    moba_attention,
    windowed_dilated_attention,
)
from dilated_sparse.windowed.pairs import windowed_pairs
from torch.utils.flop_counter import FlopCounterMode

B, S, H, D = 2, 45, 4, 8


def counted(call):
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def tensors(*rows, kv_heads=2):
    return [torch.randn(*rows, h, D, requires_grad=True) for h in (H, kv_heads, kv_heads)]


def causal(mask, is_causal):
    return mask.tril() if is_causal else mask


@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks(is_causal):
    pattern = BlockPattern.per_head(
        [dilated_sparse(6, sparsity_ratio=x, is_causal=is_causal) for x in (0.3, 0.6)]
    )
    mask = pattern.materialize(num_heads=H).repeat_interleave(8, 1).repeat_interleave(8, 2)
    pairs = B * int(causal(mask[:, :S, :S], is_causal).sum())
    q, k, v = tensors(B, S)
    forward, out = counted(
        lambda: block_sparse_attention(q, k, v, pattern, block_size=8, is_causal=is_causal)
    )
    assert forward == 4 * D * pairs
    backward, _ = counted(out.sum().backward)
    assert backward == 10 * D * pairs


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [1, 7, 100])
@pytest.mark.parametrize("overlap", ["once", "added"])
def test_windows(is_causal, window, overlap):
    pattern = DilatedPattern([8, 24], [1, 3], head_offsets="blocked")
    i = torch.arange(S)
    near = (i[:, None] - i).abs() < window
    seen = causal(near, is_causal).expand(H, S, S).int()
    for w, r in pattern.branches:
        alone = DilatedPattern([w], [r], head_offsets="blocked").materialize(S, H) > 0
        alone = alone & ~near if overlap == "once" else alone
        seen = seen + causal(alone, is_causal).int()
    found = windowed_pairs(pattern, window, S, H, is_causal=is_causal, overlap=overlap)
    assert found == int(seen.sum())


def test_operators_of_windows_and_choices_count_documents_one_by_one():
    bounds = torch.tensor([0, 20, 45])
    pattern = DilatedPattern([8, 24], [1, 3])
    q, k, v = tensors(S)
    forward, _ = counted(
        lambda: windowed_dilated_attention(
            q, k, v, pattern, window=7, is_causal=True, cu_seqlens=bounds
        )
    )
    lengths = (20, 25)
    pairs = sum(windowed_pairs(pattern, 7, length, H, is_causal=True) for length in lengths)
    assert forward == 4 * D * pairs
    forward, out = counted(lambda: moba_attention(q, k, v, 8, 3, cu_seqlens=bounds))
    seen = sum(t % 8 + 1 + 8 * min(2, t // 8) for length in lengths for t in range(length))
    scores = 2 * H * D * sum(length * (length // 8) for length in lengths)
    assert forward == 4 * D * H * seen + scores
    assert counted(out.sum().backward)[0] == 10 * D * H * seen
