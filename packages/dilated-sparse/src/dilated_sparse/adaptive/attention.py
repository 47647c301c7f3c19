"""Content-adaptive block-sparse attention as a module."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Never

import torch
from dilated_core.checks import check_tensor
from dilated_core.decoding.step import without_autocast
from dilated_core.inputs import check_scale, document_bounds
from dilated_core.modules.options import check_forward_names, from_options, show_options
from torch import nn

from dilated_sparse.adaptive.anchor import Anchor
from dilated_sparse.adaptive.config import (
    ELSEWHERE,
    FORWARD_NAMES,
    AdaptiveSparseArguments,
    AdaptiveSparseConfig,
)
from dilated_sparse.adaptive.decoding import AdaptiveCache
from dilated_sparse.adaptive.gate import BlockGate
from dilated_sparse.adaptive.learning import add_loss
from dilated_sparse.adaptive.scores import Shape
from dilated_sparse.adaptive.sequence import Sequence
from dilated_sparse.arguments import checked_dropout, checked_tensors
from dilated_sparse.pattern.selection import BlockSelection

Unrotated = tuple[torch.Tensor, torch.Tensor]
"""q and k before they are rotated by their positions."""


class AdaptiveSparseAttention(nn.Module):
    """Attention over the blocks with the largest estimated softmax mass: the content decides.

    Each row of blocks keeps its own block, blocks next to it, the first blocks, and those with the
    highest scores, until the budget is used up: one selection for each batch row and head of k.
    The score is an estimate without parameters, the log of Σ exp(mean query · mean key · scale)
    over sub-blocks, plus a learned correction that is 0 before training. Attention over the kept
    blocks is an exact softmax, forward and backward.

    In training mode the gate learns, with no other loss: the backward of the output also
    differentiates the KL divergence of the estimate from the exact mass of the blocks. It reaches
    the gate alone, and its factor `distillation_weight` is not changed by a gradient scaler; with
    one, set `distillation="none"` and add `distillation_loss` to the loss.

    Args:
        config: An `AdaptiveSparseConfig`. Or, instead of it, its options by name, which that class
            explains.
        num_heads, head_dim: Of q.
        num_kv_heads: Heads of k and v; `num_heads` if None.
        device, dtype: Of the parameters of the gate.

    Raises:
        TypeError, ValueError: As `AdaptiveSparseConfig` does.

    Example:
        >>> attention = AdaptiveSparseAttention(num_heads=4, head_dim=16, sparsity_ratio=0.2)
        >>> q = k = v = torch.randn(1, 1000, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 1000, 4, 16])
    """

    @from_options(AdaptiveSparseArguments, elsewhere=ELSEWHERE, config=AdaptiveSparseConfig)
    def __init__(
        self,
        config: AdaptiveSparseConfig,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_kv_heads = num_kv_heads or num_heads
        self.gate = BlockGate(
            self.num_kv_heads, head_dim, config.gate_dim, device=device, dtype=dtype
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool = False,
        *,
        unrotated: Unrotated | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **unknown: Never,
    ) -> torch.Tensor:
        """`(B, S, H, D)` q, `(B, S, H_kv, D)` k, v -> `(B, S, H, D)`.

        Args:
            q, k, v, key_padding_mask, cu_seqlens: As for `block_sparse_attention`. Blocks are
                counted from the first real token of each sequence and document, and positions of
                padding before it and behind the last give 0.
            is_causal: Query i sees only keys j ≤ i. Without `lookahead`, the selection too depends
                on positions up to i only.
            unrotated: q and k before they are rotated by their positions, which the gate reads; q
                and k themselves if None.

        Raises:
            TypeError, ValueError: As for `block_sparse_attention`; also if heads or head_dim are
                not those of the module.
        """
        check_forward_names(self, unknown, FORWARD_NAMES, self.config)
        q, k, v = self._checked(q, k, v, is_causal, unrotated, key_padding_mask, cu_seqlens)
        with without_autocast(q.device.type):
            return self._attend(q, k, v, is_causal, unrotated, key_padding_mask, cu_seqlens)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool,
        unrotated: Unrotated | None,
        key_padding_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        config = self.config
        dropout_p, seed = checked_dropout(config.dropout if self.training else 0.0)
        parameters = list(self.gate.parameters())
        learns = self.training and config.distillation != "none"
        is_random = learns and config.distillation == "kept"
        # Whether a graph is built decides on the loss only, not on the random numbers drawn:
        # checkpointing with use_reentrant=True runs forward once without a graph and once with it.
        learns = learns and torch.is_grad_enabled() and any(x.requires_grad for x in parameters)
        outs: list[torch.Tensor] = []
        total, rows = q.new_zeros((), dtype=torch.float32), q.new_zeros(())
        parts = self._sequences(q, k, v, is_causal, unrotated, key_padding_mask, cu_seqlens)
        for sequence, anchor in parts:
            selection = sequence.select()
            out = sequence.attend(selection, dropout_p, seed).out
            outs.append(_restored(out, anchor))
            noise = sequence.noise() if is_random else None
            if learns:
                part = sequence.loss(selection, noise) if is_random else sequence.loss(None)
                total, rows = total + part[0], rows + part[1]
        if not outs:
            # Without a position there is nothing to compute, but all inputs are part of the graph.
            inputs = [k, v, *(parameters if learns or config.gate_gradient is not None else ())]
            return q + sum(x.flatten()[:0].sum().to(q.dtype) for x in inputs)
        out = outs[0] if cu_seqlens is None else torch.cat([out[0] for out in outs])
        if learns:
            out = add_loss(out, total / rows.clamp_min(1) * config.distillation_weight)
        return out

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        is_causal: bool = False,
        *,
        unrotated: Unrotated | None = None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> BlockSelection:
        """The blocks that `forward` keeps for these tensors.

        With padding before a sequence, block 0 begins at its first real token.

        Args, errors: As for `forward`.
        """
        sequence = self._sequence(q, k, is_causal, unrotated, key_padding_mask)
        with without_autocast(q.device.type):
            return sequence.select()

    def distillation_loss(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        is_causal: bool = False,
        *,
        unrotated: Unrotated | None = None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss that teaches the gate: KL from the exact mass of blocks, mean over their rows.

        Differentiable in the gate alone. `distillation` chooses the blocks; `"none"` is as
        `"kept"`. `distillation_weight` has no part in it.

        Args, errors: As for `forward`.
        """
        sequence = self._sequence(q, k, is_causal, unrotated, key_padding_mask)
        learns_all = self.config.distillation == "all"
        with without_autocast(q.device.type):
            total, rows = sequence.loss(None if learns_all else sequence.select())
            return total / rows.clamp_min(1)

    @torch.no_grad()
    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: AdaptiveCache,
        *,
        unrotated: Unrotated | None = None,
    ) -> torch.Tensor:
        """Append tokens to a cache, and return their outputs, without gradients.

        Without `lookahead` each output is that of the same row of a causal `forward` over all
        tokens. With it, a token selects by the queries of its block so far, and the last token of a
        block as the block does in `forward`; the tokens of a first call are a `forward`.

        Args:
            q: `(B, T, H, D)` of the T next tokens; of a prompt, if the cache is empty.
            k, v: `(B, T, H_kv, D)`.
            cache: Of the tokens so far.
            unrotated: As for `forward`.

        Raises:
            TypeError: If `cache` is no `AdaptiveCache`, or as for `forward`.
            ValueError: If the cache holds other sequences, the module learns a bias, which
                `decode` does not have, or as for `forward`.
        """
        if not isinstance(cache, AdaptiveCache):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"cache is a {type(cache).__name__}; it must be an AdaptiveCache.")
        if self.config.gate_gradient is not None:
            raise ValueError(
                "gate_gradient is 'bias'; decode adds no bias, so call forward on all tokens."
            )
        q, k, v = self._checked(q, k, v, True, unrotated, None, None)
        with without_autocast(q.device.type):
            return self._decode(q, k, v, cache, (q, k) if unrotated is None else unrotated)

    def _decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: AdaptiveCache,
        before: Unrotated,
    ) -> torch.Tensor:
        scale = check_scale(self.config.scale, self.head_dim)
        shape = Shape(self.num_kv_heads, self.config.block_size, self.config.positions_per_mean)
        if cache.length == 0 and q.shape[1] > 1:
            sequence = Sequence(self.config, self.gate, q, k, v, before, True, None, scale)
            out = sequence.attend(sequence.select(), 0.0, None).out
            cache.extend(q, k, v, before, shape, self.gate)
            cache.resume(self.config, shape, self.gate, scale)
            return out
        outs: list[torch.Tensor] = []
        for t in range(q.shape[1]):
            one = slice(t, t + 1)
            unrotated_one = before[0][:, one], before[1][:, one]
            cache.extend(q[:, one], k[:, one], v[:, one], unrotated_one, shape, self.gate)
            outs.append(cache.step(q[:, one], self.config, shape, self.gate, scale))
        return torch.cat(outs, 1) if outs else torch.zeros_like(q)

    def _sequence(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        is_causal: bool,
        unrotated: Unrotated | None,
        key_padding_mask: torch.Tensor | None,
    ) -> Sequence:
        q, k, v = self._checked(q, k, k, is_causal, unrotated, key_padding_mask, None)
        for sequence, _ in self._sequences(
            q, k, v, is_causal, unrotated, key_padding_mask, cu_seqlens=None
        ):
            return sequence
        raise ValueError(f"q has shape {tuple(q.shape)}; there must be a position at least.")

    def _checked(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool,
        unrotated: Unrotated | None,
        key_padding_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """q, k and v in the dtype of autocast, if all arguments fit the module."""
        q, k, v = checked_tensors(q, k, v, is_causal, key_padding_mask, cu_seqlens)
        sizes = (q.shape[-2], k.shape[-2], q.shape[-1])
        if sizes != (self.num_heads, self.num_kv_heads, self.head_dim):
            raise ValueError(
                f"q has {sizes[0]} heads and k {sizes[1]}, of head_dim {sizes[2]}; the module is "
                f"for {self.num_heads} and {self.num_kv_heads}, of {self.head_dim}."
            )
        if unrotated is not None:
            if not isinstance(unrotated, tuple) or len(unrotated) != 2:  # pyright: ignore
                raise TypeError(
                    f"unrotated is a {type(unrotated).__name__}; it must be the tuple (q, k) of "
                    f"before the rotation."
                )
            for name, given, x in zip(("q", "k"), unrotated, (q, k), strict=True):
                check_tensor(f"{name} of unrotated", given)
                if given.shape != x.shape or given.device != x.device:
                    raise ValueError(
                        f"{name} of unrotated has shape {tuple(given.shape)} on {given.device}; it "
                        f"must be that of {name}, {tuple(x.shape)} on {x.device}."
                    )
        return [q, k, v]

    def _sequences(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool,
        unrotated: Unrotated | None,
        key_padding_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> Iterator[tuple[Sequence, Anchor | None]]:
        """The batch with its first real tokens at position 0, or each document."""
        tensors = [q, k, v, *((q, k) if unrotated is None else unrotated)]
        scale = check_scale(self.config.scale, self.head_dim)
        anchor = None
        if cu_seqlens is not None:
            parts = [
                [x[a:b].unsqueeze(0) for x in tensors]
                for a, b in pairwise(document_bounds(cu_seqlens, q.shape[0]))
                if b > a
            ]
        else:
            if key_padding_mask is not None and q.shape[1]:
                anchor = Anchor.of_mask(key_padding_mask)
                key_padding_mask = anchor.move(key_padding_mask)
                tensors = [anchor.move(x) for x in tensors]
            parts = [tensors] if q.numel() else []
        for q, k, v, *before in parts:
            yield (
                Sequence(
                    self.config, self.gate, q, k, v, (before[0], before[1]), is_causal,
                    key_padding_mask, scale,
                ),
                anchor,
            )  # fmt: skip

    def extra_repr(self) -> str:
        """The sizes, the budget and the options that differ from their defaults, for `repr`."""
        sizes = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
        if self.num_kv_heads != self.num_heads:
            sizes += f", num_kv_heads={self.num_kv_heads}"
        options = show_options(self.config)
        return f"{sizes}, {options}" if options else sizes


def _restored(out: torch.Tensor, anchor: Anchor | None) -> torch.Tensor:
    """The positions in their own order, with 0 in padding."""
    if anchor is None:
        return out
    return anchor.restore(out).masked_fill(anchor.is_outside[:, :, None, None], 0)
