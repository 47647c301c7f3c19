"""Conformance tests of parts of an attention: k and v with other rows than q, hops, heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from dilated_core.backends.contract import AttentionBackend, AttentionInputs, AttentionOptions
from dilated_core.backends.registry import get_backend
from dilated_core.merge import empty_partial
from dilated_core.pattern.branches import DilatedPattern
from dilated_core.reference import reference_dilated_attention_with_lse
from dilated_core.strips.attend import attend_, differentiate_
from dilated_core.strips.plan import Problem, Span, plan_problems
from dilated_core.testing.cases import Case, random_cases
from dilated_core.testing.error_budget import relative_error
from dilated_core.testing.suite import BackendSuite

# Rows of q and of k.
_RECTANGLES = ((3, 20), (20, 3), (7, 1), (1, 9), (40, 70))


class _Hop(NamedTuple):
    """The keys of one shard, at the positions `rows`, and the problems of the queries with them."""

    rows: slice
    problems: tuple[Problem, ...]
    k: torch.Tensor
    v: torch.Tensor
    options: AttentionOptions


class Parts(BackendSuite):
    """Part of `BackendConformance`."""

    @pytest.mark.parametrize(("num_queries", "num_keys"), _RECTANGLES)
    def test_rectangles(self, num_queries: int, num_keys: int) -> None:
        """Forward and backward for M ≠ N are those of dense attention, or are refused."""
        dtype, bound = self._sharpest()
        backend = get_backend(self.backend)
        for num_kv_heads, is_masked, scale in ((4, False, 0.3), (2, True, -0.3), (1, False, -0.3)):
            q, k, v, dout = self._rectangle(num_queries, num_keys, num_kv_heads, dtype)
            hidden = _hidden(k) if is_masked else None
            options = AttentionOptions(False, scale, key_padding_mask=hidden)
            if self._refuses_mask(q, num_kv_heads) and is_masked:
                continue
            if self._rectangular_reasons(q, num_kv_heads):
                _assert_refused(backend, q, k, v, dout, options)
                continue
            exact_out, exact_lse = _dense(q, k, v, scale, hidden)
            with torch.no_grad():
                out, lse = backend.forward(q, k, v, options)
                sees = lse.masked_fill(lse == -torch.inf, torch.inf)
                got = backend.backward(dout, q, k, v, out, sees, options)
                delta = (dout.to(lse.dtype) * out).sum(-1)
                again = backend.backward(dout, q, k, v, out, sees, options, delta=delta)
            want = torch.autograd.grad(exact_out, (q, k, v), dout.double())
            assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
            assert relative_error(out, exact_out) <= bound
            assert relative_error(lse.nan_to_num(neginf=0), exact_lse.nan_to_num(neginf=0)) <= bound
            for a, b, e in zip(got, again, want, strict=True):
                assert _error(a, e) <= bound
                assert _error(b, a) <= bound

    def test_three_shards(self) -> None:
        """A causal query sees the shards before its own in full, its own causally, later ones not.

        The shards have no equal length, and the segments do not end where shards do.
        """
        pattern, spans = DilatedPattern([20], [1]), (Span(0, 5), Span(5, 7), Span(7, 20))
        for i, queries in enumerate(spans):
            for j, keys in enumerate(spans):
                plan = plan_problems(
                    pattern, queries=queries, keys=keys, seq_len=20, num_heads=2, is_causal=True
                )
                assert [problem.is_causal for problem in plan] == [i == j] * (i >= j)
        for is_causal in (False, True):
            case = Case(seq_len=20, batch_size=2, pattern=pattern, is_causal=is_causal)
            self._compare_hops(case, [5, 7], (2, 0, 1))
            attended = DilatedPattern([6, 20], [1, 3], padding="attended")
            case = Case(seq_len=20, pattern=attended, is_causal=is_causal, num_kv_heads=2)
            self._compare_hops(case, [1, 13], (1, 2, 0))

    @settings(
        deadline=None, max_examples=40, suppress_health_check=[HealthCheck.differing_executors]
    )
    @given(
        case=random_cases(max_seq_len=40, max_heads=6, max_branches=3, with_options=True).filter(
            lambda case: not case.documents
        ),
        cuts=st.lists(st.floats(0, 1), min_size=2, max_size=2),
        order=st.permutations(range(3)),
    )
    def test_hops(self, case: Case, cuts: list[float], order: list[int]) -> None:
        """Any three shards, whose keys reach the queries in any order, give the whole."""
        self._compare_hops(case, sorted(round(cut * case.seq_len) for cut in cuts), order)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_ranges_of_heads(self, is_causal: bool) -> None:
        """Some of the heads, with their range, give what they give among all heads."""
        dtype, bound = self._sharpest()
        head_offsets = "blocked" if is_causal else "interleaved"
        pattern = DilatedPattern([10, 24], [2, 3], head_offsets=head_offsets, padding="attended")
        case = Case(seq_len=30, num_heads=6, num_kv_heads=3, pattern=pattern, is_causal=is_causal)
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        exact, exact_lse = reference_dilated_attention_with_lse(
            q, k, v, pattern, is_causal=is_causal
        )
        want = torch.autograd.grad(exact, (q, k, v), dout.double())
        for first, stop in ((0, 2), (2, 3)):
            heads, kv_heads = slice(2 * first, 2 * stop), slice(first, stop)
            some = [q[:, :, heads], k[:, :, kv_heads], v[:, :, kv_heads]]
            out, lse = self._attend(case, *some, head_range=(2 * first, 6))
            assert relative_error(out, exact[:, :, heads]) <= bound
            sees = exact_lse[:, :, heads] > -torch.inf
            assert relative_error(lse[sees], exact_lse[:, :, heads][sees]) <= bound
            got = torch.autograd.grad(out, some, dout[:, :, heads])
            for a, e, part in zip(got, want, (heads, kv_heads, kv_heads), strict=True):
                assert _error(a, e[:, :, part]) <= bound

    def _compare_hops(self, case: Case, cuts: list[int], order: Sequence[int]) -> None:
        """Attend and differentiate shard by shard, as the ranks of a ring do, against the whole."""
        dtype, bound = self._sharpest()
        backend, pattern, S = get_backend(self.backend), case.pattern, case.seq_len
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        call = case.options(device=self.device)
        mask, scale = call["key_padding_mask"], call["scale"]
        if reasons := self._rectangular_reasons(q, k.shape[2]):
            pytest.skip(" ".join(reasons))
        if mask is not None and self._refuses_mask(q, k.shape[2]):
            reject()
        exact_out, exact_lse = reference_dilated_attention_with_lse(q, k, v, pattern, **call)
        sees = exact_lse > -torch.inf
        dlse = torch.linspace(-1, 1, sees.numel(), dtype=dtype, device=q.device).view(sees.shape)
        dlse = dlse.masked_fill(~sees, 0)
        want = torch.autograd.grad(
            (exact_out, exact_lse[sees]), (q, k, v), (dout.double(), dlse[sees].double())
        )
        D = q.shape[-1]
        q, k, v, dout = (
            torch.nn.functional.pad(x.detach(), (0, -D % self.multiple)) for x in (q, k, v, dout)
        )
        scale = D**-0.5 if scale is None else scale
        spans = [Span(a, b) for a, b in pairwise([0, *cuts, S])]
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for span in spans:
            rows = slice(span.start, span.stop)
            mine, mine_dout, mine_dlse = (x[:, rows].contiguous() for x in (q, dout, dlse))
            into = empty_partial(mine.shape, dtype=dtype, device=q.device)
            hops: list[_Hop] = []
            for keys in (spans[i] for i in order):
                theirs = slice(keys.start, keys.stop)
                problems = plan_problems(
                    pattern, queries=span, keys=keys, seq_len=S, num_heads=case.num_heads,
                    num_kv_heads=k.shape[2], batch_size=case.batch_size, is_causal=case.is_causal,
                    is_batch_dense=True,
                )  # fmt: skip
                hidden = None if mask is None else mask[:, theirs]
                options = AttentionOptions(case.is_causal, scale, key_padding_mask=hidden)
                hop = _Hop(theirs, problems, k[:, theirs].clone(), v[:, theirs].clone(), options)
                attend_(into, problems, mine, hop.k, hop.v, options, backend=backend)
                hops.append(hop)
            empty = ~sees[:, rows]
            assert relative_error(into.out[..., :D], exact_out[:, rows]) <= bound
            assert torch.equal(into.lse == -torch.inf, empty)
            assert relative_error(into.lse[~empty], exact_lse[:, rows][~empty]) <= bound
            out, lse = into.out.to(dtype), into.lse
            delta = (mine_dout.to(lse.dtype) * out).sum(-1)
            for theirs, problems, their_k, their_v, options in hops:
                parts = torch.zeros_like(mine), torch.zeros_like(their_k), torch.zeros_like(their_v)
                differentiate_(
                    parts, problems, mine_dout, mine, their_k, their_v, out, lse, options,
                    backend=backend, delta=delta, dlse=mine_dlse.to(lse.dtype),
                )  # fmt: skip
                for grad, part, where in zip(grads, parts, (rows, theirs, theirs), strict=True):
                    grad[:, where] += part
        for a, e in zip(grads, want, strict=True):
            assert _error(a[..., :D], e) <= bound

    def _rectangle(
        self, num_queries: int, num_keys: int, num_kv_heads: int, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """q, k, v and dout, each a part of a larger tensor, so that their strides differ."""
        case = Case(
            seq_len=max(num_queries, num_keys) + 2, batch_size=2, head_dim=16,
            num_kv_heads=num_kv_heads, pattern=DilatedPattern([8], [1]),
        )  # fmt: skip
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        M, N = slice(1, 1 + num_queries), slice(2, 2 + num_keys)
        return [q[:, M], k[:, N], v[:, N], dout[:, M]]

    def _rectangular_reasons(
        self, q: torch.Tensor, num_kv_heads: int, *, has_mask: bool = False
    ) -> list[str]:
        """Why the backend refuses rectangles, if it does."""
        inputs = AttentionInputs(
            *(q.device, q.dtype, q.shape[2], -(-q.shape[3] // self.multiple) * self.multiple),
            num_kv_heads=num_kv_heads, is_rectangular=True, has_key_padding_mask=has_mask,
        )  # fmt: skip
        return get_backend(self.backend).why_not(inputs)

    def _refuses_mask(self, q: torch.Tensor, num_kv_heads: int) -> bool:
        reasons = self._rectangular_reasons(q, num_kv_heads, has_mask=True)
        return self.may_refuse and len(reasons) > len(self._rectangular_reasons(q, num_kv_heads))


def _assert_refused(
    backend: AttentionBackend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    options: AttentionOptions,
) -> None:
    """A direct call raises, instead of reading rows that k does not have."""
    message = f"{q.shape[1]}.*{k.shape[1]}|{k.shape[1]}.*{q.shape[1]}"
    with torch.no_grad():
        with pytest.raises(ValueError, match=message):
            backend.forward(q, k, v, options)
        with pytest.raises(ValueError, match=message):
            backend.backward(dout, q, k, v, q, q[..., 0].float(), options)


def _hidden(k: torch.Tensor) -> torch.Tensor:
    """A mask `(B, N, H_kv)` for keys k: some of them, and all of the last head."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(k.shape[:3], generator=generator) < 0.3
    hidden[:, :, -1] = True
    return hidden.to(k.device)


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float64, differentiable: out `(B, M, H, D)`, lse `(B, M, H)`."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.double(), k)
    weights = scores.exp()
    if hidden is not None:
        weights = weights * ~hidden.repeat_interleave(group, 2).transpose(1, 2)[:, :, None, :]
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.where(total > 0, 1.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), total.detach().log()[..., 0].mT


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the exact tensor, and absolute where that is below 1.

    Gradients of a softmax over one key are 0, of which no error is a small part.
    """
    if exact.numel() == 0:
        return 0.0
    return float((got.double() - exact.double()).abs().max() / exact.abs().max().clamp(min=1))
