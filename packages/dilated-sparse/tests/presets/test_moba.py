"""MoBA against its definition, written position by position from the paper, in float64."""

import math

import pytest
import torch
from dilated_core.testing.error_budget import assert_within_budget, relative_error
from dilated_sparse import moba_attention, moba_attention_with_lse
from hypothesis import given, settings
from hypothesis import strategies as st


def definition(q, k, v, block_size: int, topk: int, scale: float) -> tuple:
    """Out and lse of arXiv 2502.13189, section 2.2, for `(S, H, D)`, differentiable.

    s_i = ⟨q, mean(K[I_i])⟩; −∞ for blocks of the future, and the current block is always chosen.
    Of equal scores the earlier block.
    """
    S, H, _ = q.shape
    k, v = (x.repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    starts = range(0, S, block_size)
    rows, lses = [], []
    for t in range(S):
        for h in range(H):
            own = t // block_size
            scores = [
                math.inf
                if i == own
                else float(q[t, h].detach() @ k[start : start + block_size, h].detach().mean(0))
                for i, start in enumerate(starts)
                if i <= own
            ]
            ranked = sorted(range(own + 1), key=lambda i: (-scores[i], i))[:topk]
            seen = [
                j
                for i in sorted(ranked)
                for j in range(i * block_size, min((i + 1) * block_size, t + 1))
            ]
            logits = scale * (k[seen, h] @ q[t, h])
            rows.append(logits.softmax(0) @ v[seen, h])
            lses.append(logits.logsumexp(0))
    return torch.stack(rows).view(q.shape), torch.stack(lses).view(S, H)


def leaves(S: int, H: int, K: int, *, B: int = 1, D: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, S, heads, D, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (H, K, K)
    ]


def upstream(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """A random gradient with the strides of a transposed tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape[::-1], generator=generator, dtype=x.dtype).permute(
        *reversed(range(x.dim()))
    )


def check(S: int, H: int, K: int, block_size: int, topk: int, B: int = 1, **options) -> None:
    tensors = leaves(S, H, K, B=B)
    out, lse = moba_attention_with_lse(*tensors, block_size, topk, **options)
    scale = options.get("scale") or 0.5
    rows = [definition(*(x[b] for x in tensors), block_size, topk, scale) for b in range(B)]
    expected, expected_lse = (torch.stack(x) for x in zip(*rows, strict=True))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad((out, lse), tensors, (upstream(out), upstream(lse)))
    exact = torch.autograd.grad((expected, expected_lse), tensors, (upstream(out), upstream(lse)))
    for got, wanted in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(
    S=st.integers(1, 27),
    groups=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    block_size=st.integers(1, 9),
    topk=st.integers(1, 6),
    B=st.integers(1, 2),
)
def test_is_the_definition_of_the_paper(S, groups, block_size, topk, B) -> None:
    check(S, *groups, block_size, topk, B)


def test_other_scales_and_backends() -> None:
    check(21, 2, 1, 4, 3, scale=-0.3)
    check(21, 2, 2, 4, 3, backend="eager")


def test_equal_scores_choose_the_earlier_block() -> None:
    q, k, v = (x.detach() for x in leaves(24, 2, 2))
    q, k = q.round(), torch.ones_like(k)  # every score is exactly the sum of the row of q
    out = moba_attention(q, k, v, 4, 3)
    expected = definition(q[0], k[0], v[0], 4, 3, 0.5)[0]
    torch.testing.assert_close(out[0], expected)
    torch.testing.assert_close(out[0, 20], torch.cat([v[0, :8], v[0, 20:21]]).mean(0))


def test_with_all_blocks_it_is_dense_causal_attention() -> None:
    q, k, v = (x.detach() for x in leaves(50, 4, 4, B=2))
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(moba_attention(q, k, v, 8, 7), dense)
    torch.testing.assert_close(moba_attention(q, k, v, 64, 1), dense)


def test_the_future_never_leaks() -> None:
    q, k, v = (x.detach() for x in leaves(40, 2, 2))
    before = moba_attention(q, k, v, 4, 3)
    for t in (0, 7, 8, 21, 39):
        later = [torch.cat([x[:, :t], torch.randn_like(x[:, t:]) * 9], 1) for x in (q, k, v)]
        after = moba_attention(*later, 4, 3)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after[:, t:], before[:, t:])
        # The last query of a prefix, as in decoding.
        prefix = moba_attention(*(x[:, : t + 1] for x in (q, k, v)), 4, 3)
        torch.testing.assert_close(prefix[:, t], before[:, t], rtol=1e-12, atol=1e-12)


def test_documents_and_padded_rows_are_as_alone() -> None:
    tensors = leaves(70, 4, 2)
    packed = [x[0] for x in tensors]
    spans = [(0, 9), (9, 10), (10, 47), (47, 70)]
    alone = torch.cat([moba_attention(*(x[a:b][None] for x in packed), 4, 3)[0] for a, b in spans])
    bounds = torch.tensor([0, 9, 9, 10, 47, 70], dtype=torch.int32)
    together = moba_attention(*packed, 4, 3, cu_seqlens=bounds)
    torch.testing.assert_close(together, alone)
    places = [(0, 9), (39, 40), (3, 40), (10, 33)]
    mask = torch.ones(4, 40, dtype=torch.bool)
    index = torch.zeros(4, 40, dtype=torch.int64)
    for row, (place, span) in enumerate(zip(places, spans, strict=True)):
        mask[row, slice(*place)] = False
        index[row, slice(*place)] = torch.arange(*span)
    padded = moba_attention(*(x[index] for x in packed), 4, 3, key_padding_mask=mask)
    torch.testing.assert_close(padded[~mask], alone)
    assert not padded[mask].any()
    dout = torch.randn_like(alone)
    expected = torch.autograd.grad(alone, tensors, dout, retain_graph=True)
    for result in (together, padded[~mask]):
        for a, b in zip(torch.autograd.grad(result, tensors, dout), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_within_the_error_budget(dtype: torch.dtype) -> None:
    """All blocks, so that rounding does not change the choice: dense attention's own error."""
    S, H = 200, 2
    tensors = [x.detach().to(dtype).requires_grad_() for x in leaves(S, H, H, D=16)]
    dout = torch.randn(1, S, H, 16).to(dtype)
    out = moba_attention(*tensors, 32, 9)
    actual = [out, *torch.autograd.grad(out, tensors, dout)]

    def dense(*x: torch.Tensor) -> torch.Tensor:
        x = tuple(y.transpose(1, 2) for y in x)
        return torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True).transpose(1, 2)

    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = dense(*wide)
    exact = [expected, *torch.autograd.grad(expected, wide, dout.double())]
    low = dense(*tensors)
    plain = [low, *torch.autograd.grad(low, tensors, dout)]
    budget = [relative_error(a, b) for a, b in zip(plain, exact, strict=True)]
    assert_within_budget(actual, exact, budget)


def test_dropout_follows_the_seed_and_backward_drops_what_forward_dropped() -> None:
    q, k, v = leaves(40, 2, 2)

    def drop(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return moba_attention(q, k, v, 4, 3, dropout_p=0.3)

    assert torch.equal(drop(1), drop(1))
    assert not torch.equal(drop(1), drop(2))
    out = drop(3)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    torch.testing.assert_close((dv * v).sum(), out.sum())


def test_no_array_of_all_pairs_is_made() -> None:
    """The largest tensor of a call is far below S·S numbers a head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    from dilated_core.backends.contract import AttentionOptions
    from dilated_core.backends.registry import get_backend
    from dilated_sparse.execution.sequences import spans_of
    from dilated_sparse.presets.choice import moba_choice
    from dilated_sparse.presets.chosen import Call, backward, forward

    S = 4096
    q, k, v = torch.randn(3, 1, S, 1, 8).unbind()
    call = Call(get_backend("sdpa"), 64, AttentionOptions(False, 0.3))
    with Largest() as largest:
        choice = moba_choice(q, k, 64, 3)
        out, lse = forward(call, q, k, v, choice, spans_of(1, S, None, None))
        backward(call, out, lse, q, k, v, out, lse, choice, spans_of(1, S, None, None))
    assert largest.numel <= S * S // 32, largest.numel


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "topk is 0", {"topk": 0}),
        (ValueError, "block_size is 0", {"block_size": 0}),
        (TypeError, "topk is 2.5", {"topk": 2.5}),
        (ValueError, "between visible ones", {"key_padding_mask": torch.arange(20)[None] == 7}),
        (
            ValueError,
            "both given",
            {"key_padding_mask": torch.zeros(1, 20) > 0, "cu_seqlens": torch.tensor([0, 20])},
        ),
        (ValueError, "dropout_p is 1", {"dropout_p": 1}),
    ],
)
def test_wrong_arguments_are_refused(error, message: str, options: dict) -> None:
    q = torch.randn(1, 20, 2, 8)
    with pytest.raises(error, match=message):
        moba_attention(q, q, q, **({"block_size": 4} | options))
