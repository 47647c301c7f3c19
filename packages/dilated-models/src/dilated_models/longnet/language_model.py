"""LongNetLM: embedding, blocks, LayerNorm, output layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Never, Self, cast

import torch
from dilated_core.checks import check_bool, check_float_dtype, check_tensor
from dilated_core.dispatch import is_plain
from dilated_core.inputs import check_cu_seqlens
from dilated_core.modules.options import check_forward_names, from_options
from dilated_core.positions.rotary import Rotation, check_decay_range, rotation_at
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import (
    checkpoint,  # pyright: ignore[reportUnknownVariableType]
)

from dilated_models.config import ELSEWHERE, LongNetConfig
from dilated_models.layers.blocks import SelfAttentionBlock
from dilated_models.layers.context_parallel import ContextParallel, Shard, shard_of_call
from dilated_models.layers.documents import Documents
from dilated_models.longnet.generation_cache import GenerationCache, compute_dtype
from dilated_models.longnet.tied_weights import complete_shared_weight, tie_again


@dataclass(frozen=True, kw_only=True)
class LongNetArguments(LongNetConfig):
    """The signature of `LongNetLM`: the fields of `LongNetConfig`, device and dtype."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


class LongNetLM(nn.Module):
    """LongNet language model (arXiv 2307.02486, section 4.1): a MAGNETO decoder with xPos.

    Embeddings are drawn from a normal distribution of standard deviation d_model^−½, and so is the
    output layer unless it shares their weight. Query and key weights are drawn with Xavier's
    uniform rule and gain 1/√2, values with γ/√2, attention outputs and feed-forwards with
    γ = √(log 2L) for L blocks; biases are zero.

    Args:
        config: A `LongNetConfig`. Or, instead of it, the fields of that class by name; `num_tokens`
            is required.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.

    Raises:
        TypeError: As `LongNetConfig`; or if both a config and fields of it are given.
        ValueError: As `LongNetConfig`.

    Example:
        >>> model = LongNetLM(num_tokens=256, d_model=32, nhead=4, num_decoder_layers=2,
        ...                   dim_feedforward=64, segment_lengths=[8, 16], dilation_rates=[1, 2])
        >>> model(torch.zeros(1, 20, dtype=torch.int64)).shape
        torch.Size([1, 20, 256])
        >>> LongNetLM(model.config).config == model.config
        True
    """

    @from_options(LongNetArguments, elsewhere=ELSEWHERE, config=LongNetConfig)
    def __init__(
        self,
        config: LongNetConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None:
            check_float_dtype(dtype)
        self.config = config
        num_tokens, d_model = config.num_tokens, config.d_model
        self.embedding = nn.Embedding(num_tokens, d_model, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(config, device=device, dtype=dtype)
            for _ in range(config.num_decoder_layers)
        )
        self.final_norm = (
            nn.LayerNorm(d_model, eps=config.layer_norm_eps, device=device, dtype=dtype)
            if config.final_layer_norm
            else nn.Identity()
        )
        self.output = nn.Linear(d_model, num_tokens, bias=False, device=device, dtype=dtype)
        self._draw_embeddings()
        self.tie_weights()
        self.register_load_state_dict_pre_hook(complete_shared_weight)
        self.register_load_state_dict_post_hook(tie_again)

    @classmethod
    def from_config(
        cls,
        config: LongNetConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LongNetLM:
        """The same as `LongNetLM(config, device=device, dtype=dtype)`."""
        return cls(config, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all weights anew, for instance after `to_empty`."""
        for block in self.blocks:
            cast(SelfAttentionBlock, block).reset_parameters()
        if isinstance(self.final_norm, nn.LayerNorm):
            self.final_norm.reset_parameters()
        self._draw_embeddings()

    def _draw_embeddings(self) -> None:
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.output.weight, std=self.config.d_model**-0.5)

    def tie_weights(self) -> None:
        """Share the embedding's weight with the output layer, if the config has it so."""
        if self.config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Part of `to`, `to_empty` and others, some of which make a new parameter for each name."""
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def forward(
        self,
        tokens: Tensor,
        is_causal: bool = True,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: GenerationCache | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        context_parallel: ContextParallel | None = None,
        **unknown: Never,
    ) -> Tensor:
        """Score every next token.

        Args:
            tokens: `(B, S)`, int64, each in [0, num_tokens). With `cu_seqlens` `(T,)`, T being the
                tokens of all documents together. Their values are checked on the CPU, unless a
                compiler or a transform is at work. A GPU would have to wait for that check.
            is_causal: Whether a position sees no later one, as a language model must.
            positions: `(S,)`, int64, absolute positions of the tokens for xPos or RoPE; None
                means 0 … S − 1, counted anew in each document. The attention pattern always follows
                the order in `tokens`.
            cu_seqlens: `(N + 1,)`, int32 or int64, where each of N documents that are packed one
                after another begins, and where the last one ends. Each document gets the logits
                that it gets alone, and may be empty.
            cache: Holds the tokens before. `tokens` continue them, and the cache then holds these
                too. For inference: the logits carry no gradient. A long prompt runs in parts, so
                its memory is bounded.
            lengths: With a cache, B integers: the first `lengths[b]` tokens of sequence b are
                appended, and the others are padding. None: all tokens.
            context_parallel: If `tokens` are one rank's shard of the sequences. The logits, and
                `positions`, are those of the local tokens; positions count from the start of the
                whole sequence, and `cu_seqlens` is that of the whole. All ranks of the group make
                the same calls. Dropout is drawn by each rank for its own tokens.

        Returns:
            `(B, S, num_tokens)` logits, `(T, num_tokens)` with `cu_seqlens`; row s scores the token
            after position s. With a cache `(B, 1, num_tokens)`: of the last token of each sequence
            only; NaN for a sequence of length 0.

        Raises:
            TypeError: If `tokens` or `positions` is not an int64 tensor, or an argument is unknown.
            ValueError: If a shape or device does not fit, a token is unknown, xPos would leave the
                range of the dtype, or arguments exclude each other.
        """
        known = ("tokens", "is_causal", "positions", "cu_seqlens", "cache", "lengths")
        check_forward_names(self, unknown, (*known, "context_parallel"), self.config)
        if cache is not None:
            _check_integers("tokens", tokens, "(B, S)", ndim=2)
            self._check_cache(
                cache,
                is_causal,
                positions=positions,
                cu_seqlens=cu_seqlens,
                context_parallel=context_parallel,
            )
            with torch.no_grad():
                return self._continue(tokens, cache, lengths)
        if lengths is not None:
            raise ValueError("lengths is given without a cache; give a cache too, or leave it out.")
        hidden = self.hidden_states(
            tokens,
            is_causal,
            positions=positions,
            cu_seqlens=cu_seqlens,
            context_parallel=context_parallel,
        )
        return self.output(hidden)

    def hidden_states(
        self,
        tokens: Tensor,
        is_causal: bool = True,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor:
        """What the output layer scores, `(B, S, d_model)`, for a loss that makes logits in parts.

        Arguments and errors as of `forward`.
        """
        documents = None
        if cu_seqlens is None:
            _check_integers("tokens", tokens, "(B, S), or (T,) with cu_seqlens", ndim=2)
        else:
            _check_integers("tokens", tokens, "(T,), as cu_seqlens is given", ndim=1)
            check_cu_seqlens(cu_seqlens)
            if cu_seqlens.is_meta and not tokens.is_meta:
                raise ValueError(
                    f"cu_seqlens is on meta and holds no values, and tokens is on {tokens.device}; "
                    f"cu_seqlens must hold values, so give it on the CPU."
                )
        self._check_known(tokens)
        if context_parallel is not None:
            self.config.check_over_ranks()
        shard = shard_of_call(tokens, context_parallel)
        if cu_seqlens is not None:
            documents = Documents.of(cu_seqlens.to(tokens.device), shard.positions)
        rotation = self._rotation(tokens, positions, documents, shard)
        x = self._embed(tokens)
        recompute = (
            self.config.activation_checkpointing and self.training and torch.is_grad_enabled()
        )
        for block in self.blocks:
            call = partial(block, context_parallel=context_parallel)
            if recompute:
                x = checkpoint(call, x, rotation, is_causal, documents, use_reentrant=False)
            else:
                x = call(x, rotation, is_causal, documents)
            if context_parallel is not None:
                # The first block compared the ranks' arguments; those of the others are the same.
                context_parallel = context_parallel.knowing(shard.seq_len)
        return self.final_norm(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        return self.dropout(x)

    def _check_known(self, tokens: Tensor) -> None:
        """Refuse unknown tokens where their values are at hand: on the CPU, and not traced."""
        if tokens.device.type != "cpu" or not tokens.numel() or not is_plain(tokens):
            return
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.config.num_tokens:
            raise ValueError(
                f"tokens holds {low if low < 0 else high}; each must be at least 0 and below "
                f"num_tokens, here {self.config.num_tokens}, so encode the text with the model's "
                f"own vocabulary."
            )

    def _check_cache(
        self,
        cache: GenerationCache,
        is_causal: bool,
        **excluded: object,
    ) -> None:
        if not isinstance(cache, GenerationCache):
            raise TypeError(f"cache is a {type(cache).__name__}; it must be a GenerationCache.")
        if not check_bool("is_causal", is_causal):
            raise ValueError("is_causal is False; it must be True with a cache.")
        for name, given in excluded.items():
            if given is not None:
                raise ValueError(f"{name} and cache are both given; leave {name} out.")
        if cache.config != self.config:
            raise ValueError(
                "cache was made for a model with another configuration; make it with "
                "GenerationCache(model)."
            )

    def _continue(
        self, tokens: Tensor, cache: GenerationCache, lengths: Tensor | Sequence[int] | None
    ) -> Tensor:
        """Logits `(B, 1, num_tokens)` of the last token of each sequence."""
        # Before the first part changes the cache, which would keep a part of the prompt.
        self._check_known(tokens)
        last = self.embedding.weight.new_full((len(tokens), self.config.d_model), math.nan)
        for part, counts, rotation in cache.parts(tokens, lengths):
            x = self._embed(part)
            for block, block_cache in zip(self.blocks, cache.blocks, strict=True):
                x = block(x, rotation, cache=block_cache, counts=counts)
            if counts is None:
                last = x[:, -1]
            else:
                ended = [i for i, count in enumerate(counts) if count]
                rows = torch.tensor([ended, [counts[i] - 1 for i in ended]], device=x.device)
                last = last.to(x.dtype).index_copy(0, rows[0], x[rows[0], rows[1]])
        return self.output(self.final_norm(last))[:, None]

    def _rotation(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Documents | None,
        shard: Shard,
    ) -> Rotation | None:
        """Rotation factors shared by all blocks, or None without positions."""
        config = self.config
        seq_len = tokens.shape[-1]
        if positions is not None:
            _check_integers("positions", positions, "(S,)", ndim=1)
            if positions.shape[0] != seq_len:
                raise ValueError(
                    f"positions has shape {tuple(positions.shape)} and there are {seq_len} tokens; "
                    f"it must hold one position for each token."
                )
            if positions.device != tokens.device:
                raise ValueError(
                    f"positions is on {positions.device} and tokens on {tokens.device}; they must "
                    f"be on one device."
                )
            if config.positions == "none":
                raise ValueError(
                    f"positions has shape {tuple(positions.shape)}; it must be None for a model "
                    f'with positions="none", so leave it out.'
                )
        if config.positions == "none":
            return None
        is_double = self.embedding.weight.dtype == torch.float64
        scale_base = config.xpos_scale_base if config.positions == "xpos" else None
        if positions is not None:
            # A fixed center, because every shard of a sequence must agree on it.
            center = 0
            reach = 0 if scale_base is None else _largest(positions)
        elif documents is not None:
            positions = documents.positions
            longest = 0 if scale_base is None else _largest(documents.cu_seqlens.diff())
            center = reach = (longest + 1) // 2
        else:
            positions = shard.positions
            center = reach = shard.seq_len // 2
        if scale_base is not None:
            check_decay_range(reach, scale_base, compute_dtype(self.embedding.weight))
        factor_dtype = torch.float64 if is_double else torch.float32
        return rotation_at(
            positions, config.head_dim, scale_base=scale_base, center=center, dtype=factor_dtype
        )


def check_weights(model: LongNetLM) -> None:
    """Refuse a model on the meta device, whose weights have no values.

    Raises:
        TypeError: If it is no LongNetLM.
        ValueError: If it is one.
    """
    # Not the class, which torch.compile hides.
    if not isinstance(getattr(model, "config", None), LongNetConfig):
        raise TypeError(f"model is a {type(model).__name__}; it must be a LongNetLM.")
    if model.embedding.weight.is_meta:
        raise ValueError(
            "model is on the meta device; it must have weights, so use "
            "load_state_dict(..., assign=True), or to_empty(device=...) and reset_parameters()."
        )


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Run in evaluation mode, then give each module the mode that it had.

    A part may have another mode than the whole. While a text is generated, the caller may train the
    model between two tokens, or continue another text with it.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _largest(positions: Tensor) -> int:
    """The largest distance of a position from 0; 0 for tensors without values (meta, fake)."""
    if positions.is_meta or isinstance(positions, FakeTensor) or not len(positions):
        return 0
    low, high = positions.aminmax()
    return max(-int(low), int(high))


def _check_integers(name: str, value: Tensor, shape: str, *, ndim: int) -> None:
    check_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be int64, so use {name}.long().")
    if value.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}.")
