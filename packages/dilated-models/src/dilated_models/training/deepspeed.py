"""The configuration file of DeepSpeed, read into the options of a run.

DeepSpeed itself is not used. Its ZeRO stages compute what DDP and FSDP2 compute, and those write
checkpoints from which any number of processes continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dilated_core.checks import check_integer, check_number

# Keys that change speed, memory or logs of DeepSpeed, and no number of a run.
_WITHOUT_EFFECT = {
    "": {"steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown"},
    "zero_optimization": {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    },
    "optimizer.params": {"torch_adam", "adam_w_mode", "eps"},
}
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """What a run takes from a configuration of DeepSpeed.

    Attributes:
        stage: ZeRO stage; from 1 on, FSDP2 spreads optimiser, gradients and weights.
        training: Fields of `TrainingConfig`, but for those of the batch.
        without_effect: Keys of the file that change no number and are not used here.
        sizes: The keys of `_SIZES` in the file.
    """

    stage: int
    training: Mapping[str, Any]
    without_effect: tuple[str, ...]
    sizes: Mapping[str, int]

    def training_over(self, dp: int) -> dict[str, Any]:
        """Fields of `TrainingConfig` for a batch that is spread over `dp` ranks.

        Raises:
            ValueError: If the sizes in the file contradict each other.
        """
        total, micro, parts = (self.sizes.get(name) for name in _SIZES)
        if total is None and micro is None:
            return dict(self.training)
        if total is None:
            total = cast("int", micro) * (parts or 1) * dp
        if micro is None:
            micro = max(1, total // ((parts or 1) * dp))
        if total % (micro * dp) or (parts is not None and total != micro * parts * dp):
            sizes = " and ".join(f"{name} {value}" for name, value in self.sizes.items())
            raise ValueError(
                f"the DeepSpeed file has {sizes}, and there are {dp} data-parallel ranks; "
                f"train_batch_size must be the product of the two others and the ranks, so leave "
                f"one of them out."
            )
        return {**self.training, "batch_size": total, "accumulation": total // micro}


def read_deepspeed(path: Path) -> DeepSpeedConfig:
    """Read a configuration file of DeepSpeed; `"auto"` is as if the key were missing.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If a value has the wrong type.
        ValueError: If the file is no JSON, or has a key that a run cannot honour.
    """
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object; it must be a DeepSpeed file.")
    reader = _Reader(str(path))
    reader.section("", cast("dict[str, Any]", content))
    return DeepSpeedConfig(
        stage=reader.stage,
        training=reader.training,
        without_effect=tuple(reader.without_effect),
        sizes=reader.sizes,
    )


def merged_with(
    from_file: Mapping[str, Any], options: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """The fields of a file and those of the command's options.

    Raises:
        ValueError: If both give a number.
    """
    twice = sorted({*from_file} & {*options, *(["dtype"] if dtype != "auto" else [])})
    if twice:
        raise ValueError(
            f"{twice[0]} is given as an option and in the DeepSpeed file; leave out one of them."
        )
    return {**from_file, **options}


class _Reader:
    def __init__(self, path: str) -> None:
        self.path = path
        self.stage = 0
        self.training: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}
        self.without_effect: list[str] = []
        self._known: dict[str, Callable[[str, Any], None]] = {
            **dict.fromkeys(_SIZES, self._size),
            "gradient_clipping": self._number("gradient_clip"),
            "zero_optimization": self.section,
            "zero_optimization.stage": self._stage,
            "optimizer": self.section,
            "optimizer.type": self._optimizer,
            "optimizer.params": self.section,
            "optimizer.params.lr": self._number("learning_rate"),
            "optimizer.params.weight_decay": self._number("weight_decay"),
            "optimizer.params.betas": self._betas,
            "bf16": self.section,
            "bf16.enabled": self._bfloat16,
            "fp16": self.section,
            "fp16.enabled": self._float16,
        }

    def section(self, name: str, values: Any) -> None:
        if not isinstance(values, dict):
            self.refuse(name, repr(values), "an object")
        for key, value in cast("dict[str, Any]", values).items():
            full = f"{name}.{key}" if name else key
            if value == "auto":
                continue
            if key in _WITHOUT_EFFECT.get(name, ()):
                self._check_without_effect(full, value)
                self.without_effect.append(full)
            elif full in self._known:
                self._known[full](full, value)
            else:
                raise ValueError(
                    f"{self.path!r} has {full}, which dilated train does not honour; leave it out, "
                    f"or use DeepSpeed's own launcher."
                )

    def refuse(self, name: str, value: str, rule: str) -> None:
        raise ValueError(f"{self.path!r} has {name} {value}; it must be {rule}.")

    def _check_without_effect(self, name: str, value: Any) -> None:
        if name == "optimizer.params.eps" and value != 1e-8:
            self.refuse(name, repr(value), "1e-8")
        if name == "optimizer.params.adam_w_mode" and value is not True:
            self.refuse(name, repr(value), "true: weight decay is AdamW's")

    def _size(self, name: str, value: Any) -> None:
        self.sizes[name] = check_integer(name, value, at_least=1)

    def _number(self, field: str) -> Callable[[str, Any], None]:
        def read(name: str, value: Any) -> None:
            self.training[field] = check_number(name, value, at_least=0)

        return read

    def _betas(self, name: str, value: Any) -> None:
        betas = cast("list[Any]", value) if isinstance(value, list) else []
        if len(betas) != 2:
            self.refuse(name, str(betas), "two numbers")
        for field, beta in zip(("beta1", "beta2"), betas, strict=True):
            self.training[field] = check_number(name, beta, at_least=0, below=1)

    def _stage(self, name: str, value: Any) -> None:
        self.stage = check_integer(name, value, at_least=0, at_most=3)

    def _optimizer(self, name: str, value: Any) -> None:
        if value not in ("Adam", "AdamW"):  # DeepSpeed's Adam is AdamW, unless adam_w_mode is false
            self.refuse(name, repr(value), "Adam or AdamW")

    def _bfloat16(self, name: str, value: Any) -> None:
        if value is True:
            self.training["dtype"] = "bfloat16"
        elif value is not False:
            self.refuse(name, repr(value), "true or false")

    def _float16(self, name: str, value: Any) -> None:
        if value is not False:
            self.refuse(name, repr(value), "false: use bf16, which needs no scaling of the loss")
