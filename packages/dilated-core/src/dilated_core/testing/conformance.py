"""The suite every backend must pass.

Subclass it in the package of the backend:

    class TestSdpa(BackendConformance):
        backend = "sdpa"
        dtypes = (torch.float64, torch.float32, torch.bfloat16)

The tests cannot be overridden: a backend passes all of them, on the `device` and in the `dtypes`
that its class declares.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from dilated_core.backends.contract import (
    AttentionInputs,
    AttentionOptions,
    EarlierKeysBackend,
)
from dilated_core.backends.registry import get_backend
from dilated_core.pattern.branches import DilatedPattern
from dilated_core.reference import reference_dilated_attention_with_lse
from dilated_core.testing.cases import AWKWARD_CASES, Case, random_cases
from dilated_core.testing.error_budget import (
    assert_within_budget,
    pytorch_errors,
    relative_error,
)
from dilated_core.testing.hostile_inputs import HostileInputs
from dilated_core.testing.parts import Parts

BUDGET_PATTERN = DilatedPattern([128, 256, 512], [1, 2, 4])


class BackendConformance(HostileInputs, Parts):
    """The tests that every backend passes; see the module. `BackendSuite` lists its attributes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse subclasses that replace a test."""
        super().__init_subclass__(**kwargs)
        replaced = [name for name in vars(cls) if name in _TEST_NAMES]
        if replaced:
            raise TypeError(
                f"{cls.__name__} replaces {', '.join(replaced)}; a backend passes the conformance "
                f"tests as they are."
            )

    def _compare_with_oracle(self, case: Case, dtype: torch.dtype, bound: float) -> None:
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        out, lse = self._attend(case, q, k, v)
        exact_out, exact_lse = reference_dilated_attention_with_lse(
            q, k, v, case.pattern, **case.options(device=self.device)
        )
        assert out.dtype == dtype
        assert out.shape == q.shape
        assert lse.shape == out.shape[:-1]
        assert lse.dtype == torch.promote_types(dtype, torch.float32)
        empty = exact_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, empty)
        assert (out[empty] == 0).all()
        got = torch.autograd.grad(out, (q, k, v), dout)
        exact = torch.autograd.grad(exact_out, (q, k, v), dout.double())
        errors = {
            "out": relative_error(out, exact_out),
            "lse": relative_error(lse.masked_fill(empty, 0), exact_lse.masked_fill(empty, 0)),
            **{
                name: relative_error(a, e)
                for name, a, e in zip(("dq", "dk", "dv"), got, exact, strict=True)
            },
        }
        assert all(error <= bound for error in errors.values()), errors
        assert (got[0][empty] == 0).all()
        if case.documents:
            return
        # No key and no query of a row that no branch selects has a gradient.
        unused = case.pattern.materialize(case.seq_len, case.num_heads).sum(1).T == 0
        assert (got[0][:, unused] == 0).all()
        if case.num_kv_heads is None:
            assert all((grad[:, unused] == 0).all() for grad in got[1:])

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize by the cases that this class runs."""
        if "awkward_case" in metafunc.fixturenames:
            cases = self._sample(AWKWARD_CASES, 22)
            metafunc.parametrize("awkward_case", cases, ids=[case.name for case in cases])

    def test_awkward_cases_match_the_oracle(self, awkward_case: Case) -> None:
        """Forward, lse and gradients, on the shapes that break careless code."""
        dtype, bound = self._sharpest()
        self._compare_with_oracle(awkward_case, dtype, bound)

    # How many examples is left to hypothesis' profile, because some backends are slow to test.
    @settings(deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(case=random_cases(with_options=True))
    def test_random_cases_match_the_oracle(self, case: Case) -> None:
        """The same on any pattern and any shape."""
        dtype, bound = self._sharpest()
        self._compare_with_oracle(case, dtype, bound)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_error_budgets(self, is_causal: bool) -> None:
        """In every dtype at most twice as inaccurate as PyTorch's own attention.

        Not in float64, which is the oracle's own dtype and has no better self to compare with.
        """
        for dtype in set(self.dtypes) - {torch.float64}:
            seq_len, batch_size = (300, 1) if self.is_sampled else (600, 2)
            case = Case(
                seq_len=seq_len,
                head_dim=32,
                pattern=BUDGET_PATTERN,
                is_causal=is_causal,
                batch_size=batch_size,
            )
            q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
            out, _ = self._attend(case, q, k, v)
            exact_out, _ = reference_dilated_attention_with_lse(
                q, k, v, case.pattern, is_causal=is_causal
            )
            assert_within_budget(
                [out, *torch.autograd.grad(out, (q, k, v), dout)],
                [exact_out, *torch.autograd.grad(exact_out, (q, k, v), dout.double())],
                pytorch_errors(q, k, v, dout, is_causal=is_causal),
            )

    def test_gradient_through_lse(self) -> None:
        """A gradient of lse reaches q and k."""
        dtype, bound = self._sharpest()
        for is_causal in (False, True):
            pattern = DilatedPattern([10, 24, 60], [1, 2, 4], padding="attended")
            batch_size = 1 if self.is_sampled else 2
            case = Case(seq_len=77, batch_size=batch_size, pattern=pattern, is_causal=is_causal)
            q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
            dlse = dout.sum(-1)
            out, lse = self._attend(case, q, k, v)
            exact = reference_dilated_attention_with_lse(q, k, v, case.pattern, is_causal=is_causal)
            got = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse.to(lse.dtype)))
            want = torch.autograd.grad(exact, (q, k, v), (dout.double(), dlse.double()))
            for a, e in zip(got, want, strict=True):
                assert relative_error(a, e) <= bound

    def test_future_does_not_matter(self) -> None:
        """Causal results before a changed position stay the same to the bit."""
        dtype, _ = self._sharpest()
        pattern = DilatedPattern([8, 16, 64], [1, 2, 4])
        case = Case(seq_len=64, pattern=pattern, is_causal=True)
        q, k, v, _ = (x.detach() for x in case.tensors(dtype=dtype, device=self.device))
        before, _ = self._attend(case, q, k, v)
        for position in self._sample((1, 17, 40, 63), 2):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[:, position:] += 1
            after, _ = self._attend(case, *changed)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position:], before[:, position:])

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_tokens_influence_exactly_those_that_see_them(self, is_causal: bool) -> None:
        """The pattern of non-zero ∂out_i/∂v_j is that of the dense counts."""
        dtype, _ = self._sharpest()
        pattern = DilatedPattern([6, 13, 24], [1, 3, 4])
        case = Case(seq_len=24, num_heads=5, head_dim=1, pattern=pattern, is_causal=is_causal)
        q, k, v, _ = case.tensors(dtype=dtype, device=self.device)
        out, _ = self._attend(case, q, k, v)
        queries = self._sample(range(24), 5)
        influence = torch.stack(
            [
                torch.autograd.grad(out[0, i, :, 0].sum(), v, retain_graph=True)[0][0, :, :, 0].T
                for i in queries
            ],
            dim=1,
        )
        counts = pattern.materialize(24, 5, is_causal=is_causal)[:, queries]
        assert torch.equal(influence.cpu() != 0, counts != 0)

    def test_backward_uses_the_given_lse(self) -> None:
        """On half of the keys, with out and lse of all keys, gradients add up to the whole."""
        dtype, bound = self._sharpest()
        backend = get_backend(self.backend)
        case = Case(seq_len=32, pattern=DilatedPattern([32], [1]), batch_size=2)
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        out, lse = self._attend(case, q, k, v)
        want = torch.autograd.grad(out, (q, k, v), dout)
        halves = [slice(0, 16), slice(16, 32)]
        got = [torch.zeros_like(q) for _ in range(3)]
        with torch.no_grad():
            for queries in halves:
                for keys in halves:
                    dq, dk, dv = backend.backward(
                        dout[:, queries], q[:, queries], k[:, keys], v[:, keys],
                        out[:, queries], lse[:, queries],
                        AttentionOptions(is_causal=False, scale=case.head_dim**-0.5),
                    )  # fmt: skip
                    got[0][:, queries] += dq
                    got[1][:, keys] += dk
                    got[2][:, keys] += dv
        for a, e in zip(got, want, strict=True):
            assert relative_error(a, e) <= bound

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_strips_with_a_mask_for_each_head(self, is_causal: bool) -> None:
        """Heads that keep other positions have other keys masked; here, all keys of one."""
        self._compare_a_call(is_causal, num_queries=24, is_masked=True)

    @pytest.mark.parametrize("is_masked", [False, True])
    @pytest.mark.parametrize("num_queries", [1, 15])
    def test_causal_calls_with_earlier_keys(self, num_queries: int, is_masked: bool) -> None:
        """The queries are at the last of the 24 positions, if the backend takes that."""
        capable: Any = get_backend(self.backend)
        if not isinstance(capable, EarlierKeysBackend) or not capable.takes_earlier_keys(
            torch.device(self.device)
        ):
            pytest.skip("keys before the queries get a call of their own.")
        self._compare_a_call(True, num_queries=num_queries, is_masked=is_masked)

    def _compare_a_call(self, is_causal: bool, num_queries: int, is_masked: bool) -> None:
        """Compare forward and backward of the last queries over 24 keys with dense attention."""
        dtype, bound = self._sharpest()
        backend = get_backend(self.backend)
        case = Case(seq_len=24, head_dim=16, num_kv_heads=2, pattern=DilatedPattern([24], [1]))
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        inputs = AttentionInputs(
            *(q.device, dtype, 4, 16), num_kv_heads=2, has_key_padding_mask=is_masked
        )
        if self.may_refuse and (reasons := backend.why_not(inputs)):
            pytest.skip(" ".join(reasons))
        hidden = torch.rand(1, 24, 2, generator=torch.Generator().manual_seed(0)) < 0.3
        hidden[:, :, 1] = True
        hidden = (hidden & is_masked).to(self.device)
        options = AttentionOptions(is_causal, 0.3, key_padding_mask=hidden if is_masked else None)
        q, dout = q[:, -num_queries:], dout[:, -num_queries:]
        with torch.no_grad():
            out, lse = backend.forward(q, k, v, options)
            row_lse = lse.masked_fill(lse == -torch.inf, torch.inf)
            got = backend.backward(dout, q, k, v, out, row_lse, options)
        Q, K, V = (x.detach().double().requires_grad_() for x in (q, k, v))
        scores = 0.3 * torch.einsum("bqhd,bkhd->bhqk", Q, K.repeat_interleave(2, 2))
        unseen = hidden.repeat_interleave(2, 2).permute(0, 2, 1)[:, :, None, :]
        if is_causal:
            later = torch.ones(24, 24, device=q.device).triu(1).bool()
            unseen = unseen | later[-num_queries:]
        weights = scores.exp().masked_fill(unseen, 0.0)
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.where(total > 0, 1.0)
        exact_out = torch.einsum("bhqk,bkhd->bqhd", weights, V.repeat_interleave(2, 2))
        exact_lse = total.log()[..., 0].mT
        assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
        want = [exact_out, *torch.autograd.grad(exact_out, (Q, K, V), dout.double())]
        for a, e in zip([out, *got], want, strict=True):
            assert relative_error(a, e) <= bound
        assert relative_error(lse.nan_to_num(neginf=0), exact_lse.nan_to_num(neginf=0)) <= bound

    def test_repeated_calls_are_equal(self) -> None:
        """Forward and backward give the same bits twice."""
        dtype, _ = self._sharpest()
        case = Case(
            seq_len=80 if self.is_sampled else 200, pattern=DilatedPattern([32, 64], [1, 2])
        )
        results: list[list[torch.Tensor]] = []
        for _ in range(2):
            q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
            out, lse = self._attend(case, q, k, v)
            results.append([out, lse, *torch.autograd.grad(out, (q, k, v), dout)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


_TEST_NAMES = frozenset(
    name for name in dir(BackendConformance) if name.startswith(("test_", "pytest_", "_sample"))
)
