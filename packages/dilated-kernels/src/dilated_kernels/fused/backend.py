"""Backend `triton`: the whole pattern by fused kernels, on strips and on lists of blocks, too.

Triton is imported when a call needs it, so a machine without a GPU never loads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from dilated_core import AttentionInputs, AttentionOutput, DilatedPattern
from dilated_core.backends.cache_layout import CacheLayout
from dilated_core.backends.contract import (
    CONTRACT_VERSION,
    AttentionOptions,
    BlockLists,
    Gradients,
)

from dilated_kernels.availability import (
    HALF_DTYPES,
    cuda_reasons,
    import_problem,
    imported,
    input_reasons,
)
from dilated_kernels.fused.tile_order import TileOrder, check_tile_order
from dilated_kernels.fused.tuning import Config, Kind, check_configs
from dilated_kernels.ranking.table import Rank, rank

MAX_HEAD_DIM = 256
MIN_BLOCK_SIZE = 16  # smallest side of a matrix product in Triton


class TritonBackend:
    """Fused dilated and block-sparse attention in Triton, forward and backward, and decoding.

    float32 products are true float32, or TF32 after `torch.set_float32_matmul_precision("high")` or
    `"medium"`.

    Args:
        tile_order: The order in which the tiles of a launch start, "row_major" or "hilbert".
            Results are the same to the bit. Tiles of block-sparse attention are in order of rows.
        configs: Tiles, warps and stages for the kernels "forward", "dq" and "dk_dv", as
            `{"dq": (64, 64, 4, 3)}`; a kernel that is not named takes those of the table. Tiles of
            block-sparse attention are at most as long as a block.
        name: The name to register it by, beside the one that is registered already.

    Raises:
        ValueError: If there is no such order, no such kernel, or no kernel can have such a config.

    Example:
        >>> from dilated_core import register_backend, unregister_backend
        >>> register_backend(TritonBackend(tile_order="hilbert", name="triton-hilbert"))
        >>> unregister_backend("triton-hilbert")
    """

    priority = 50
    contract = CONTRACT_VERSION

    def __init__(
        self,
        *,
        tile_order: TileOrder = "row_major",
        configs: Mapping[Kind, Config] | None = None,
        name: str = "triton",
    ) -> None:
        check_tile_order(tile_order)
        self.tile_order: TileOrder = tile_order
        self.configs = check_configs(configs or {})
        self.name = name

    def priority_for(self, inputs: AttentionInputs) -> Rank:
        """See `RankedBackend`; only the backend called "triton" is taken by "auto"."""
        if self.name != "triton":
            return Rank(-1, "registered beside triton, by its own name")
        return rank(self.name, inputs)

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """See `AttentionBackend.why_not`."""
        reasons: list[str] = []
        if inputs.device.type == "cpu":
            # Hot path: a process without the variable has no interpreter and loads no Triton.
            if "TRITON_INTERPRET" not in os.environ or not _is_interpreted():
                reasons.append(
                    "the device is cpu; it runs on CUDA devices, and on a CPU in Triton's "
                    "interpreter, which TRITON_INTERPRET=1 turns on."
                )
        else:
            # Triton supports no older GPU (triton-lang/triton#5066): it multiplies matrices without
            # tensor cores there, and the tiles of the table fit neither registers nor memory.
            reasons += cuda_reasons(inputs, minimum=(8, 0))
            if not reasons and (problem := import_problem("triton")):
                reasons.append(
                    f"Triton cannot be imported ({problem}); pip install 'dilated-kernels[triton]'."
                )
        reasons += input_reasons(
            inputs._replace(dropout_p=0.0, has_key_padding_mask=False),
            dtypes=(torch.float32, *HALF_DTYPES),
            head_dim_multiple=1,
            max_head_dim=MAX_HEAD_DIM,
        )
        if inputs.block_size is not None:
            reasons += _block_reasons(inputs.block_size, inputs.dropout_p)
        elif inputs.is_rectangular:
            reasons.append("k has other rows than q; its kernels need as many keys as queries.")
        if inputs.max_workspace_bytes is not None:
            reasons.append(
                f"max_workspace_bytes is {inputs.max_workspace_bytes}; it accumulates in a float32 "
                f"copy of the output, which it cannot divide."
            )
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
        """See `WholePatternBackend`."""
        all_options = _all_options(options, cu_seqlens)
        return _attention().dilated_forward(q, k, v, pattern, all_options, self._tuning(q))

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
        """See `WholePatternBackend`."""
        all_options = _all_options(options, cu_seqlens)
        return _attention().dilated_backward(
            dout, dlse, q, k, v, out, lse, pattern, all_options, self._tuning(q)
        )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> AttentionOutput:
        """See `AttentionBackend.forward`: dense attention is a pattern of one branch."""
        return self.dilated_forward(q, k, v, self._dense(q, k), options, cu_seqlens=None)

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
        """See `AttentionBackend.backward`; a kernel computes delta."""
        pattern = self._dense(q, k)
        return self.dilated_backward(
            dout, None, q, k, v, out, lse, pattern, options, cu_seqlens=None
        )

    def decode_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: CacheLayout,
        *,
        position: int,
        scale: float,
    ) -> AttentionOutput:
        """See `DecodingBackend`."""
        return imported("dilated_kernels.fused.decoding").decode_forward(
            q, k, v, keys, values, layout, position=position, scale=scale
        )

    def block_sparse_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: BlockLists,
        options: AttentionOptions,
    ) -> AttentionOutput:
        """See `BlockSparseBackend`."""
        module = _block_attention(blocks, options)
        return module.forward(module.Call(q, k, v, blocks, options, self._tuning(q)))

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
        """See `BlockSparseBackend`."""
        module = _block_attention(blocks, options)
        call = module.Call(q, k, v, blocks, options, self._tuning(q))
        return module.backward(dout, lse, delta, call)

    def _dense(self, q: torch.Tensor, k: torch.Tensor) -> DilatedPattern:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"q has {q.shape[1]} rows and k {k.shape[1]}; the kernels of backend "
                f"{self.name!r} need as many keys as queries, so take another backend."
            )
        return DilatedPattern([max(1, q.shape[1])], [1])

    def _tuning(self, q: torch.Tensor) -> Any:
        return _attention().tuning_for(q, self.tile_order, self.configs)


def _all_options(options: AttentionOptions, cu_seqlens: torch.Tensor | None) -> Any:
    return _attention().Options(
        options.is_causal,
        options.scale,
        options.dropout_p,
        options.dropout_seed,
        options.key_padding_mask,
        cu_seqlens,
    )


def _block_reasons(block_size: int, dropout_p: float) -> list[str]:
    """Reasons why the block-sparse kernels cannot run."""
    reasons: list[str] = []
    if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
        reasons.append(
            f"block_size is {block_size}; its block-sparse kernels take a power of two of "
            f"{MIN_BLOCK_SIZE} or more."
        )
    if dropout_p:
        reasons.append(f"dropout_p is {dropout_p}; its block-sparse kernels have no dropout.")
    return reasons


def _block_attention(blocks: BlockLists, options: AttentionOptions) -> Any:
    """The module that launches the kernels, after the `why_not` checks that shapes do not show."""
    if reasons := _block_reasons(blocks.block_size, options.dropout_p):
        raise ValueError(" ".join(reasons))
    return imported("dilated_kernels.fused.blocks.attention")


def _attention() -> Any:
    return imported("dilated_kernels.fused.attention")


def _is_interpreted() -> bool:
    if import_problem("triton"):
        return False
    return imported("dilated_kernels.fused.launch").is_interpreted()


backend = TritonBackend()
