"""The modules that `LongNetLM` and `LongNet` share: embedding, stacks of blocks, output layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from dilated_core.checks import check_float_dtype, check_tensor
from dilated_core.dispatch import is_plain
from dilated_core.positions.rotary import check_decay_range, rotation_at
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import (
    checkpoint,  # pyright: ignore[reportUnknownVariableType]
)

from dilated_models.config import LongNetConfig
from dilated_models.layers.blocks import SelfAttentionBlock
from dilated_models.layers.context_parallel import ContextParallel, Ranks, Shard
from dilated_models.layers.cross_attention import Memory
from dilated_models.layers.documents import Documents
from dilated_models.layers.position_codes import AlibiPositions, PositionCode
from dilated_models.longnet.generation_cache import GenerationCache, compute_dtype
from dilated_models.longnet.tied_weights import complete_shared_weight, tie_again


class LongNetStacks(nn.Module):
    """Embedding, blocks of the encoder if there is one, blocks of the decoder, output layer.

    Args:
        config: Of the model.
        group: The ranks that share a sequence, for attention over ranks; None for all ranks.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.

    Raises:
        ValueError: If a group is given to another kind of attention, or the model takes no shards.
    """

    takes_shards = False
    """Whether a call may have one rank's shard of the sequences."""

    def __init__(
        self,
        config: LongNetConfig,
        *,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None:
            check_float_dtype(dtype)
        if config.attention_kind == "ring":
            if not self.takes_shards:
                raise ValueError(
                    f"attention_kind is 'ring'; {type(self).__name__} takes no shards of "
                    f"sequences, so leave it 'dilated'."
                )
            ContextParallel(group=group)  # checks the group
        elif group is not None:
            raise ValueError(
                f"group is given and attention_kind is {config.attention_kind!r}; only 'ring' "
                f"attention has one, so set attention_kind='ring', or pass "
                f"context_parallel=ContextParallel(group=...) to each call."
            )
        self.config, self.ranks = config, Ranks(group)
        num_tokens, d_model = config.num_tokens, config.d_model
        has_encoder = config.num_encoder_layers > 0

        def blocks(count: int, gain: float, has_memory: bool) -> nn.ModuleList:
            rate = config.drop_path_rate / max(1, count - 1)
            return nn.ModuleList(
                SelfAttentionBlock(
                    config,
                    has_memory=has_memory,
                    gamma_init=gain,
                    drop_path=i * rate,
                    device=device,
                    dtype=dtype,
                )
                for i in range(count)
            )

        def last_norm() -> nn.Module:
            if not config.final_layer_norm:
                return nn.Identity()
            return nn.LayerNorm(d_model, eps=config.layer_norm_eps, device=device, dtype=dtype)

        if num_tokens:
            self.embedding = nn.Embedding(num_tokens, d_model, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)
        if has_encoder:
            self.encoder_blocks = blocks(
                config.num_encoder_layers, config.encoder_gamma_init, has_memory=False
            )
            self.encoder_norm = last_norm()
        self.blocks = blocks(config.num_decoder_layers, config.gamma_init, has_memory=has_encoder)
        self.final_norm = last_norm()
        if num_tokens:
            self.output = nn.Linear(d_model, num_tokens, bias=False, device=device, dtype=dtype)
        self._draw_embeddings()
        self.tie_weights()
        self.register_load_state_dict_pre_hook(complete_shared_weight)
        self.register_load_state_dict_post_hook(tie_again)

    def reset_parameters(self) -> None:
        """Draw all weights anew, for instance after `to_empty`."""
        for module in self.modules():
            if isinstance(module, SelfAttentionBlock):
                module.reset_parameters()
        for norm in self.children():
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()
        self._draw_embeddings()

    @property
    def first_weight(self) -> Tensor:
        """A weight, whose device and dtype are those of all."""
        return next(self.parameters())

    def _draw_embeddings(self) -> None:
        if not self.config.num_tokens:
            return
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

    def over_ranks(self, context_parallel: ContextParallel | None) -> ContextParallel | None:
        """How a call is spread over ranks: as it is told, or as the config of `"ring"` tells.

        None: the call has whole sequences, as with `"ring"` on one rank.

        Raises:
            ValueError: If the attention cannot be spread.
        """
        if context_parallel is not None:
            self.config.check_over_ranks()
        elif self.config.attention_kind == "ring":
            options: dict[str, Any] = dict(self.config.attention_options)
            spread = ContextParallel(group=self.ranks.group, **options)
            return spread if spread.num_ranks > 1 else None
        return context_parallel

    def embed(self, tokens: Tensor) -> Tensor:
        """`(…)` tokens -> `(…, d_model)`, after dropout; floating ones are embeddings already."""
        if tokens.is_floating_point():
            return self.dropout(tokens)
        x = self.embedding(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        return self.dropout(x)

    def run(
        self,
        stack: nn.ModuleList,
        x: Tensor,
        rotation: PositionCode | None,
        is_causal: bool,
        documents: Documents | None,
        *,
        memory: Memory | None = None,
        context_parallel: ContextParallel | None = None,
        seq_len: int | None = None,
    ) -> Tensor:
        """The blocks of a stack, one after another; arguments as of a block.

        Args:
            seq_len: Of the whole sequence, with `context_parallel`.
        """
        recompute = (
            self.config.activation_checkpointing and self.training and torch.is_grad_enabled()
        )
        for block in stack:
            call = partial(block, context_parallel=context_parallel, memory=memory)
            if recompute:
                x = checkpoint(call, x, rotation, is_causal, documents, use_reentrant=False)
            else:
                x = call(x, rotation, is_causal, documents)
            if context_parallel is not None and seq_len is not None:
                # The first block compared the ranks' arguments; those of the others are the same.
                context_parallel = context_parallel.knowing(seq_len)
        return x

    def last_states(
        self, tokens: Tensor, cache: GenerationCache, lengths: Tensor | Sequence[int] | None
    ) -> Tensor:
        """Continue the texts of a cache.

        Args:
            tokens: `(B, n)`, or their embeddings `(B, n, d_model)`.
            cache: Holds the tokens before, and then these too.
            lengths: How many tokens of each text are not padding; None: all.

        Returns:
            `(B, d_model)`, of the last token of each text; NaN for a text without new tokens.
        """
        last = self.first_weight.new_full((len(tokens), self.config.d_model), math.nan)
        for part, counts, rotation in cache.parts(tokens, lengths):
            x = states = self.embed(part)
            memory = None
            if cache.encoder_blocks:  # of the same text
                for block, kept in zip(self.encoder_blocks, cache.encoder_blocks, strict=True):
                    states = block(states, rotation, cache=kept, counts=counts)
                memory = Memory(self.encoder_norm(states), is_causal=True)
            elif self.config.num_encoder_layers:  # of another text, in the cache already
                memory = Memory(None, is_causal=False)
            for block, kept in zip(self.blocks, cache.blocks, strict=True):
                x = block(x, rotation, cache=kept, counts=counts, memory=memory)
            last = _last_rows(x, counts, last)
        return self.final_norm(last)

    def check_known(self, name: str, tokens: Tensor) -> None:
        """Refuse unknown tokens where their values are at hand: on the CPU, and not traced."""
        if tokens.device.type != "cpu" or not tokens.numel() or not is_plain(tokens):
            return
        if tokens.is_floating_point():
            return
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.config.num_tokens:
            raise ValueError(
                f"{name} holds {low if low < 0 else high}; each must be at least 0 and below "
                f"num_tokens, here {self.config.num_tokens}, so encode the text with the model's "
                f"own vocabulary."
            )

    def rotation(
        self, documents: Documents | None, shard: Shard, positions: Tensor | None = None
    ) -> PositionCode | None:
        """The positions of rows as all blocks encode them, or None without positions.

        Args:
            documents: Of packed rows, whose positions count from the start of each document.
            shard: The rows in the whole sequence.
            positions: `(S,)`, instead of counted ones.
        """
        config, weight = self.config, self.first_weight
        if config.positions == "none":
            return None
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
        if config.positions == "alibi":
            return AlibiPositions(positions)
        if scale_base is not None:
            check_decay_range(reach, scale_base, compute_dtype(weight))
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return rotation_at(
            positions, config.head_dim, scale_base=scale_base, center=center, dtype=dtype
        )


def _last_rows(x: Tensor, counts: Sequence[int] | None, before: Tensor) -> Tensor:
    """The last row of each sequence.

    Args:
        x: `(B, n, d_model)`, new rows.
        counts: How many of each sequence are not padding; None: all.
        before: `(B, d_model)`, the result for a sequence without new rows.
    """
    if counts is None:
        return x[:, -1]
    ended = [i for i, count in enumerate(counts) if count]
    rows = torch.tensor([ended, [counts[i] - 1 for i in ended]], device=x.device)
    return before.to(x.dtype).index_copy(0, rows[0], x[rows[0], rows[1]])


def check_has_weights(model: LongNetStacks) -> None:
    """Refuse a model on the meta device, whose weights have no values.

    Raises:
        TypeError: If it is no LongNet.
        ValueError: If it is on the meta device.
    """
    # Not the class, which torch.compile hides.
    if not isinstance(getattr(model, "config", None), LongNetConfig):
        raise TypeError(f"model is a {type(model).__name__}; it must be a LongNetLM.")
    if model.first_weight.is_meta:
        raise ValueError(
            "model is on the meta device; it must have weights, so use "
            "load_state_dict(..., assign=True), or to_empty(device=...) and reset_parameters()."
        )


def check_tokens(name: str, value: Tensor, shape: str, *, ndim: int) -> None:
    """Refuse what is no int64 tensor of so many dimensions.

    Raises:
        TypeError: If it is no int64 tensor.
        ValueError: If it has other dimensions.
    """
    check_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be int64, so use {name}.long().")
    if value.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}.")


def _largest(positions: Tensor) -> int:
    """The largest distance of a position from 0; 0 for tensors without values (meta, fake)."""
    if positions.is_meta or isinstance(positions, FakeTensor) or not len(positions):
        return 0
    low, high = positions.aminmax()
    return max(-int(low), int(high))
