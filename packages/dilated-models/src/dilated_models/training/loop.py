"""Optimiser steps, and the checkpoint from which they continue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dilated_core.atomic_write import write_atomically
from torch import Tensor, nn

from dilated_models.longnet.language_model import LongNetLM
from dilated_models.longnet.saving import checksum
from dilated_models.text.copies import PLAIN_SHARE, copied_row
from dilated_models.text.order import RowOrder
from dilated_models.text.streams import TokenStream
from dilated_models.text.windows import PackedWindows, text_row
from dilated_models.training.config import TrainingConfig
from dilated_models.training.duration import StepTimes
from dilated_models.training.evaluation import Evaluation, autocast_to, evaluate
from dilated_models.training.loss import WithLoss
from dilated_models.training.over_ranks import OverRanks, parts_of_rank, whole

CHECKPOINT_FILE = "checkpoint.pt"
_CHECKPOINT_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The numbers of one optimiser step.

    Attributes:
        step: Number of the step, from 1.
        loss: Mean over the batch, in nats per token.
        bits_per_byte: The same loss over the bytes of the targets.
        learning_rate: Used in this step.
        gradient_norm: Before clipping.
        num_tokens: Targets in the batch.
        seconds: Wall time of the step.
    """

    step: int
    loss: float
    bits_per_byte: float
    learning_rate: float
    gradient_norm: float
    num_tokens: int
    seconds: float


