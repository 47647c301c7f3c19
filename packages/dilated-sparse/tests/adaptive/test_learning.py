"""The exact mass of blocks, the loss that teaches it, and the bias, beside dense attention."""

import pytest
import torch
from dilated_core import AttentionOutput
from dilated_sparse import AdaptiveSparseAttention, BlockSelection
from dilated_sparse.adaptive.bias import biased_attention
from dilated_sparse.adaptive.learning import (
    Columns,
    block_mass,
    distillation_loss,
    kept_and_random,
)
from dilated_sparse.adaptive.ops import attend_selected


def tensors(S: int, B: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(S)
    return [torch.randn(B, S, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]


def dense_mass(q, k, size: int, *, is_causal: bool, hidden: torch.Tensor) -> torch.Tensor:
    """`(B, K, N, N)` from all probabilities."""
    B, S, H, _ = q.shape
    scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(2, 2)) * 0.5
    seen = ~hidden[:, None, None].expand(B, H, S, S)
    seen = seen.tril() if is_causal else seen
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    p = p * ~hidden[:, None, :, None]
    N = -(-S // size)
    p = torch.nn.functional.pad(p, (0, N * size - S, 0, N * size - S))
    p = p.view(B, 2, 2, N, size, N, size).sum((2, 4, 6))
    number = torch.nn.functional.pad(~hidden, (0, N * size - S)).view(B, N, size).sum(2)
    return p / (2 * number.clamp_min(1))[:, None, :, None]


@pytest.mark.parametrize("strip", [1, 2**22])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("S", [1, 22, 24])
def test_the_mass_of_blocks_is_that_of_all_probabilities(
    S: int, is_causal: bool, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dilated_sparse.adaptive.learning._STRIP", strip)
    q, k, _ = tensors(S)
    hidden = torch.rand(2, S) < 0.3
    options = {"block_size": 4, "scale": 0.5, "is_causal": is_causal}
    mass = block_mass(q, k, hidden=hidden, **options)
    exact = dense_mass(q, k, 4, is_causal=is_causal, hidden=hidden)
    torch.testing.assert_close(mass, exact)
    N = mass.shape[-1]
    order = torch.rand(2, 2, N, N).argsort(-1)
    columns = Columns(order, torch.zeros(2, 2, N, N))
    some = block_mass(q, k, hidden=hidden, columns=columns, **options)
    torch.testing.assert_close(some, exact.gather(-1, order))


def test_the_loss_is_the_divergence_of_rows_that_have_mass() -> None:
    scores, mass = torch.randn(3, 5).double(), torch.rand(3, 5).double()
    mass[0, 2:] = 0
    mass[2] = 0
    total, rows = distillation_loss(scores, mass)
    expected = 0.0
    for i, n in ((0, 2), (1, 5)):
        target = mass[i, :n] / mass[i, :n].sum()
        estimate = scores[i, :n].log_softmax(-1)
        expected += (target * (target.log() - estimate)).sum()
    torch.testing.assert_close(total, expected)
    assert int(rows) == 2


@pytest.mark.parametrize("is_causal", [False, True])
def test_kept_and_all_the_others_are_all_blocks(is_causal: bool) -> None:
    q, k, _ = tensors(70)
    attentions = [
        AdaptiveSparseAttention(
            num_heads=4, head_dim=8, num_kv_heads=2, topk=4, block_size=8, distillation=kind,
            num_random=99,
        )
        for kind in ("all", "kept")
    ]  # fmt: skip
    attentions[1].load_state_dict(attentions[0].state_dict())
    losses = [x.distillation_loss(q, k, is_causal) for x in attentions]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-7)
    for a, b in zip(*(list(x.parameters()) for x in attentions), strict=True):
        grads = [
            torch.autograd.grad(loss, x, retain_graph=True)[0]
            for loss, x in zip(losses, (a, b), strict=True)
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_random_blocks_stand_for_all_they_were_drawn_from() -> None:
    kept = torch.rand(1, 1, 12, 12) < 0.3
    kept |= torch.eye(12, dtype=torch.bool)
    there = torch.ones_like(kept)
    values = torch.rand(1, 1, 12, 12)
    total = torch.zeros(1, 1, 12)
    for _ in range(2000):
        columns = kept_and_random(kept, there, 2, torch.rand(kept.shape))
        part = values.gather(-1, columns.indices.clamp_min(0)) * columns.log_weights.exp()
        total += part.masked_fill(columns.indices < 0, 0).sum(-1) / 2000
    torch.testing.assert_close(total, values.sum(-1), rtol=0.1, atol=0)
    for row, indices in zip(kept[0, 0], columns.indices[0, 0], strict=True):
        chosen = indices[indices >= 0].tolist()
        assert len(set(chosen)) == len(chosen)
        assert set(row.nonzero().flatten().tolist()) <= set(chosen)


def test_backward_of_the_output_teaches_the_gate_alone() -> None:
    q, k, v = (x.float().requires_grad_() for x in tensors(70))
    attention = AdaptiveSparseAttention(
        num_heads=4, head_dim=8, num_kv_heads=2, block_size=8, distillation="all",
        distillation_weight=3.0,
    )  # fmt: skip
    out = attention(q, k, v, is_causal=True)
    leaves = [q, k, v, *attention.parameters()]
    grads = torch.autograd.grad(out.sum(), leaves)
    loss = attention.distillation_loss(q, k, is_causal=True)
    assert torch.autograd.grad(loss, [q, k], allow_unused=True, retain_graph=True) == (None, None)
    expected = torch.autograd.grad(loss * 3, list(attention.parameters()))
    torch.testing.assert_close(grads[3:], expected)
    plain = torch.autograd.grad(attention.eval()(q, k, v, is_causal=True).sum(), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(grads[:3], plain, strict=True))


@pytest.mark.parametrize("distillation", ["all", "kept"])
def test_the_gate_learns_the_mass(distillation) -> None:
    q, k, _ = (x.float() * 2 for x in tensors(160, B=1))
    torch.manual_seed(0)
    attention = AdaptiveSparseAttention(
        num_heads=4, head_dim=8, num_kv_heads=2, block_size=8, topk=5, distillation=distillation
    )
    mass = block_mass(q, k, block_size=8, scale=8**-0.5, is_causal=True)

    def held() -> float:
        kept = attention.select(q, k, is_causal=True).materialize()
        return float((mass * kept).sum(-1).mean())

    before = held()
    optimizer = torch.optim.Adam(attention.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        attention.distillation_loss(q, k, is_causal=True).backward()
        optimizer.step()
    assert held() > before + 0.02


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("S", [23, 24])
def test_a_bias_of_blocks_is_one_softmax_over_biased_scores(S: int, is_causal: bool) -> None:
    q, k, v = leaves = [x.requires_grad_() for x in tensors(S)]
    N = -(-S // 4)
    blocks = (torch.rand(2, 2, N, N) < 0.5) | torch.eye(N, dtype=torch.bool)
    blocks = blocks.tril() if is_causal else blocks
    selection = BlockSelection.from_mask(blocks)
    gains = torch.randn(2, 2, N, N, dtype=torch.float64, requires_grad=True)

    def over(part: BlockSelection, causal: bool) -> AttentionOutput:
        return attend_selected(q, k, v, part, block_size=4, is_causal=causal, scale=0.5)

    listed = gains.gather(-1, selection.block_indices.long().clamp_min(0))
    out, lse = biased_attention(over, selection, listed, S, 4, 2, is_causal=is_causal)
    bias = gains * (1 - torch.eye(N)) if is_causal else gains
    wide = [x.repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :S, :S]
            for x in (bias, blocks)]  # fmt: skip
    seen = wide[1].tril() if is_causal else wide[1]
    scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(2, 2)) * 0.5 + wide[0]
    scores = scores.masked_fill(~seen, -torch.inf)
    expected = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1).transpose(1, 2))
    dout = torch.randn_like(out)
    grads = [torch.autograd.grad(x, [*leaves, gains], dout) for x in (out, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_before_training_the_bias_is_0() -> None:
    q, k, v = (x.float() for x in tensors(50))
    plain = AdaptiveSparseAttention(num_heads=4, head_dim=8, num_kv_heads=2, block_size=8, topk=4)
    biased = AdaptiveSparseAttention(
        num_heads=4, head_dim=8, num_kv_heads=2, block_size=8, topk=4, gate_gradient="bias"
    )
    for is_causal in (False, True):
        torch.testing.assert_close(plain(q, k, v, is_causal), biased(q, k, v, is_causal))


def test_no_array_of_all_pairs_of_positions() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.numel())
            return out

    S = 4096
    q = torch.randn(1, S, 1, 4)
    with Largest() as largest:
        block_mass(q, q, block_size=64, scale=0.5, is_causal=True)
    assert largest.numbers <= 2**22 < S * S


@pytest.mark.parametrize(("is_causal", "lookahead"), [(True, False), (True, True), (False, False)])
def test_gradients_of_the_loss_are_its_slopes(is_causal: bool, lookahead: bool) -> None:
    q, k, _ = (x * 2 for x in tensors(64, B=1))
    attention = AdaptiveSparseAttention(
        num_heads=4, head_dim=8, num_kv_heads=2, block_size=8, sub_block_size=4,
        lookahead=lookahead, distillation="all", dtype=torch.float64,
    )  # fmt: skip
    for weight in attention.parameters():
        weight.data += torch.randn_like(weight) * 0.1
    loss = attention.distillation_loss(q, k, is_causal)
    parameters = list(attention.parameters())
    for weight, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        start, step = weight.data.clone(), torch.randn_like(weight)
        ends = []
        for sign in (1, -1):
            weight.data = start + sign * 1e-6 * step
            ends.append(float(attention.distillation_loss(q, k, is_causal).detach()))
        weight.data = start
        slope = (ends[0] - ends[1]) / 2e-6
        assert float((grad * step).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)
