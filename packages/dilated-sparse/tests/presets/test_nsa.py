"""NSA against its definition, written position by position from the paper, in float64."""

import math

import pytest
import torch
from dilated_sparse import NSASizes, native_sparse_attention
from hypothesis import given, settings
from hypothesis import strategies as st


def attend(q, k, v, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and the scores of one query `(D,)`; 0 without keys."""
    logits = scale * (k @ q)
    return (logits.softmax(0) @ v if len(k) else torch.zeros_like(q)), logits


def definition(q, compressed, selected, window, gates, sizes: NSASizes, scale: float):
    """Out of arXiv 2502.11089, section 3, for `(S, H, D)`, differentiable; gates None: mix lse."""
    (size, d, m, n, initial, local, w), (S, H, _) = sizes, q.shape
    K = compressed[0].shape[1]
    N = -(-S // m)
    result = []
    for t in range(S):
        # Eq. 7: blocks of l positions that end at or before t.
        visible = [i for i in range(compressed[0].shape[0]) if i * d + size - 1 <= t]
        for head in range(H):
            group = head // (H // K)
            kc, vc = (x[visible, group] for x in compressed)
            coarse, coarse_logits = attend(q[t, head], kc, vc, scale)
            # Eq. 8 to 10, with strides counted one by one.
            scores = [0.0] * N
            for other in range(group * (H // K), (group + 1) * (H // K)):
                p = attend(q[t, other], kc, vc, scale)[1].softmax(0).detach()
                for i in visible:
                    for stride in range(i, i + size // d):
                        scores[stride * d // m] += float(p[i])
            own = t // m
            for j in range(own + 1):
                if j < initial or j > own - local:
                    scores[j] = math.inf
            # Eq. 11 and 12. The own block is one of the n; of equal scores the earlier is first.
            scores[own] = math.inf
            chosen = sorted(range(own + 1), key=lambda j: (j != own, -scores[j], j))[:n]
            seen = [j for j in range(t + 1) if j // m in chosen]
            fine, fine_logits = attend(
                q[t, head], selected[0][seen, group], selected[1][seen, group], scale
            )
            near_keys = list(range(max(0, t - w + 1), t + 1))
            near, near_logits = attend(
                q[t, head], window[0][near_keys, group], window[1][near_keys, group], scale
            )
            if gates is None:
                p = torch.cat([coarse_logits, fine_logits, near_logits]).softmax(0)
                values = [vc, selected[1][seen, group], window[1][near_keys, group]]
                result.append(p @ torch.cat(values))
            else:
                parts = torch.stack([coarse, fine, near])
                result.append(gates[t, head] @ parts)
    return torch.stack(result).view(q.shape)


def leaves(S: int, H: int, K: int, sizes: NSASizes, B: int = 1) -> list[torch.Tensor]:
    C = sizes.num_compressed(S)
    generator = torch.Generator().manual_seed(S)
    shapes = [(B, S, H, 4), *[(B, C, K, 4)] * 2, *[(B, S, K, 4)] * 4]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def check(S: int, H: int, K: int, sizes: NSASizes, mix: str, B: int = 1) -> None:
    q, *rest = tensors = leaves(S, H, K, sizes, B)
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    gates = torch.rand(B, S, H, 3, dtype=torch.float64).requires_grad_() if mix == "gate" else None
    tensors = tensors if gates is None else [*tensors, gates]
    out = native_sparse_attention(q, *pairs, gates, sizes=sizes, mix=mix, scale=0.9)
    rows = [
        definition(
            q[b], *([x[b] for x in pair] for pair in pairs),
            None if gates is None else gates[b], sizes, 0.9,
        )
        for b in range(B)
    ]  # fmt: skip
    expected = torch.stack(rows)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    dout = torch.randn(4, H, S, B, dtype=torch.float64).permute(3, 2, 1, 0)
    for a, b in zip(
        torch.autograd.grad(out, tensors, dout),
        torch.autograd.grad(expected, tensors, dout, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(
            a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-10
        )


@settings(max_examples=25, deadline=None)
@given(
    S=st.integers(1, 40),
    groups=st.sampled_from([(1, 1), (4, 1), (4, 2)]),
    stride=st.integers(1, 3),
    compressed=st.integers(1, 3),
    selected=st.integers(0, 2),
    extra=st.integers(0, 2),
    initial=st.integers(0, 2),
    local=st.integers(1, 2),
    w=st.integers(1, 9),
    mix=st.sampled_from(["gate", "lse"]),
)
def test_is_the_definition_of_the_paper(
    S, groups, stride, compressed, selected, extra, initial, local, w, mix
) -> None:
    sizes = NSASizes(
        compressed * stride,
        stride,
        (compressed + selected) * stride,
        initial + local + extra,
        initial,
        local,
        w,
    )
    check(S, *groups, sizes, mix, B=1 + S % 2)


def test_gates_are_not_one_softmax_and_lse_is() -> None:
    """With all keys and values 1, the result is the sum of the weights."""
    sizes = NSASizes(4, 2, 4, 4, 1, 2, 4)
    S = 30
    q = torch.randn(1, S, 2, 4)
    ones = torch.ones(1, S, 2, 4)
    pooled = torch.ones(1, sizes.num_compressed(S), 2, 4)
    pairs = [(pooled, pooled), (ones, ones), (ones, ones)]
    whole = native_sparse_attention(q, *pairs, sizes=sizes, mix="lse")
    torch.testing.assert_close(whole, torch.ones_like(whole))
    gated = native_sparse_attention(q, *pairs, torch.ones(1, S, 2, 3), sizes=sizes)
    torch.testing.assert_close(gated[:, 10:], torch.full_like(gated[:, 10:], 3))


def test_the_defaults_are_those_of_the_paper() -> None:
    assert NSASizes().checked() == (32, 16, 64, 16, 1, 2, 512)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("the stride must divide it", {"compression_stride": 3}),
        ("must not be smaller", {"selection_block_size": 2}),
        ("at least 3", {"num_selected_blocks": 2}),
        ("window_size is 0", {"window_size": 0}),
    ],
)
def test_wrong_sizes_are_refused(message: str, change: dict) -> None:
    with pytest.raises(ValueError, match=message):
        NSASizes(4, 2, 4, 3)._replace(**change).checked()


def test_wrong_arguments_are_refused() -> None:
    sizes = NSASizes(4, 2, 4, 3)
    q = torch.randn(1, 20, 2, 4)
    pooled = torch.randn(1, 9, 2, 4)
    pairs = ((pooled, pooled), (q, q), (q, q))
    with pytest.raises(ValueError, match="gates are missing"):
        native_sparse_attention(q, *pairs, sizes=sizes)
    with pytest.raises(ValueError, match="gates are given"):
        native_sparse_attention(q, *pairs, torch.rand(1, 20, 2, 3), sizes=sizes, mix="lse")
    with pytest.raises(ValueError, match="gates have shape"):
        native_sparse_attention(q, *pairs, torch.rand(1, 20, 2, 2), sizes=sizes)
    with pytest.raises(ValueError, match="compressed keys have shape"):
        native_sparse_attention(q, (q, q), *pairs[1:], sizes=sizes, mix="lse")
    with pytest.raises(ValueError, match="mix is 'sum'"):
        native_sparse_attention(q, *pairs, sizes=sizes, mix="sum")