class TrainingState:
    """A model, its optimiser and the number of steps done.

    Args:
        model: On the device to train on.
        config: The numbers of the run.
        over: How the model is spread over processes; None: there is one.

    Attributes:
        step: Steps done.
        seconds: Wall time of all of them.
        times: Estimates the time of the steps to come.
    """

    def __init__(
        self, model: LongNetLM, config: TrainingConfig, over: OverRanks | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.over = over
        self._num_parts = parts_of_rank(
            config.batch_size, config.accumulation, 1 if over is None else over.dp
        )
        self._with_loss = WithLoss(model)
        if over is not None:
            over.wrap(self._with_loss)  # before the optimiser is made: FSDP replaces parameters
        self.times = StepTimes(config)
        self.step = 0
        self.seconds = 0.0
        self._has_begun = False
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of matrix products, or None for the parameters' own."""
        return torch.bfloat16 if self.config.dtype == "bfloat16" else None

    def steps(self, stream: TokenStream, order: RowOrder) -> Iterator[StepRecord]:
        """Train to the last step; yield after each step.

        Raises:
            FloatingPointError: If the loss or a gradient is not finite. The state is then that of
                the step before.
        """
        self.model.train()
        while self.step < self.config.steps:
            yield self._one_step(stream, order)

    def try_longest_windows(self) -> None:
        """Run windows of full length, before a file of the run exists: errors of a model come now.

        If windows grow, this takes the time of a step with the longest ones, forward and backward,
        because the first steps do not tell it. Else one window runs forward. Nothing changes but
        `times`.

        On several processes one window runs forward and backward. After its first backward pass
        DDP orders the gradients anew, and a sum over three ranks or more rounds by its place. So
        that a resumed run has the bits of one that was never stopped, this comes before its steps.
        """
        config = self.config
        grows = config.window_at(0) < config.seq_len and self.over is None
        rows = config.batch_size // config.accumulation if grows else 1
        tokens = torch.zeros(rows * config.seq_len, dtype=torch.int64)
        part = PackedWindows(tokens, tokens, tokens, torch.arange(rows + 1) * config.seq_len)
        self.model.train()
        if self.over is not None:
            self._total_loss(part).backward()
            self.optimizer.zero_grad(set_to_none=True)
            return
        # Dropout must not take numbers from the steps.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for _ in range(2 if grows else 1):  # the first time compiles and allocates
                begin = time.perf_counter()
                with torch.set_grad_enabled(grows):
                    loss = self._total_loss(part)
                if grows:
                    torch.autograd.grad(loss, list(self.model.parameters()))
                loss.item()  # waits for a GPU
                seconds = time.perf_counter() - begin
                if grows:
                    self.times.add(window=config.seq_len, seconds=seconds * config.accumulation)

    def evaluate(
        self,
        stream: TokenStream,
        *,
        max_tokens: int,
        batch_size: int,
        before_batch: Callable[[], None],
    ) -> Evaluation:
        """The loss on a text in windows of `seq_len` tokens; see `dilated_models.evaluate`.

        On several processes all of them call this, and each scores a part of the windows.
        """
        if self.over is not None:
            return self.over.evaluate(
                stream,
                seq_len=self.config.seq_len,
                max_tokens=max_tokens,
                batch_size=batch_size,
                autocast=self.autocast,
                before_batch=before_batch,
            )
        return evaluate(
            self.model,
            stream,
            seq_len=self.config.seq_len,
            max_tokens=max_tokens,
            batch_size=batch_size,
            autocast=self.autocast,
            before_batch=lambda done, total: before_batch(),
        )

    def whole_weights(self) -> dict[str, Tensor]:
        """The state dict of the model; on several processes all call this, and rank 0 gets it."""
        if self.over is not None:
            return self.over.whole_weights(self.model)
        return dict(self.model.state_dict())

    def _one_step(self, stream: TokenStream, order: RowOrder) -> StepRecord:
        begin = time.perf_counter()
        config, over = self.config, self.over
        parts = self._parts(stream, order)
        num_targets = sum(part.num_targets for part in parts)
        num_bytes = sum(part.num_bytes for part in parts)
        if over is not None:
            if not self._has_begun:
                for part in parts:
                    over.check_same_batch(part)
            num_targets, num_bytes = over.counts(num_targets, num_bytes)
            over.seed_dropout(config.seed, self.step)
        self._has_begun = True
        learning_rate = config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts):
            with self._backward_of(number):
                loss = self._total_loss(part) / max(1, num_targets)
                (loss if over is None else loss * over.factor).backward()
            total += loss.detach()
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip))
        mean = (total if over is None else over.sum(total)).item()
        if not math.isfinite(mean) or not math.isfinite(norm.item()):
            error = FloatingPointError(
                f"the loss or its gradient is not finite in step {self.step + 1}, on the rows "
                f"{self.step * config.batch_size} to {(self.step + 1) * config.batch_size - 1} of "
                f"the run; try a lower --lr than {config.learning_rate:g}."
            )
            raise error if over is None else over.ranks.on_all(error)
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        self.times.add(window=config.window_at(self.step), seconds=seconds)
        self.step += 1
        self.seconds += seconds
        return StepRecord(
            step=self.step,
            loss=mean,
            bits_per_byte=mean / math.log(2) * num_targets / max(1, num_bytes),
            learning_rate=learning_rate,
            gradient_norm=norm.item(),
            num_tokens=num_targets,
            seconds=seconds,
        )

    def _parts(self, stream: TokenStream, order: RowOrder) -> list[PackedWindows]:
        """The windows of this step in parts, without the rows of other ranks.

        A pure function of seed, step and rank.
        """
        config, step = self.config, self.step
        window = config.window_at(step)
        plain_step = step - config.copied_steps
        is_copied = plain_step < 0
        first = (step if is_copied else plain_step) * config.batch_size
        samples: Sequence[int] = range(first, first + config.batch_size)
        if self.over is not None:
            samples = self.over.rows(samples)
        if is_copied:
            rows = [
                copied_row(
                    stream,
                    seq_len=config.seq_len,
                    window=window,
                    seed=config.seed,
                    sample=sample,
                    plain_share=PLAIN_SHARE,
                )
                for sample in samples
            ]
        else:
            starts = [order.start(sample) for sample in samples]
            rows = [
                text_row(stream, start, start + config.seq_len, window=window) for start in starts
            ]
        rows_per_part = len(rows) // self._num_parts
        return [
            PackedWindows.of(rows[i : i + rows_per_part])
            for i in range(0, len(rows), rows_per_part)
        ]

    def _total_loss(self, part: PackedWindows) -> Tensor:
        """Nats of all targets together."""
        with autocast_to(self.autocast, self.device):
            if self.over is not None:
                return self.over.loss(part)
            inputs, targets = part.inputs.to(self.device), part.targets.to(self.device)
            return self._with_loss(inputs, targets, part.cu_seqlens)

    def _backward_of(self, part: int) -> AbstractContextManager[None]:
        return nullcontext() if self.over is None else self.over.backward_of(part, self._num_parts)

    def save(self, folder: Path, *, run_id: str = "") -> None:
        """Write all that is needed to continue, as `checkpoint.pt`, whole or not at all.

        The file holds tensors and plain values only, so `torch.load(..., weights_only=True)` reads
        it.

        Args:
            folder: Of the run.
            run_id: Identity of the run; `restore` refuses a checkpoint with another one.
        """
        content = {
            "format_version": _CHECKPOINT_FORMAT,
            "run_id": run_id,
            "step": self.step,
            "seconds": self.seconds,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        content["checksum"] = checksum(content)
        with write_atomically(folder / CHECKPOINT_FILE) as part, part.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # of a full disk, which PyTorch hides
                    raise error.__context__ from None
                raise

    def restore(self, folder: Path, *, run_id: str = "") -> None:
        """Continue from `checkpoint.pt`: weights, optimiser, random states and step.

        Args:
            folder: Of the run.
            run_id: As given to `save`.

        Raises:
            FileNotFoundError: If the folder has no checkpoint.
            ValueError: If the file is damaged or belongs to another run or model, or has more steps
                than the run has to do.
        """
        path = folder / CHECKPOINT_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {CHECKPOINT_FILE}; --resume must have one, so start again "
                f"in another folder."
            )
        content = _read_checkpoint(path, run_id)
        self.check_steps(content["step"])
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{str(path)!r} cannot be resumed from: {reason}") from error
        self.step, self.seconds = content["step"], content["seconds"]
        torch.set_rng_state(content["cpu_rng"])
        if self.device.type == "cuda" and content["cuda_rng"]:
            torch.cuda.set_rng_state_all(content["cuda_rng"])

    def check_steps(self, done: int) -> None:
        """Refuse a checkpoint that has more steps than the run.

        Raises:
            ValueError: If it has.
        """
        if done > self.config.steps:
            raise ValueError(
                f"steps is {self.config.steps} and the run has done {done}; it must be at least "
                f"that, so give more --steps or leave it out."
            )


def _read_checkpoint(path: Path, run_id: str) -> dict[str, Any]:
    """The content of a checkpoint, once its checksum and its run are found right."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        version, written = content["format_version"], content.pop("checksum", None)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes the unpickler raise nearly any type
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} cannot be resumed from: {reason}") from error
    if version != _CHECKPOINT_FORMAT:
        raise ValueError(
            f"{str(path)!r} cannot be resumed from: its format is {version!r}; it must be "
            f"{_CHECKPOINT_FORMAT}, so use the version of dilated-models that wrote it."
        )
    if checksum(content) != written:
        raise ValueError(
            f"{str(path)!r} is damaged: its checksum is wrong, so the bytes are not those that "
            f"were saved; put back a copy, or start again in another folder."
        )
    if content["run_id"] != run_id:
        raise ValueError(
            f"{str(path)!r} belongs to another run than its folder; put back the folder's own "
            f"checkpoint, or start again in another folder."
        )
    return content


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Linear weights decay; embeddings (and outputs tied to them), LayerNorms, biases do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_linear = parameter.ndim == 2 and id(parameter) not in embeddings
        (decayed if is_linear else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
