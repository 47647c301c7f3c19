"""What a model keeps of the tokens before, to continue texts of any length in bounded memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from dilated_core.checks import check_integers
from dilated_core.decoding.cache import check_batch_indices
from dilated_core.positions.rotary import Rotation, check_decay_range, decay_reach, rotation_at
from torch import Tensor

from dilated_models.config import LongNetConfig
from dilated_models.layers.block_cache import BlockCache
from dilated_models.layers.cross_attention import CrossAttention
from dilated_models.layers.position_codes import (
    ALIBI_POSITIONS,
    AlibiPositions,
    PositionCode,
)
from dilated_models.layers.selection_history import SelectionHistory
from dilated_models.longnet.encoder_decoder_config import EncoderDecoderConfig, check_memory_states

if TYPE_CHECKING:
    from dilated_models.longnet.encoder_decoder import LongNet
    from dilated_models.longnet.language_model import LongNetLM

# Tokens of all sequences together in one part of a prompt. Activations of a part are held at once.
_TOKENS_PER_PART = 4096


class GenerationCache:
    """The state of texts that a `LongNetLM` continues: `model(tokens, cache=cache)`.

    Of a `LongNet` it is that of targets: `model.step(tokens, cache)`. Its memory is that of
    `dilated_core.DecodingCache` for each block, and does not grow with the texts. With a
    `local_window`, with an `attention_kind` without branches, and of attention to an encoder, it
    keeps all keys and values (for `"nsa"` all inputs), and memory and time for a token grow with
    the text. A model for `"ring"` continues whole texts: each rank those that it is given. Each
    text has a position of its own. `copy.copy` gives a cache that shares no memory.

    Args:
        model: The model. Its device and the dtype of its queries (that of autocast, inside such a
            region) are those of the cache.
        batch_size: Number of texts; 1 if None.
        max_seq_len: Most tokens of a text, if known. Longer segments then need no more memory than
            this many tokens, and a token beyond is an error. None: any number.
        memory: `(B, N, d_model)`, what a `LongNet` has made of its sources; B texts then.
        memory_key_padding_mask: `(B, N)`, True for rows of the memory that nobody sees.

    Attributes:
        blocks: What each block of the model keeps; of its decoder, if it has an encoder too.
        encoder_blocks: What each block of the encoder keeps.

    Raises:
        TypeError: If `model` is no LongNetLM or LongNet, or a size is no integer.
        ValueError: If a size is out of range, a LongNet gets no memory, or a LongNetLM gets one.

    Example:
        >>> from dilated_models import LongNetLM
        >>> model = LongNetLM(num_tokens=256, d_model=32, nhead=4, num_decoder_layers=2,
        ...                   dim_feedforward=64, segment_lengths=[8, 16], dilation_rates=[1, 2])
        >>> cache = GenerationCache(model)
        >>> prompt = torch.tensor([list(b"def ")])
        >>> model(prompt, cache=cache).shape  # scores the token after the prompt
        torch.Size([1, 1, 256])
        >>> model(torch.tensor([[102]]), cache=cache).shape
        torch.Size([1, 1, 256])
        >>> cache.positions
        (5,)
    """

    def __init__(
        self,
        model: LongNetLM | LongNet,
        batch_size: int | None = None,
        *,
        max_seq_len: int | None = None,
        memory: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> None:
        if not isinstance(getattr(model, "config", None), LongNetConfig):
            raise TypeError(f"model is a {type(model).__name__}; it must be a LongNetLM.")
        reads_two = isinstance(model.config, EncoderDecoderConfig)
        if reads_two != (memory is not None):
            raise ValueError(
                "memory is not given; a LongNet generates from a source, so give model.encode(src)."
                if reads_two
                else "memory is given; a LongNetLM makes its own from the text, so leave it out."
            )
        if memory is not None:
            batch_size = check_memory_states(
                model.config, memory, memory_key_padding_mask, batch_size
            )
        elif memory_key_padding_mask is not None:
            raise ValueError("memory_key_padding_mask is given without memory; leave it out.")
        batch_size = 1 if batch_size is None else batch_size
        self.config = model.config
        num_encoder_layers = 0 if reads_two else model.config.num_encoder_layers
        weight = model.first_weight
        self._device, self._dtype = weight.device, compute_dtype(weight)

        def caches(count: int, has_memory: bool) -> list[BlockCache]:
            return [
                BlockCache(
                    model.config,
                    has_memory=has_memory,
                    batch_size=batch_size,
                    device=self._device,
                    dtype=self._dtype,
                    max_seq_len=max_seq_len,
                )
                for _ in range(count)
            ]

        self.encoder_blocks = caches(num_encoder_layers, has_memory=False)
        self.blocks = caches(model.config.num_decoder_layers, has_memory=num_encoder_layers > 0)
        if memory is not None:
            self._fix_memory(model, memory, memory_key_padding_mask)
        self._centers = [0] * self.batch_size

    @torch.no_grad()
    def _fix_memory(
        self, model: LongNetLM | LongNet, memory: Tensor, hidden: Tensor | None
    ) -> None:
        """Project a memory once for each block, its visible rows first."""
        lengths = [memory.shape[1]] * len(memory)
        if hidden is not None:
            order = hidden.to(torch.int8).argsort(dim=1, stable=True)
            memory = memory.take_along_dim(order[..., None], dim=1)
            lengths = [int(count) for count in (~hidden).sum(1)]
        for block, kept in zip(model.blocks, self.blocks, strict=True):
            k, v = cast(CrossAttention, block.cross_attention).project_memory(memory)
            kept.fix_memory(k.to(self._dtype), v.to(self._dtype), lengths)

    @property
    def batch_size(self) -> int:
        """Number of texts, which `reorder` may change."""
        return self.blocks[0].attention.batch_size

    @property
    def positions(self) -> tuple[int, ...]:
        """Tokens that each text has so far, which is the position of its next token."""
        return self.blocks[0].attention.positions

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, and of the inputs of `key_conv`."""
        return sum(block.nbytes for block in self._all_blocks())

    def reset(self) -> None:
        """Forget all tokens and start again at position 0, in the same memory."""
        for block in self._all_blocks():
            block.reset()
        self._centers = [0] * self.batch_size

    def reorder(self, batch_indices: Tensor | Sequence[int]) -> None:
        """Make text i continue as a copy of what text `batch_indices[i]` was.

        Args:
            batch_indices: Integers in [0, batch_size), of one dimension. Their number becomes the
                batch size.

        Raises:
            TypeError: If it holds anything but integers.
            ValueError: If it does not have one dimension, or an index is out of range.
        """
        chosen = check_batch_indices(batch_indices, self.batch_size)
        indices = torch.tensor(chosen, dtype=torch.int64, device="cpu")
        for block in self._all_blocks():
            block.reorder(indices)
        self._centers = [self._centers[index] for index in chosen]

    def _all_blocks(self) -> list[BlockCache]:
        return [*self.encoder_blocks, *self.blocks]

    def __copy__(self) -> GenerationCache:
        # Two caches must not write to the same memory.
        return copy.deepcopy(self)

    def parts(
        self, tokens: Tensor, lengths: Tensor | Sequence[int] | None
    ) -> Iterator[tuple[Tensor, list[int] | None, PositionCode | None]]:
        """Cut new tokens into parts of bounded size; the caller runs each through the blocks.

        Args:
            tokens: `(B, n)`, or their embeddings `(B, n, d_model)`.
            lengths: As for `LongNetLM.forward`.

        Yields:
            The tokens of a part; how many of each sequence are not padding, None if all; and their
            positions as blocks encode them, None without positions.

        Raises:
            TypeError: If a length is no integer.
            ValueError: If the tokens do not fit the cache or the range of xPos.
        """
        B, n = tokens.shape[:2]
        if self.batch_size != B:
            raise ValueError(
                f"tokens has {B} sequences and the cache {self.batch_size}; they must be equal, so "
                f"make the cache with batch_size={B}."
            )
        if any(block.attention.positions != self.positions for block in self._all_blocks()):
            raise ValueError(
                "the blocks of the cache hold different numbers of tokens, because an earlier call "
                "was interrupted; call cache.reset(), or make a new cache."
            )
        counts = [n] * B if lengths is None else check_integers("lengths", lengths, B, at_most=n)
        limit = self.blocks[0].attention.max_seq_len
        for position, count in zip(self.positions, counts, strict=True):
            if limit is not None and position + count > limit:
                raise ValueError(
                    f"a text has {position} tokens and {count} more are given; max_seq_len of the "
                    f"cache is {limit}, so make it with a larger one."
                )
        if (
            self.config.attention_kind == "block_sparse_adaptive"
            and self.config.positions == "xpos"
        ):
            # Its sums of keys have the center at 0.
            last = max(map(sum, zip(self.positions, counts, strict=True))) - 1
            check_decay_range(last, self.config.xpos_scale_base, self._dtype)
        step = part_length(self.config, self.batch_size, self._dtype)
        for start in range(0, n, step):
            part = tokens[:, start : start + step]
            length = part.shape[1]
            now = [min(max(count - start, 0), length) for count in counts]
            if any(now):
                is_full = all(count == length for count in now)
                yield part, None if is_full else now, self._rotation(now, length)

    def _rotation(self, counts: Sequence[int], length: int) -> PositionCode | None:
        """Codes of `length` positions of each text from its own position on."""
        config = self.config
        # NSA keeps inputs, and makes the factors of a whole text itself.
        if config.positions == "none" or config.attention_kind == "nsa":
            return None
        if config.positions == "alibi":
            return self._alibi_positions(length)
        scale_base = config.xpos_scale_base if config.positions == "xpos" else None
        if scale_base is not None:
            self._move_centers(counts, scale_base)
        places = list(zip(self.positions, self._centers, strict=True))
        distinct = list(dict.fromkeys(places))
        device = self._device
        dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        rotations = [
            rotation_at(
                torch.arange(position, position + length, device=device),
                config.head_dim,
                scale_base=scale_base,
                center=center,
                dtype=dtype,
            )
            for position, center in distinct
        ]
        if len(rotations) == 1:
            return rotations[0]
        index = torch.tensor([distinct.index(place) for place in places], device=device)
        return Rotation(*(torch.stack(factors)[index] for factors in zip(*rotations, strict=True)))

    def _alibi_positions(self, length: int) -> AlibiPositions:
        if (last := max(self.positions) + length) > ALIBI_POSITIONS:
            raise ValueError(
                f"a text would have {last} tokens; ALiBi has positions for {ALIBI_POSITIONS}, so "
                f"use another model or begin the text anew."
            )
        starts = torch.tensor(self.positions, device=self._device)
        return AlibiPositions(starts[:, None] + torch.arange(length, device=self._device))

    def _move_centers(self, counts: Sequence[int], scale_base: float) -> None:
        """Keep the xPos factors of all keys that the next tokens see in the range of the dtype.

        xPos multiplies q by ζ^((t − center)/base) and divides k by ζ^((s − center)/base). The
        center cancels in every score, but it must be the same for a query and all keys that it
        sees, and near enough to both. When a text has gone too far from its center, the center
        moves, and the keys in the cache are multiplied by ζ^(move/base).
        """
        reach = decay_reach(scale_base, self._dtype)
        moves = [0] * self.batch_size
        for i, (position, count) in enumerate(zip(self.positions, counts, strict=True)):
            if count and position + count - 1 - self._centers[i] > reach:
                # As far ahead as the oldest visible key allows, so that centers move rarely.
                seen = _reach_of_attention(self.config, position + 1)
                center = max(0, position - seen + 1) + reach
                check_decay_range(position + count - 1 - center, scale_base, self._dtype)
                moves[i] = center - self._centers[i]
        for i, move in enumerate(moves):
            if not move:
                continue
            self._centers[i] += move
            pair = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64, device="cpu")
            zeta = (pair / self.config.head_dim + 0.4) / 1.4
            # Half of the move at a time: the factor of all of it may be out of range.
            factor = (zeta ** (move / 2 / scale_base)).repeat_interleave(2)
            for block in self._all_blocks():
                assert not isinstance(block.attention, SelectionHistory)  # its center never moves
                keys = block.attention.keys
                half = factor.to(keys.device, torch.promote_types(keys.dtype, torch.float32))
                keys[i].mul_(half).mul_(half)


def part_length(config: LongNetConfig, batch_size: int, dtype: torch.dtype) -> int:
    """Tokens of each text in a part of a prompt: few enough for xPos to be in range of the dtype.

    Args:
        config: Of the model.
        batch_size: Number of texts.
        dtype: Of q and k.
    """
    if config.attention_kind == "block_sparse_adaptive":
        return 2**48  # only a first part attends as a whole; later tokens select one by one
    length = max(1, _TOKENS_PER_PART // max(1, batch_size))
    if config.positions == "xpos":
        room = 2 * decay_reach(config.xpos_scale_base, dtype) - _reach_of_attention(config, 0)
        # Without room texts end, with an error, where xPos leaves the range.
        length = min(length, room) if room > 0 else length
    return length


def _reach_of_attention(config: LongNetConfig, num_tokens: int) -> int:
    """How many tokens back a token of a text of `num_tokens` may see."""
    if not config.has_branches:
        return num_tokens
    return max(*config.segment_lengths, config.local_window)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of q and k, which autocast chooses unless the weights are float64."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
