"""What the conformance tests of a backend share: which backend, where, and how exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from hypothesis import currently_in_test_context, reject

from dilated_core.attention import dilated_attention_with_lse
from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.registry import get_backend
from dilated_core.testing.cases import Case

# Accumulated rounding of float64 over a few hundred keys, with room for cancellation.
FLOAT64_ERROR = 1e-10


_Value = TypeVar("_Value")


class BackendSuite:
    """The backend under test, and how to call it.

    Attributes:
        backend: Name of the backend.
        device: Where to run it.
        dtypes: Dtypes it runs. With float64 it is held to exactness, otherwise to budgets.
        multiple: head_dims are filled with zeros up to a multiple of this, for kernels that load
            several numbers at once.
        may_refuse: Whether inputs that its `why_not` refuses are skipped; otherwise they fail.
        is_sampled: Whether only a fixed sample of the cases of each test runs, and smaller ones,
            because a case takes seconds, as in an interpreter. Every test runs all the same. Such
            a class stands beside one that is not sampled, marked `exhaustive`.
    """

    backend: ClassVar[str]
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    multiple: ClassVar[int] = 1
    may_refuse: ClassVar[bool] = False
    is_sampled: ClassVar[bool] = False

    @pytest.fixture(autouse=True)
    def poisoned_memory(self) -> Iterator[None]:
        """Fill what `torch.empty` returns with NaN, so that reading it shows."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(before)

    def _attend(
        self, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changed: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        D, options = q.shape[-1], case.options(device=self.device) | changed
        if options["scale"] is None:
            options["scale"] = D**-0.5
        if missing := -D % self.multiple:
            # Only where needed: padding by nothing would copy, and hide strides from the backend.
            q, k, v = (torch.nn.functional.pad(x, (0, missing)) for x in (q, k, v))
        inputs = AttentionInputs(
            *(q.device, q.dtype, q.shape[-2], q.shape[-1]),
            has_key_padding_mask=options["key_padding_mask"] is not None,
        )
        if self.may_refuse and (reasons := get_backend(self.backend).why_not(inputs)):
            if currently_in_test_context():
                reject()
            pytest.skip(" ".join(reasons))
        out, lse = dilated_attention_with_lse(
            q, k, v, case.pattern, **options, backend=self.backend
        )
        return out[..., :D], lse

    @classmethod
    def _sample(cls, values: Sequence[_Value], count: int) -> Sequence[_Value]:
        """All values, or, sampled, `count` of them at equal distances, first and last included."""
        if not cls.is_sampled or len(values) <= count:
            return values
        last = len(values) - 1
        return [values[round(i * last / max(1, count - 1))] for i in range(count)]

    def _sharpest(self) -> tuple[torch.dtype, float]:
        """The most precise dtype it runs, and what exactness means in it."""
        dtype = max(self.dtypes, key=lambda dtype: -torch.finfo(dtype).eps)
        if dtype == torch.float64:
            return dtype, FLOAT64_ERROR
        # A few hundred roundings of the dtype; the budgets are stricter.
        return dtype, 200 * torch.finfo(dtype).eps
