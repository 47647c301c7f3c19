"""LongNetLM: score every next token of a text, at once or continuing a cache."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Never

import torch
from dilated_core import linear_cross_entropy
from dilated_core.checks import check_bool
from dilated_core.inputs import check_cu_seqlens
from dilated_core.modules.options import check_forward_names, from_options
from torch import Tensor, nn
from torch.nn.functional import pad

from dilated_models.config import ELSEWHERE, LongNetConfig
from dilated_models.layers.context_parallel import ContextParallel, shard_of_call
from dilated_models.layers.cross_attention import Memory
from dilated_models.layers.documents import Documents
from dilated_models.longnet.encoder_decoder_config import EncoderDecoderConfig
from dilated_models.longnet.generation_cache import GenerationCache
from dilated_models.longnet.stacks import LongNetStacks, check_has_weights, check_tokens


@dataclass(frozen=True, kw_only=True)
class LongNetArguments(LongNetConfig):
    """The signature of `LongNetLM`: the fields of `LongNetConfig`, group, device and dtype."""

    group: Any = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


class LongNetLM(LongNetStacks):
    """LongNet language model (arXiv 2307.02486, section 4.1): a MAGNETO decoder with xPos.

    With `num_encoder_layers` above 0, the tokens also pass an encoder, and each block of the
    decoder attends to its states. This attention is dense: time grows with the square of the
    length, memory with the length. A causal call is causal in all three attentions, so row s still
    depends on the tokens up to s only.

    Embeddings are drawn from a normal distribution of standard deviation d_model^−½, and so is the
    output layer unless it shares their weight. Query and key weights are drawn with Xavier's
    uniform rule and gain 1/√2, values with γ/√2, attention outputs and feed-forwards with γ. For N
    blocks of the encoder and M of the decoder, γ is √(log 2M) without an encoder. With one it is
    √(log 3M) in the decoder and √(⅓ log 3M · log 2N) in the encoder, and 1 in attention to the
    encoder (arXiv 2210.06423, table 2, and its official code). Biases are zero.

    Args:
        config: A `LongNetConfig`. Or, instead of it, the fields of that class by name; `num_tokens`
            is required.
        group: With `attention_kind="ring"`, the ranks that share a sequence, as in
            `ContextParallel`; None for all ranks. Each call then gets one rank's shard.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.

    Raises:
        TypeError: As `LongNetConfig`; or if both a config and fields of it are given.
        ValueError: As `LongNetConfig`; or if a group is given to another kind of attention.

    Example:
        >>> model = LongNetLM(num_tokens=256, d_model=32, nhead=4, num_decoder_layers=2,
        ...                   dim_feedforward=64, segment_lengths=[8, 16], dilation_rates=[1, 2])
        >>> model(torch.zeros(1, 20, dtype=torch.int64)).shape
        torch.Size([1, 20, 256])
        >>> LongNetLM(model.config).config == model.config
        True
    """

    takes_shards = True

    @from_options(LongNetArguments, elsewhere=ELSEWHERE, config=LongNetConfig)
    def __init__(
        self,
        config: LongNetConfig,
        *,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, group=group, device=device, dtype=dtype)

    @classmethod
    def from_config(
        cls,
        config: LongNetConfig,
        *,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LongNetLM:
        """The same as `LongNetLM(config, group=group, device=device, dtype=dtype)`."""
        return cls(config, group=group, device=device, dtype=dtype)

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
            context_parallel: If `tokens` are one rank's shard of the sequences; a model for
                `"ring"` has its own. The logits, and
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
            check_tokens("tokens", tokens, "(B, S)", ndim=2)
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

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        count: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of every next token, without ever holding the logits of all tokens.

        Example::

            model.loss(tokens).backward()

        It equals `cross_entropy` of the logits; `dilated_core.linear_cross_entropy` tells which
        bits are the same. FSDP puts weights together in the forward of the module that it wraps, so
        there call this in the forward of a module of your own.

        Args:
            tokens, positions, cu_seqlens, context_parallel: As of `forward`.
            labels: int64, of the shape of `tokens`: the token that comes after each, `ignore_index`
                where none counts. None: the next one of `tokens`; the last token of a sequence or
                document has none. Over ranks give them, from `dilated_ring.shift_sequence`.
            ignore_index, reduction, count: As of `dilated_core.linear_cross_entropy`. Over ranks
                `count` is the number of labels of all of them.

        Returns:
            A scalar, or for `reduction="none"` one loss for each token.

        Raises:
            TypeError, ValueError: As `forward` and `dilated_core.linear_cross_entropy`; or if
                `labels` is None and `context_parallel` is given.
        """
        if labels is None:
            if self.over_ranks(context_parallel) is not None:
                raise ValueError(
                    "labels is None, and sequences are spread over ranks; the next token of a "
                    "shard's last one is on another rank, so give labels from "
                    "dilated_ring.shift_sequence."
                )
            labels = next_tokens(tokens, cu_seqlens, ignore_index)
        hidden = self.hidden_states(
            tokens,
            positions=positions,
            cu_seqlens=cu_seqlens,
            context_parallel=context_parallel,
        )
        return linear_cross_entropy(
            hidden,
            self.output.weight,
            labels,
            ignore_index=ignore_index,
            reduction=reduction,
            count=count,
        )

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
            check_tokens("tokens", tokens, "(B, S), or (T,) with cu_seqlens", ndim=2)
        else:
            check_tokens("tokens", tokens, "(T,), as cu_seqlens is given", ndim=1)
            check_cu_seqlens(cu_seqlens)
            if cu_seqlens.is_meta and not tokens.is_meta:
                raise ValueError(
                    f"cu_seqlens is on meta and holds no values, and tokens is on {tokens.device}; "
                    f"cu_seqlens must hold values, so give it on the CPU."
                )
        self.check_known("tokens", tokens)
        context_parallel = self.over_ranks(context_parallel)
        if context_parallel is not None and self.training and self.config.drop_path_rate:
            raise ValueError(
                f"drop_path_rate of the model is {self.config.drop_path_rate}, and "
                f"context_parallel is given; each rank would skip blocks of its own for one "
                f"sequence, so train with drop_path_rate=0."
            )
        shard = shard_of_call(tokens, context_parallel)
        if cu_seqlens is not None:
            documents = Documents.of(cu_seqlens.to(tokens.device), shard.positions)
        if positions is not None:
            self._check_positions(positions, tokens)
        rotation = self.rotation(documents, shard, positions)
        x = self.embed(tokens)
        memory = None
        if self.config.num_encoder_layers:
            states = self.run(
                self.encoder_blocks,
                *(x, rotation, is_causal, documents),
                context_parallel=context_parallel,
                seq_len=shard.seq_len,
            )
            memory = Memory(
                self.encoder_norm(states),
                check_bool("is_causal", is_causal),
                None if documents is None else documents.cu_seqlens,
            )
            if context_parallel is not None:
                context_parallel = context_parallel.knowing(shard.seq_len)
        x = self.run(
            self.blocks,
            *(x, rotation, is_causal, documents),
            memory=memory,
            context_parallel=context_parallel,
            seq_len=shard.seq_len,
        )
        return self.final_norm(x)

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
        self.check_known("tokens", tokens)
        return self.output(self.last_states(tokens, cache, lengths))[:, None]

    def _check_positions(self, positions: Tensor, tokens: Tensor) -> None:
        check_tokens("positions", positions, "(S,)", ndim=1)
        if positions.shape[0] != (seq_len := tokens.shape[-1]):
            raise ValueError(
                f"positions has shape {tuple(positions.shape)} and there are {seq_len} tokens; "
                f"it must hold one position for each token."
            )
        if positions.device != tokens.device:
            raise ValueError(
                f"positions is on {positions.device} and tokens on {tokens.device}; they must "
                f"be on one device."
            )
        if self.config.positions == "none":
            raise ValueError(
                f"positions has shape {tuple(positions.shape)}; it must be None for a model "
                f'with positions="none", so leave it out.'
            )


def next_tokens(tokens: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """The token after each one of `(…, S)`, `ignore_index` after the last of a document."""
    labels = pad(tokens[..., 1:], (0, 1), value=ignore_index)
    if cu_seqlens is None or not len(tokens):
        return labels
    # The end of an empty document is that of the one before; before the first, that of the last.
    ends = (cu_seqlens[1:].to(tokens.device, torch.int64) - 1) % len(tokens)
    return labels.index_fill(0, ends, ignore_index)


def check_weights(model: LongNetLM) -> None:
    """Refuse another model, and one on the meta device.

    Raises:
        TypeError: If it is no LongNetLM.
        ValueError: If its weights have no values.
    """
    check_has_weights(model)
    if isinstance(model.config, EncoderDecoderConfig):
        raise TypeError(
            "model is a LongNet of two sequences; it must be a LongNetLM. To generate, use "
            "generate_from."
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
