"""Backend `flex`: the whole pattern, or a list of blocks, through PyTorch's flex_attention.

A list of blocks is what flex_attention is made for: see blocks.py.

A dilated pattern becomes two functions of indices, which PyTorch compiles into its kernel: a mask
(does any branch let query i see key j?) and a change of the score (a key that c branches select
gets log c more, so that it counts c times). It is for comparisons and experiments: the kernel
computes every block of 128 x 128 positions in which a query sees a key, and a dilated branch skips
few.
"""

from __future__ import annotations

import torch
from dilated_core import AttentionOutput, DilatedPattern, merge_partials
from dilated_core.backends.contract import (
    CONTRACT_VERSION,
    AttentionInputs,
    AttentionOptions,
    BlockLists,
    Gradients,
)
from dilated_core.merge import accumulation_dtype

from dilated_kernels import availability
from dilated_kernels.flex import call
from dilated_kernels.flex.blocks import block_reasons, list_mask
from dilated_kernels.flex.mask import documents_of, pattern_mask, strip_mask, zero_keys
from dilated_kernels.ranking.table import Rank, rank

_CPU_DTYPES = (torch.float64, torch.float32, *availability.HALF_DTYPES)
_CUDA_DTYPES = (torch.float32, *availability.HALF_DTYPES)


class FlexBackend:
    """Attention by PyTorch's flex_attention; on CPU forward only."""

    name = "flex"
    priority = -1  # only by name
    contract = CONTRACT_VERSION

    def priority_for(self, inputs: AttentionInputs) -> Rank:
        """See `AttentionBackend`."""
        return rank(self.name, inputs)

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """See `AttentionBackend.why_not`."""
        kind = inputs.device.type
        reasons = [] if kind == "cpu" else availability.cuda_reasons(inputs, minimum=(7, 5))
        reasons += availability.input_reasons(
            inputs._replace(has_key_padding_mask=False),
            dtypes=_CPU_DTYPES if kind == "cpu" else _CUDA_DTYPES,
            head_dim_multiple=1,
            max_head_dim=None,
        )
        if inputs.max_workspace_bytes is not None:
            reasons.append(
                f"max_workspace_bytes is {inputs.max_workspace_bytes}; PyTorch's compiler chooses "
                f"its workspace and takes no limit."
            )
        reasons += block_reasons(kind, inputs.block_size)
        return reasons

    def dilated_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pattern: DilatedPattern,
        options: AttentionOptions,
        *,
        cu_seqlens: torch.Tensor | None,
    ) -> AttentionOutput:
        """See `AttentionBackend`."""
        _refuse_dropout(options.dropout_p)
        documents = documents_of(cu_seqlens, q)
        mask = pattern_mask(
            pattern,
            q,
            is_causal=options.is_causal,
            documents=documents,
            key_padding_mask=options.key_padding_mask,
        )
        result = call.attend(q.detach(), k.detach(), v.detach(), mask, options.scale)
        if pattern.padding == "masked" or options.is_causal:
            return result
        count = zero_keys(pattern, q, documents)
        lse = count.to(result.lse.dtype).log().expand(result.lse.shape)
        return merge_partials([result, AttentionOutput(torch.zeros_like(result.out), lse)])

    def dilated_backward(
        self,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        pattern: DilatedPattern,
        options: AttentionOptions,
        *,
        cu_seqlens: torch.Tensor | None,
    ) -> Gradients:
        """See `AttentionBackend`. Zero keys have no gradient; they are in `out` and `lse`.

        Raises:
            NotImplementedError: On CPU, where PyTorch's flex_attention has no backward.
        """
        _refuse_dropout(options.dropout_p)
        mask = pattern_mask(
            pattern,
            q,
            is_causal=options.is_causal,
            documents=documents_of(cu_seqlens, q),
            key_padding_mask=options.key_padding_mask,
        )
        delta = _delta(dout, out) if dlse is None else _delta(dout, out) - dlse
        return call.differentiate(dout, q, k, v, lse, delta, mask, options.scale)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: AttentionOptions,
    ) -> AttentionOutput:
        """See `AttentionBackend.forward`."""
        _refuse_dropout(options.dropout_p)
        mask = strip_mask(q, k, options)
        return call.attend(q.detach(), k.detach(), v.detach(), mask, options.scale)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        options: AttentionOptions,
        *,
        delta: torch.Tensor | None = None,
    ) -> Gradients:
        """See `AttentionBackend.backward`.

        Raises:
            NotImplementedError: On CPU, where PyTorch's flex_attention has no backward.
        """
        _refuse_dropout(options.dropout_p)
        mask = strip_mask(q, k, options)
        delta = _delta(dout, out) if delta is None else delta
        return call.differentiate(dout, q, k, v, lse, delta, mask, options.scale)

    def block_sparse_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: BlockLists,
        options: AttentionOptions,
    ) -> AttentionOutput:
        """See `BlockSparseBackend`."""
        _check_blocks(q, blocks, options)
        if not q.numel():
            lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
            return AttentionOutput(torch.empty_like(q), lse)
        k, v = _without_masked(k, v, options)
        mask = list_mask(blocks, q, options, has_columns=False)
        return call.attend(q.detach(), k.detach(), v.detach(), mask, options.scale)

    def block_sparse_backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        blocks: BlockLists,
        options: AttentionOptions,
    ) -> Gradients:
        """See `BlockSparseBackend`. Runs forward once more: see `call.differentiate`.

        Raises:
            NotImplementedError: On CPU, where PyTorch's flex_attention has no backward.
        """
        _check_blocks(q, blocks, options)
        if not q.numel():
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        k, v = _without_masked(k, v, options)
        mask = list_mask(blocks, q, options, has_columns=True)
        return call.differentiate(dout, q, k, v, lse, delta, mask, options.scale)


def _delta(dout: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """rowsum(dout · out)."""
    wide = accumulation_dtype(dout.dtype)
    return (dout.to(wide) * out.to(wide)).sum(-1)


def _without_masked(
    k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and v with zeros where they are masked: 0 · NaN would be NaN."""
    if options.key_padding_mask is None:
        return k, v
    hidden = options.key_padding_mask[:, :, None, None]
    return k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)


def _check_blocks(q: torch.Tensor, blocks: BlockLists, options: AttentionOptions) -> None:
    """Repeat the `why_not` checks for callers that skipped them."""
    _refuse_dropout(options.dropout_p)
    if reasons := block_reasons(q.device.type, blocks.block_size):
        raise ValueError(" ".join(reasons))


def _refuse_dropout(dropout_p: float) -> None:
    """Repeat the `why_not` check for callers that skipped it."""
    if dropout_p:
        raise ValueError(
            f"dropout_p is {dropout_p}, and backend 'flex' has no dropout; use backend='eager'."
        )


flex = FlexBackend()
