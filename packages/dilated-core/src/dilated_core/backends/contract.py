"""What a backend is: ordinary attention on one strip, forward and backward from a given lse."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch

from dilated_core.merge import AttentionOutput

CONTRACT_VERSION = 1
"""Raised when the methods below change meaning; a backend written for another one is refused."""


class AttentionInputs(NamedTuple):
    """What a backend may ask about a call before it says whether it can run it.

    Attributes:
        device: Where q, k and v are.
        dtype: Their dtype.
        num_heads: H.
        head_dim: D.
        dropout_p: Probability of dropping an attention probability.
        num_kv_heads: H_kv, which divides H; H if None.
        has_key_padding_mask: Whether keys are masked.
        is_packed: Whether several documents are packed into one sequence. Only backends that do
            the whole pattern in one launch need to know; the others see one document at a time.
        max_workspace_bytes: Limit of the memory beyond inputs and results, or None. Likewise.
        seq_len: S, or T if packed; None where the question is about no particular length.
    """

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    head_dim: int
    dropout_p: float = 0.0
    num_kv_heads: int | None = None
    has_key_padding_mask: bool = False
    is_packed: bool = False
    max_workspace_bytes: int | None = None
    seq_len: int | None = None


@runtime_checkable
class AttentionBackend(Protocol):
    """Ordinary attention that returns its lse, on strided `(B, S, H, D)` views.

    The dilation is outside: a backend sees strips, whose last stride is 1 and whose other strides
    may be anything. Two strips of one call never overlap, so results may be written anywhere new.

    A backend may also offer the whole pattern in one launch, with

        dilated_forward(q, k, v, pattern, *, is_causal, scale, dropout_p, dropout_seed,
            key_padding_mask, cu_seqlens) -> AttentionOutput
        dilated_backward(dout, dlse, q, k, v, out, lse, pattern, *, is_causal, scale, dropout_p,
            dropout_seed, key_padding_mask, cu_seqlens) -> (dq, dk, dv)

    on whole tensors (`dlse` may be None, as may `key_padding_mask` `(B, S)` and `cu_seqlens`, whose
    tensors are `(1, T, H, D)`); then these are used instead of the strips.

    It may offer decoding, a token at a time, with

        decode_forward(q, k, v, keys, values, layout, *, position, scale) -> AttentionOutput

    which writes k and v `(B, 1, H_kv, D)` of the token at `position` to its rows of the cache, keys
    and values `(B, rows, D)`, and returns what q `(B, 1, H, D)` sees of the cache then. The layout
    is a `CacheLayout` (cache_layout.py). No other row may be written, and no row read that
    the token does not see.

    And it may rank itself by the inputs instead of by one number, with

        priority_for(inputs) -> (rank, where the rank comes from)

    whose second part is a phrase that `explain_backends` shows. Reasons not to run belong in
    `why_not`; a negative rank is for what runs but should only be had by name.

    Attributes:
        name: What `backend=` says, such as "sdpa".
        priority: `backend="auto"` takes the highest that can run, and a negative one never. eager
            is 0, sdpa is 10.
        contract: The `CONTRACT_VERSION` the backend was written for.
    """

    name: str
    priority: int
    contract: int

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """Reasons why it cannot run these inputs, each a sentence; empty if it can."""
        ...

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: int,
        key_padding_mask: torch.Tensor | None,
    ) -> AttentionOutput:
        """Softmax attention of q `(B, M, H, D)` over k and v `(B, M, H_kv, D)`.

        H_kv divides H, and H/H_kv consecutive heads of q share one of k and v. Keys where
        `key_padding_mask` `(B, M, H_kv)` is True are left out, and a row that sees no key has out 0
        and lse −∞; without a mask there is no such row.

        Each probability is dropped with probability `dropout_p`, and the others divided by
        1 − `dropout_p`; which, is a function of `dropout_seed`. A backend without dropout says so
        in `why_not` and is never given `dropout_p` above 0. The lse knows nothing of it.

        Returns:
            `out` in the dtype of q, `lse` float32 (float64 for float64 inputs), natural logarithm.
        """
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: int,
        key_padding_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v, *given* `out` and `lse` of a softmax over possibly more keys.

        p = exp(scale · q·kᵀ − lse), delta = rowsum(dout · out), ds = p · (m · dout·vᵀ − delta);
        dq = scale · ds·k, dk = scale · dsᵀ·q, dv = (m · p)ᵀ·dout, where m is the dropout mask of
        forward, 0 or 1/(1 − dropout_p), and 1 without dropout. Nothing is renormalised: with the
        lse and out that were merged over all branches, the sum of these over the branches is the
        exact gradient, mixing weights included. A row with lse +∞ has p = 0 and gradient 0.
        """
        ...
