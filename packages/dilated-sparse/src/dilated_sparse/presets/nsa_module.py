"""NSA with the projections of a transformer layer, and by the name `nsa` in core's factories."""

from __future__ import annotations

import math
from typing import Any, Never

import torch
from dilated_core import AttentionVariant, MultiheadConfig
from dilated_core.checks import check_tensor
from dilated_core.modules.config import MULTIHEAD_ARGUMENTS
from dilated_core.modules.masks import as_bool_mask, check_mask_is_causal
from dilated_core.modules.options import check_forward_names, from_options, show_options
from dilated_core.positions.rotary import Rotation, rotate
from torch import nn

from dilated_sparse.execution.run import split
from dilated_sparse.execution.sequences import spans_of
from dilated_sparse.modules.factory import without_branches
from dilated_sparse.presets.config import NSAArguments, NSAConfig
from dilated_sparse.presets.moba_modules import check_is_causal
from dilated_sparse.presets.nsa import native_sparse_attention


class BlockCompression(nn.Module):
    """One row for each block of l positions, learned: φ of arXiv 2502.11089, eq. 7.

    The rows of a block, each with an embedding of its place, go through a two-layer perceptron.
    All heads share its weights.

    Args:
        block_size: l.
        stride: Positions between blocks.
        head_dim: D.
        device, dtype: Of the parameters.
    """

    def __init__(
        self,
        block_size: int,
        stride: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.block_size, self.stride = block_size, stride
        self.positions = nn.Parameter(torch.empty(block_size, head_dim, device=device, dtype=dtype))
        hidden = 2 * head_dim
        self.up = nn.Linear(block_size * head_dim, hidden, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, head_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters anew."""
        nn.init.normal_(self.positions, std=0.02)
        self.up.reset_parameters()
        self.down.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, S, K, D)` -> `(B, C, K, D)`, of the blocks that lie in S as a whole."""
        B, S, K, D = x.shape
        if self.block_size > S:
            blocks = x.new_zeros(B, 0, K, self.block_size, D)
        else:
            blocks = x.unfold(1, self.block_size, self.stride).transpose(-1, -2)
        return self.down(torch.nn.functional.gelu(self.up((blocks + self.positions).flatten(-2))))


class NativeSparseAttention(nn.Module):
    """Causal multi-head self-attention with the three branches of NSA (arXiv 2502.11089).

    One query projection, and keys and values of its own for each branch. The compressed branch
    pools them by a learned perceptron, see `BlockCompression`. With `mix="gate"`, the paper's, a
    sigmoid of a perceptron of the input weights the three results of each head; that is not one
    softmax. With `mix="lse"` all branches share one softmax and there is no gate. See
    `native_sparse_attention` for the branches.

    Positions enter the compression. `forward` also takes a rotation, such as RoPE's, of queries and
    of the keys of all branches; a compressed key is turned by the middle of its block. Without a
    rotation, add positions to the input.

    Args:
        multihead_config, attention_config: A `MultiheadConfig` and an `NSAConfig`. Or, instead of
            them, their options by name, which those classes explain; `embed_dim` and `num_heads`
            are required and may be positional.

    Raises:
        TypeError, ValueError: As `MultiheadConfig` and `NSAConfig` do.

    Example:
        >>> nsa = NativeSparseAttention(64, 4, num_kv_heads=2, window_size=128)
        >>> x = torch.randn(2, 500, 64)
        >>> nsa(x, x, x, is_causal=True).shape
        torch.Size([2, 500, 64])
    """

    @from_options(
        NSAArguments,
        elsewhere=MULTIHEAD_ARGUMENTS,
        multihead_config=MultiheadConfig,
        attention_config=NSAConfig,
    )
    def __init__(self, multihead_config: MultiheadConfig, attention_config: NSAConfig) -> None:
        super().__init__()
        config, self.attention_config = multihead_config, attention_config
        self.config = config
        self.head_dim = config.embed_dim // config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        placed: dict[str, Any] = {"device": config.device, "dtype": config.dtype}
        E, H, kv_dim = config.embed_dim, config.num_heads, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(E, E, bias=config.bias, **placed)
        # Branch by branch: compressed, selected, window.
        self.k_proj = nn.Linear(E, 3 * kv_dim, bias=config.bias, **placed)
        self.v_proj = nn.Linear(E, 3 * kv_dim, bias=config.bias, **placed)
        sizes = attention_config.sizes
        shape = (sizes.compression_block_size, sizes.compression_stride, self.head_dim)
        self.compress_k = BlockCompression(*shape, **placed)
        self.compress_v = BlockCompression(*shape, **placed)
        self.gate: nn.Sequential | None = None
        if attention_config.mix == "gate":
            hidden = max(1, E // 4)
            self.gate = nn.Sequential(
                nn.Linear(E, hidden, **placed),
                nn.GELU(),
                nn.Linear(hidden, 3 * H, **placed),
                nn.Sigmoid(),
            )
        self.layer_norm = (
            nn.LayerNorm(E, eps=config.layer_norm_eps, **placed) if config.layer_norm else None
        )
        self.out_proj = nn.Linear(E, E, bias=config.bias, **placed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters anew: projections as in MAGNETO, the others as PyTorch does."""
        gamma = self.config.gamma_init
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # pyright: ignore
        for projection, gain in (
            (self.q_proj, 1 / math.sqrt(2)),
            (self.k_proj, 1 / math.sqrt(2)),
            (self.v_proj, gamma / math.sqrt(2)),
            (self.out_proj, gamma),
        ):
            # Each branch's rows of the weight are a matrix of their own.
            parts = 3 if projection in (self.k_proj, self.v_proj) else 1
            for weight in projection.weight.chunk(parts):
                nn.init.xavier_uniform_(weight, gain=gain)
            if self.config.bias:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        is_causal: bool = False,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rotation: Rotation | None = None,
        **unknown: Never,
    ) -> torch.Tensor:
        """Self-attention of `(B, S, E)` query, key and value; `(T, E)` with `cu_seqlens`.

        Each document, and each batch row without its padding, is attended to on its own: blocks
        are counted from its first position, and padding gives 0 before the output projection.

        Args:
            query, key, value: Of one shape.
            is_causal: Must be True.
            attn_mask: The causal mask that accompanies `is_causal=True`; any other is refused.
            key_padding_mask: `(B, S)`, True for padding before and behind each sequence; or
                floating, with −inf for these.
            cu_seqlens: Where packed documents begin, see `dilated_core.dilated_attention`.
            rotation: Factors for all S or T positions, as `dilated_core.positions.rotary` makes.

        Returns:
            One tensor of the query's shape.

        Raises:
            TypeError: If an unknown keyword is given, or an input or mask is no tensor.
            ValueError: If a shape does not fit, `is_causal` is not True, or a mask is given that
                cannot be honoured.
        """
        check_forward_names(self, unknown, MULTIHEAD_ARGUMENTS, self.config, self.attention_config)
        check_is_causal("NSA", is_causal)
        dims, rows = (3, "batch, sequence") if cu_seqlens is None else (2, "positions")
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, x)
            if x.dim() != dims or x.shape[-1] != self.config.embed_dim or x.shape != query.shape:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; it must be "
                    f"({rows}, {self.config.embed_dim}), as query, key and value all."
                )
        if attn_mask is not None:
            check_tensor("attn_mask", attn_mask)
            check_mask_is_causal(attn_mask, query, is_causal)
        if key_padding_mask is not None:
            check_tensor("key_padding_mask", key_padding_mask)
            if cu_seqlens is not None:
                raise ValueError(
                    "key_padding_mask and cu_seqlens are both given; packed documents have no "
                    "padding, so give one of the two."
                )
            key_padding_mask = as_bool_mask(key_padding_mask, query)
        inputs = [query, key, value]
        if cu_seqlens is not None:
            inputs = [x.unsqueeze(0) for x in inputs]
        S = inputs[0].shape[1]
        if rotation is not None and rotation.q_cos.shape[-3:] != (S, 1, self.head_dim):
            raise ValueError(
                f"rotation has factors of shape {tuple(rotation.q_cos.shape)}; there are {S} "
                f"positions and head_dim is {self.head_dim}, so it must be ({S}, 1, "
                f"{self.head_dim})."
            )
        if cu_seqlens is None and key_padding_mask is None:
            out = self._attend(rotation, *inputs)
        else:
            out = self._attend_parts(inputs, rotation, cu_seqlens, key_padding_mask)
        out = out.flatten(-2)
        y = self.out_proj(out if self.layer_norm is None else self.layer_norm(out))
        return y if cu_seqlens is None else y[0]

    def _attend_parts(
        self,
        inputs: list[torch.Tensor],
        rotation: Rotation | None,
        cu_seqlens: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        B, S, _ = inputs[0].shape
        parts = spans_of(B, S, cu_seqlens, key_padding_mask)
        if any(part.key_padding_mask is not None for part in parts):
            raise ValueError(
                "key_padding_mask hides keys between visible ones; here it may hide padding before "
                "and behind a sequence only."
            )
        results = [
            self._attend(
                None if rotation is None else Rotation(*(x[..., span, :, :] for x in rotation)),
                *(x[rows, span] for x in inputs),
            )
            for rows, span, _ in parts
        ]
        shape = (B, S, self.config.num_heads, self.head_dim)
        out = inputs[0].new_zeros(shape, dtype=results[0].dtype if results else None)
        for (rows, span, _), result in zip(parts, results, strict=True):
            out[rows, span] = result
        return out

    def _attend(
        self,
        rotation: Rotation | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """`(B, S, E)` inputs of sequences without padding -> `(B, S, H, D)`."""
        D = self.head_dim
        q = split(self.q_proj(query), -1, (-1, D))
        keys, values = (
            split(projection(x), -1, (-1, D)).chunk(3, dim=-2)
            for projection, x in ((self.k_proj, key), (self.v_proj, value))
        )
        config = self.attention_config
        k = [self.compress_k(keys[0]), *keys[1:]]
        if rotation is not None:
            sizes = config.sizes
            first = torch.arange(k[0].shape[1], device=q.device) * sizes.compression_stride
            middle = first + sizes.compression_block_size // 2
            factors = [(rotation.k_cos, rotation.k_sin)] * 3
            factors[0] = (rotation.k_cos[..., middle, :, :], rotation.k_sin[..., middle, :, :])
            k = [rotate(x, *pair) for x, pair in zip(k, factors, strict=True)]
            q = rotate(q, rotation.q_cos, rotation.q_sin)
        return native_sparse_attention(
            q,
            (k[0], self.compress_v(values[0])),
            (k[1], values[1]),
            (k[2], values[2]),
            None if self.gate is None else split(self.gate(query), -1, (-1, 3)),
            sizes=config.sizes,
            mix=config.mix,
            scale=config.scale,
            backend=config.backend,
        )

    def extra_repr(self) -> str:
        """The sizes, and the options that differ from their defaults, for `repr`."""
        shown = show_options(self.attention_config, "mix")
        return f"embed_dim={self.config.embed_dim}, num_heads={self.config.num_heads}, {shown}"


def _attention(**options: Any) -> nn.Module:
    raise ValueError(
        "attention 'nsa' has projections of its own for each branch, so it has no module on q, k "
        "and v; build it with create_multihead_dilated_attention('nsa', ...), or call "
        "dilated_sparse.native_sparse_attention."
    )


def _multihead(**options: Any) -> NativeSparseAttention:
    instead = "compression_block_size, selection_block_size and window_size"
    return NativeSparseAttention(**without_branches(options, "nsa", NSAConfig, instead))


VARIANT = AttentionVariant(_attention, _multihead)
"""What the entry point `nsa` of the group `dilated.attention` names."""
