"""LongNet: an encoder of one sequence, and a decoder of another one that attends to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never, Self

import torch
from dilated_core import linear_cross_entropy
from dilated_core.checks import check_bool, check_tensor
from dilated_core.modules.options import check_forward_names, from_options
from torch import Tensor

from dilated_models.layers.context_parallel import Shard
from dilated_models.layers.cross_attention import Memory
from dilated_models.layers.documents import Documents
from dilated_models.layers.position_codes import PositionCode
from dilated_models.longnet.encoder_decoder_config import (
    TWO_SEQUENCES,
    EncoderDecoderConfig,
    check_memory_states,
    check_padding,
)
from dilated_models.longnet.generation_cache import GenerationCache
from dilated_models.longnet.language_model import next_tokens
from dilated_models.longnet.packed_rows import PackedRows
from dilated_models.longnet.saving import load_weights, read_config, save_model, write_config
from dilated_models.longnet.stacks import LongNetStacks, check_tokens

_ARCHITECTURE = "LongNet"


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderArguments(EncoderDecoderConfig):
    """The signature of `LongNet`: the fields of `EncoderDecoderConfig`, device and dtype."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


class LongNet(LongNetStacks):
    """LongNet of two sequences: a dilated encoder, and a dilated decoder that attends to it.

    The sequences may have any lengths. Attention inside each is dilated; attention of the decoder
    to the encoder is dense, so its time grows with the product of both lengths, and its memory with
    their sum. Blocks and initial weights are those of a `LongNetLM` with an encoder. `LongNetLM`
    itself reads one sequence, with both stacks and causally.

    Args:
        config: An `EncoderDecoderConfig`. Or, instead of it, its fields by name.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.

    Raises:
        TypeError: As `EncoderDecoderConfig`; or if both a config and fields of it are given.
        ValueError: As `EncoderDecoderConfig`.

    Example:
        >>> options = {"d_model": 32, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2,
        ...            "dim_feedforward": 64, "segment_lengths": [8, 32], "dilation_rates": [1, 4]}
        >>> model = LongNet(**options)
        >>> model(torch.randn(2, 70, 32), torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 32])
        >>> model = LongNet(**options, num_tokens=256)
        >>> src, tgt = torch.randint(256, (2, 70)), torch.randint(256, (2, 50))
        >>> model(src, tgt).shape
        torch.Size([2, 50, 256])
    """

    config: EncoderDecoderConfig

    @from_options(EncoderDecoderArguments, elsewhere=TWO_SEQUENCES, config=EncoderDecoderConfig)
    def __init__(
        self,
        config: EncoderDecoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        *,
        src_is_causal: bool = False,
        tgt_is_causal: bool = True,
        memory_is_causal: bool = False,
        **unknown: Never,
    ) -> Tensor:
        """Score every next token of `tgt`, given `src`.

        Args:
            src: `(B, N)` tokens, int64 in [0, num_tokens); or `(B, N, d_model)` embeddings.
            tgt: `(B, M)` tokens, or `(B, M, d_model)` embeddings.
            src_key_padding_mask: `(B, N)`, True for padding, anywhere in a row. Padding is taken
                out: positions and segments count from the first token of a row that is none, so
                each row gets what it gets alone, without padding.
            tgt_key_padding_mask: `(B, M)`, likewise.
            src_is_causal: Whether a position of `src` sees no later one.
            tgt_is_causal: Whether a position of `tgt` sees no later one.
            memory_is_causal: Whether position i of `tgt` sees the positions j ≤ i of `src` only;
                both then have the same length, and the same padding.

        Returns:
            `(B, M, num_tokens)` logits, or `(B, M, d_model)` states for `num_tokens=0`; 0 for
            padding.

        Raises:
            TypeError: If an argument has the wrong type or is unknown.
            ValueError: If a shape does not fit, a token is unknown, or xPos would leave the range
                of the dtype.
        """
        known = (
            "src", "tgt", "src_key_padding_mask", "tgt_key_padding_mask", "src_is_causal",
            "tgt_is_causal", "memory_is_causal",
        )  # fmt: skip
        check_forward_names(self, unknown, known, self.config)
        # Both before the encoder runs.
        self._check("src", src, src_key_padding_mask)
        self._check("tgt", tgt, tgt_key_padding_mask)
        memory = self.encode(src, src_key_padding_mask, is_causal=src_is_causal)
        return self.decode(
            tgt,
            memory,
            tgt_key_padding_mask,
            src_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )

    def encode(
        self, src: Tensor, src_key_padding_mask: Tensor | None = None, *, is_causal: bool = False
    ) -> Tensor:
        """The encoder's states, `(B, N, d_model)`, 0 for padding; arguments as of `forward`."""
        self._check("src", src, src_key_padding_mask)
        packed = None if src_key_padding_mask is None else PackedRows(src_key_padding_mask)
        x = self.embed(src if packed is None else packed.taken_from(src))
        rotation, documents = self._places(x, packed)
        x = self.run(
            self.encoder_blocks, x, rotation, check_bool("is_causal", is_causal), documents
        )
        x = self.encoder_norm(x)
        return x if packed is None else packed.put_back(x)

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        *,
        tgt_is_causal: bool = True,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Score every next token of `tgt`, given what `encode` returned.

        Args:
            memory: `(B, N, d_model)`.
            memory_key_padding_mask: `(B, N)`, True for rows of the memory that nobody sees.

        Other arguments, result and errors are those of `forward`.
        """
        states, packed = self._decoded(
            *(tgt, memory, tgt_key_padding_mask, memory_key_padding_mask),
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return self._scored(states if packed is None else packed.put_back(states))

    def loss(
        self,
        src: Tensor,
        tgt: Tensor,
        labels: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        *,
        src_is_causal: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        count: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of every next token of `tgt`, without ever holding the logits of all tokens.

        Example::

            model.loss(src, tgt).backward()

        Args:
            src, tgt, src_key_padding_mask, tgt_key_padding_mask, src_is_causal: As of `forward`.
            labels: `(B, M)`, int64: the token that comes after each of `tgt`, `ignore_index` where
                none counts. None: the next one of `tgt` that is no padding; the last has none.
            ignore_index, reduction, count: As of `dilated_core.linear_cross_entropy`.

        Returns:
            A scalar; for `reduction="none"` `(B, M)`, 0 for padding.

        Raises:
            TypeError, ValueError: As `forward` and `dilated_core.linear_cross_entropy`; or if the
                model has no tokens, or embeddings are given without labels.
        """
        if not self.config.num_tokens:
            raise ValueError("num_tokens is 0; a loss needs a model that scores tokens.")
        if labels is None and tgt.is_floating_point():
            raise ValueError("labels is None and tgt holds embeddings; give the labels.")
        if labels is not None:
            check_tokens("labels", labels, "(B, M)", ndim=2)
            if labels.shape != tgt.shape[:2]:
                raise ValueError(
                    f"labels has shape {tuple(labels.shape)} and tgt {tuple(tgt.shape)}; there "
                    f"must be one label for each position."
                )
        self._check("src", src, src_key_padding_mask)
        self._check("tgt", tgt, tgt_key_padding_mask)
        memory = self.encode(src, src_key_padding_mask, is_causal=src_is_causal)
        masks = tgt_key_padding_mask, src_key_padding_mask
        states, packed = self._decoded(tgt, memory, *masks)
        if labels is None:
            bounds = None if packed is None else packed.cu_seqlens
            tokens = tgt if packed is None else packed.taken_from(tgt)
            labels = next_tokens(tokens, bounds, ignore_index)
        elif packed is not None:
            labels = packed.taken_from(labels)
        loss = linear_cross_entropy(
            states,
            self.output.weight,
            labels,
            ignore_index=ignore_index,
            reduction=reduction,
            count=count,
        )
        return loss if packed is None or reduction != "none" else packed.put_back(loss)

    def _decoded(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_key_padding_mask: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        *,
        tgt_is_causal: bool = True,
        memory_is_causal: bool = False,
    ) -> tuple[Tensor, PackedRows | None]:
        """The states of the decoder, and how they are packed if `tgt` is padded."""
        self._check("tgt", tgt, tgt_key_padding_mask)
        check_memory_states(self.config, memory, memory_key_padding_mask, len(tgt))
        self._check_alignment(
            tgt, memory, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal
        )
        seen = Memory(memory, memory_is_causal, None, memory_key_padding_mask)
        packed = None if tgt_key_padding_mask is None else PackedRows(tgt_key_padding_mask)
        if packed is not None:
            hidden = memory_key_padding_mask
            if hidden is None:
                hidden = torch.zeros(memory.shape[:2], dtype=torch.bool, device=memory.device)
            rows = PackedRows(hidden)
            seen = Memory(rows.taken_from(memory), memory_is_causal, rows.cu_seqlens)
        x = self.embed(tgt if packed is None else packed.taken_from(tgt))
        rotation, documents = self._places(x, packed)
        is_causal = check_bool("tgt_is_causal", tgt_is_causal)
        x = self.run(self.blocks, x, rotation, is_causal, documents, memory=seen)
        return self.final_norm(x), packed

    def step(
        self, tgt: Tensor, cache: GenerationCache, lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Continue targets, each causal, token by token or several tokens at once.

        Example::

            cache = GenerationCache(model, memory=model.encode(src))
            logits = model.step(start_tokens, cache)  # scores the tokens after them

        Args:
            tgt: `(B, n)` tokens, or `(B, n, d_model)` embeddings, that come after those in the
                cache; the cache then holds them too.
            cache: Of the model, with the memory of the sources.
            lengths: B integers: the first `lengths[b]` tokens of target b are appended, and the
                others are padding. None: all.

        Returns:
            `(B, 1, num_tokens)` logits, or `(B, 1, d_model)` states, of the last token of each
            target; NaN for one of length 0. They have no gradient.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a shape does not fit, or the cache is of another model.
        """
        if not isinstance(cache, GenerationCache):
            raise TypeError(f"cache is a {type(cache).__name__}; it must be a GenerationCache.")
        if cache.config != self.config:
            raise ValueError(
                "cache was made for a model with another configuration; make it with "
                "GenerationCache(model, memory=model.encode(src))."
            )
        self._check("tgt", tgt, None)
        with torch.no_grad():
            return self._scored(self.last_states(tgt, cache, lengths))[:, None]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`, for `LongNet.load`.

        Args:
            folder: Made if it does not exist.

        Raises:
            ValueError: If the model is on the meta device.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        content = {"model": self.config.to_dict(), "tokenizer": "none"}
        save_model(path, self)
        write_config(path, content | {"architecture": _ARCHITECTURE})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, or holds another kind of model.
        """
        path = Path(folder)
        content = read_config(path)
        if content.get("architecture") != _ARCHITECTURE:
            raise ValueError(
                f"{str(path)!r} holds no LongNet of two sequences; load it with "
                f"dilated_models.load_model."
            )
        config = EncoderDecoderConfig.from_dict(content["model"])
        return load_weights(path, config, lambda: cls(config, device=device)).eval()

    def _scored(self, states: Tensor) -> Tensor:
        """Logits of states, or the states themselves."""
        return self.output(states) if self.config.num_tokens else states

    def _places(
        self, x: Tensor, packed: PackedRows | None
    ) -> tuple[PositionCode | None, Documents | None]:
        """The positions of the rows of `x`, and the sequences that are packed in it."""
        length = x.shape[0] if packed is not None else x.shape[1]
        counted = torch.arange(length, device=x.device)
        documents = None if packed is None else Documents.of(packed.cu_seqlens, counted)
        return self.rotation(documents, Shard(counted, length)), documents

    def _check(self, name: str, x: Tensor, padding: Tensor | None) -> None:
        """Check a sequence and its padding."""
        check_tensor(name, x)
        d_model = self.config.d_model
        if x.is_floating_point() or not self.config.num_tokens:
            if x.dim() != 3 or x.shape[2] != d_model or not x.is_floating_point():
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}; it must be floating "
                    f"of shape (batch, sequence, {d_model}), or int64 tokens for a model with "
                    f"num_tokens."
                )
        else:
            check_tokens(name, x, f"(B, S), or (B, S, {d_model}) if floating", ndim=2)
            self.check_known(name, x)
        if padding is not None:
            check_padding(f"{name}_key_padding_mask", padding, x)

    def _check_alignment(
        self,
        tgt: Tensor,
        memory: Tensor,
        padding: Tensor | None,
        memory_padding: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Refuse a causal memory whose rows are not those of `tgt`."""
        if not check_bool("memory_is_causal", is_causal):
            return
        same_padding = padding is memory_padding or (
            padding is not None
            and memory_padding is not None
            and torch.equal(padding, memory_padding)
        )
        if tgt.shape[:2] != memory.shape[:2] or not same_padding:
            raise ValueError(
                f"memory_is_causal is True, and tgt has {tuple(tgt.shape[:2])} positions and the "
                f"memory {tuple(memory.shape[:2])}; both must have the same length and the same "
                f"padding, so pass memory_is_causal=False."
            )
