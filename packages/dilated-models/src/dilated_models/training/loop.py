"""Optimiser steps, and the checkpoint from which they continue."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dilated_models.longnet.language_model import LongNetLM
from dilated_models.text.order import RowOrder
from dilated_models.text.streams import TokenStream
from dilated_models.text.windows import PackedWindows
from dilated_models.training.batches import Batch, batch_of_step
from dilated_models.training.checkpoint_file import (
    CHECKPOINT_FILE,
    CHECKPOINT_FORMAT,
    read_checkpoint,
    write_checkpoint,
)
from dilated_models.training.compiled import not_compiling
from dilated_models.training.config import TrainingConfig
from dilated_models.training.duration import StepTimes
from dilated_models.training.evaluation import Evaluation, autocast_to, evaluate
from dilated_models.training.grid import parts_of_rank
from dilated_models.training.loss import WithLoss
from dilated_models.training.optimizer import parameter_groups
from dilated_models.training.out_of_memory import (
    Measure,
    after_measure,
    is_out_of_memory,
    leave_measure,
    take_measure,
)
from dilated_models.training.over_ranks import OverRanks, whole


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


_Result = TypeVar("_Result")


class _Gradient(NamedTuple):
    """What a step has computed when its gradient is in the parameters."""

    loss: float
    norm: float
    num_targets: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) * self.num_targets / max(1, self.num_bytes)


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
        config: The numbers of the run, with those that measures have changed.
        measures: What was done against a lack of memory, and is not recorded yet.
    """

    def __init__(
        self, model: LongNetLM, config: TrainingConfig, over: OverRanks | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.over = over
        self.measures: list[Measure] = []
        self._with_loss = WithLoss(model)
        if over is not None:
            over.wrap(self._with_loss)  # before the optimiser is made: FSDP replaces parameters
        self.times = StepTimes(config)
        self.step = 0
        self.seconds = 0.0
        self._has_begun = False
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

    @property
    def _num_parts(self) -> int:
        dp = 1 if self.over is None else self.over.dp
        return parts_of_rank(self.config.batch_size, self.config.accumulation, dp)

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of matrix products, or None for the parameters' own."""
        return torch.bfloat16 if self.config.dtype == "bfloat16" else None

    def steps(self, stream: TokenStream, order: RowOrder) -> Iterator[StepRecord]:
        """Train to the last step; yield after each step.

        Raises:
            FloatingPointError: If the loss or a gradient is not finite; it names the rows. The
                state is then that of the step before.
            torch.OutOfMemoryError, RuntimeError, MemoryError: If a step does not fit into memory,
                and `on_out_of_memory` has no measure left. The state is that of the step before.
            NeedsRestart: On several processes, if it has one: all of them must start again.
        """
        self.model.train()
        while self.step < self.config.steps:
            yield self._one_step(stream, order)

    def try_longest_windows(self) -> None:
        """Run windows of full length, before a file of the run exists: errors of a model come now.

        If windows grow, this takes the time of a step with the longest ones, forward and backward,
        because the first steps do not tell it. Else one window runs forward, as in a step: without
        gradients a compiler would make a graph that no step uses. Nothing changes but `times`.

        On several processes one window runs forward and backward. After its first backward pass
        DDP orders the gradients anew, and a sum over three ranks or more rounds by its place. So
        that a resumed run has the bits of one that was never stopped, this comes before its steps.
        """
        self._fitting(self._run_longest_windows)

    def _run_longest_windows(self) -> None:
        config = self.config
        grows = config.window_at(0) < config.seq_len and self.over is None
        rows = config.batch_size // config.accumulation if grows else 1
        tokens = torch.zeros(rows * config.seq_len, dtype=torch.int64)
        part = PackedWindows(tokens, tokens, tokens, torch.arange(rows + 1) * config.seq_len)
        self.model.train()
        if self.over is not None:
            self._loss(part).backward()
            self.optimizer.zero_grad(set_to_none=True)
            return
        # Dropout must not take numbers from the steps.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for _ in range(2 if grows else 1):  # the first time compiles and allocates
                begin = time.perf_counter()
                loss = self._loss(part)
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
        scored = partial(evaluate, self.model) if self.over is None else self.over.evaluate
        return scored(
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

    @contextmanager
    def reporting(self) -> Generator[None]:
        """In the block the model is not compiled, and can generate, on all ranks at once."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(not_compiling(self.model))
            if self.over is not None:
                stack.enter_context(self.over.generating())
            yield

    def _one_step(self, stream: TokenStream, order: RowOrder) -> StepRecord:
        begin = time.perf_counter()
        learning_rate = self.config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        gradient = self._fitting(lambda: self._gradient(stream, order))
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        self.times.add(window=self.config.window_at(self.step), seconds=seconds)
        self.step += 1
        self.seconds += seconds
        return StepRecord(
            step=self.step,
            loss=gradient.loss,
            bits_per_byte=gradient.bits_per_byte,
            learning_rate=learning_rate,
            gradient_norm=gradient.norm,
            num_tokens=gradient.num_targets,
            seconds=seconds,
        )

    def _fitting(self, work: Callable[[], _Result]) -> _Result:
        """Do the work; if it does not fit into memory, take a measure and begin it anew."""
        devices = [self.device] if self.device.type == "cuda" else []
        while True:
            cpu, gpus = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in devices]
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                over = self.over
                measure = take_measure(
                    self.model.config,
                    self.config,
                    step=self.step,
                    error=error,
                    dp=1 if over is None else over.dp,
                )
                if measure is None:
                    raise
                if over is not None:
                    raise leave_measure(measure, over.ranks) from error
            # Only here is the memory free that the traceback of the error has held.
            self.take(measure)
            self.optimizer.zero_grad(set_to_none=True)
            torch.set_rng_state(cpu)
            for gpu, state in zip(devices, gpus, strict=True):
                torch.cuda.set_rng_state(state, gpu)
                torch.cuda.empty_cache()

    def take(self, measure: Measure) -> None:
        """Compute the steps from now on as a measure has them."""
        self.model.config, self.config = after_measure(self.model.config, self.config, measure)
        self.measures.append(measure)

    def _gradient(self, stream: TokenStream, order: RowOrder) -> _Gradient:
        """The gradient of a batch, clipped, in the parameters."""
        config, over = self.config, self.over
        batch = batch_of_step(
            config,
            self.step,
            stream,
            order,
            num_parts=self._num_parts,
            rows_of_rank=(lambda rows: rows) if over is None else over.rows,
        )
        num_targets, num_bytes = batch.num_targets, batch.num_bytes
        if over is not None:
            if not self._has_begun:
                for part in batch.parts:
                    over.check_same_batch(part)
            num_targets, num_bytes = over.counts(num_targets, num_bytes)
            over.seed_dropout(config.seed, self.step)
        self._has_begun = True
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        losses: list[Tensor] = []
        for number, part in enumerate(batch.parts):
            with self._backward_of(number):
                loss = self._loss(part, count=num_targets)
                (loss if over is None else loss * over.factor).backward()
            losses.append(loss.detach())
            total += losses[-1]
        clip = config.gradient_clip or math.inf
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), clip)).item()
        mean = (total if over is None else over.sum(total)).item()
        if not math.isfinite(mean) or not math.isfinite(norm):
            self._stop(batch, stream, losses, mean)
        return _Gradient(mean, norm, num_targets, num_bytes)

    def _stop(self, batch: Batch, stream: TokenStream, losses: list[Tensor], mean: float) -> None:
        """Raise an error that names rows; on several processes, all ranks raise the same."""
        is_loss = not math.isfinite(mean)
        own = batch.suspects(stream, [x.item() for x in losses] if is_loss else None)
        found = [own] if self.over is None else self.over.ranks.gather(own)
        where = next(places for places in found if places is not None)
        error = FloatingPointError(
            f"the {'loss' if is_loss else 'gradient'} is not finite in step {self.step + 1}, on "
            f"{where}; try a lower --lr than {self.config.learning_rate:g}."
        )
        raise error if self.over is None else self.over.ranks.on_all(error)

    def _loss(self, part: PackedWindows, *, count: int = 1) -> Tensor:
        """Nats of all targets together, divided by the count."""
        with autocast_to(self.autocast, self.device):
            if self.over is not None:
                return self.over.loss(part, count=count)
            inputs, targets = part.inputs.to(self.device), part.targets.to(self.device)
            return self._with_loss(inputs, targets, part.cu_seqlens, count=count)

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
            "format_version": CHECKPOINT_FORMAT,
            "run_id": run_id,
            "step": self.step,
            "seconds": self.seconds,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        write_checkpoint(folder / CHECKPOINT_FILE, content)

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
        content = read_checkpoint(path, run_id)
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
