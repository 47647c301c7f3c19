"""What shall be computed, and how it is spread over devices."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from dilated_core.checks import check_bool, check_choice, check_integer

from dilated_models.config import LongNetConfig
from dilated_models.longnet.encoder_decoder_config import EncoderDecoderConfig
from dilated_models.longnet.generation_cache import part_length

Mode = Literal["training", "forward", "prefill", "decoding"]
Dtype = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "sgd"]
Layout = Literal["contiguous", "zigzag"]
Exchange = Literal["auto", "ring", "all_gather", "all_to_all"]

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_BYTES = {"adamw": 8, "sgd": 0}  # of a parameter: float32 means of gradient and square


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A step of training or inference of a model, and the devices that share it.

    The devices are a grid of dp × cp ranks, as in `dilated train`. Each of the dp groups of cp
    ranks has rows of its own, and its ranks share each of these sequences.

    Args:
        model: The model.
        seq_len: Tokens of a row; in `"decoding"`, of the context before the new token.
        mode: `"training"`: a step with forward, backward and optimiser. `"forward"`: scores of all
            tokens, without gradients. `"prefill"`: a prompt into a `GenerationCache`.
            `"decoding"`: one more token of each row, from such a cache.
        batch_size: Rows of all devices together.
        accumulation: Parts in which a batch is computed one after another.
        dtype: Of matrix products. In training the parameters are float32, and `"bfloat16"` is
            autocast; else the parameters have this dtype.
        devices: Number of devices.
        cp: Ranks that share a sequence.
        fsdp: Whether parameters, gradients and optimiser are spread over all ranks (FSDP2).
            Otherwise each rank holds all of them (DistributedDataParallel).
        layout, exchange: As in `ContextParallel`. Where they are left out, a model for `"ring"` has
            its own.
        chunked_loss: Whether the loss makes the logits of one chunk of tokens at a time, as that of
            `dilated train` does; False for a loss of whole logits.
        optimizer: `"adamw"` or `"sgd"`.
        memory_len: For a `LongNet` of two sequences, whose decoder is planned: rows of the encoder
            that it attends to; those of the longest source.
        on_gpu: Whether the devices are GPUs, where autocast runs LayerNorms in float32.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range, or two contradict each other.
    """

    model: LongNetConfig
    seq_len: int
    mode: Mode = "training"
    batch_size: int = 1
    accumulation: int = 1
    dtype: Dtype = "float32"
    devices: int = 1
    cp: int = 1
    fsdp: bool = False
    layout: Layout = "contiguous"
    exchange: Exchange = "auto"
    chunked_loss: bool = True
    optimizer: Optimizer = "adamw"
    memory_len: int | None = None
    on_gpu: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, LongNetConfig):
            raise TypeError(f"model is a {type(self.model).__name__}; it must be a LongNetConfig.")
        for name in ("seq_len", "batch_size", "accumulation", "devices", "cp"):
            check_integer(name, getattr(self, name), at_least=1)
        choices = {
            "mode": Mode, "dtype": Dtype, "optimizer": Optimizer, "layout": Layout,
            "exchange": Exchange,
        }  # fmt: skip
        for name, kind in choices.items():
            check_choice(name, getattr(self, name), get_args(kind))
        for name in ("fsdp", "chunked_loss", "on_gpu"):
            check_bool(name, getattr(self, name))
        self._check_mode()
        self._check_two_sequences()
        self._check_devices()

    def _check_mode(self) -> None:
        if self.mode == "training":
            if self.dtype == "float16":
                raise ValueError(
                    "dtype is 'float16' and mode is 'training'; in training it must be 'float32' "
                    "or 'bfloat16', because gradients leave the range of float16."
                )
            return
        for name, value in (("accumulation", 1), ("chunked_loss", True), ("optimizer", "adamw")):
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} and mode is {self.mode!r}; it is for "
                    f"training only, so leave it out."
                )
        options: dict[str, Any] = dict(self.model.attention_options)
        if self.mode != "forward" and options.get("gate_gradient") is not None:
            raise ValueError(
                f"gate_gradient of the model is {options['gate_gradient']!r} and mode is "
                f"{self.mode!r}; such a model has no generation cache, so use mode 'forward'."
            )
        if self.mode != "forward" and (self.cp > 1 or self.fsdp):
            name = "cp" if self.cp > 1 else "fsdp"
            raise ValueError(
                f"{name} is {getattr(self, name)} and mode is {self.mode!r}; a generation cache "
                f"lies on one device, so leave {name} out."
            )

    def _check_two_sequences(self) -> None:
        if not isinstance(self.model, EncoderDecoderConfig):
            if self.memory_len is not None:
                raise ValueError(
                    f"memory_len is {self.memory_len} and model a LongNetConfig, whose encoder "
                    f"reads the same text, so leave memory_len out."
                )
            return
        if self.mode not in ("prefill", "decoding"):
            raise ValueError(
                f"mode is {self.mode!r} and model an EncoderDecoderConfig; of a model of two "
                f"sequences the generation of one is planned, so use mode 'prefill' or 'decoding'; "
                f"or plan for a LongNetConfig with as many blocks."
            )
        if self.memory_len is None:
            raise ValueError(
                "memory_len is missing; a model of two sequences attends to the rows of an encoder,"
                " so give their number."
            )
        check_integer("memory_len", self.memory_len, at_least=1)

    def _check_devices(self) -> None:
        if self.devices % self.cp:
            raise ValueError(
                f"cp is {self.cp} and devices {self.devices}; cp must divide devices, because "
                f"devices = dp × cp."
            )
        if self.fsdp and self.devices == 1:
            raise ValueError(
                "fsdp is given and devices is 1; there must be several to spread parameters over, "
                "so give more devices."
            )
        parts = self.dp * self.accumulation
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of {parts}, because "
                f"{self.dp} groups of ranks have rows of their own and accumulation is "
                f"{self.accumulation}, so use another batch_size, or more cp."
            )
        if self.cp > 1:
            self.model.check_over_ranks()
            if self.model.local_window:
                raise ValueError(
                    f"cp is {self.cp} and the model has a local_window of "
                    f"{self.model.local_window}; over ranks it must have none, so leave one out."
                )

    @property
    def dp(self) -> int:
        """Groups of ranks with rows of their own."""
        return self.devices // self.cp

    @property
    def shards(self) -> int:
        """Ranks over which parameters are spread."""
        return self.devices if self.fsdp else 1

    @property
    def rows(self) -> int:
        """Rows of a rank that are in memory at once."""
        return self.batch_size // (self.dp * self.accumulation)

    @property
    def local_seq_len(self) -> int:
        """Tokens of a row on the rank that has most."""
        return -(-self.seq_len // self.cp)

    @property
    def tokens(self) -> int:
        """Tokens of a rank that are computed at once."""
        if self.mode == "decoding":
            return self.rows
        if self.mode == "prefill":
            return self.rows * self.prompt_part
        return self.rows * self.local_seq_len

    @property
    def prompt_part(self) -> int:
        """Tokens of each text in a part of a prompt."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return min(self.seq_len, part_length(self.model, self.rows, dtype))

    @property
    def has_cross(self) -> bool:
        """Whether blocks of the decoder attend to an encoder."""
        return self.model.num_encoder_layers > 0

    @property
    def num_blocks(self) -> int:
        """Blocks that a step computes: those of the encoder too, unless its states are given."""
        encoder = 0 if self.memory_len is not None else self.model.num_encoder_layers
        return encoder + self.model.num_decoder_layers

    @property
    def spreading(self) -> tuple[Layout, Exchange]:
        """Layout and exchange: those of the job, or else those of a model for `"ring"`."""
        own: dict[str, Any] = {}
        if self.model.attention_kind == "ring":
            own = dict(self.model.attention_options)
        return (
            own.get("layout", "contiguous") if self.layout == "contiguous" else self.layout,
            own.get("exchange", "auto") if self.exchange == "auto" else self.exchange,
        )

    @property
    def is_autocast(self) -> bool:
        """Whether products have another dtype than parameters."""
        return self.mode == "training" and self.dtype != "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of a number in products."""
        return ITEMSIZES[self.dtype]

    @property
    def parameter_itemsize(self) -> int:
        """Bytes of a number of a parameter."""
        return 4 if self.mode == "training" else self.itemsize

    def replace(self, **changes: Any) -> Job:
        """The job with some fields changed."""
        return dataclasses.replace(self, **changes)
