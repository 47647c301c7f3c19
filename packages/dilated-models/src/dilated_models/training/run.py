"""One training run, from the first file in its folder to its report."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from dilated_core.atomic_write import write_atomically

from dilated_models.config import LongNetConfig
from dilated_models.longnet.language_model import LongNetLM
from dilated_models.longnet.saving import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    save_weights,
    write_config,
)
from dilated_models.longnet.size import peak_memory_bytes
from dilated_models.text.files import Split
from dilated_models.text.vocabulary import TokenizerVocabulary, Vocabulary
from dilated_models.training.checkpoints import remove_checkpoints, save_checkpoint
from dilated_models.training.compiled import compile_blocks
from dilated_models.training.config import TrainingConfig
from dilated_models.training.cost import fit_memory
from dilated_models.training.evaluation import Evaluation, scored_ranges
from dilated_models.training.gain import Gain, measure_gain, recorded_plain_training
from dilated_models.training.loop import StepRecord, TrainingState
from dilated_models.training.metrics import METRICS_FILE, open_metrics, read_metrics
from dilated_models.training.out_of_memory import MEASURE_FILE, after_measure, left_measure
from dilated_models.training.over_ranks import OverRanks
from dilated_models.training.ranks import Ranks
from dilated_models.training.report import plot_losses, xz_bits_per_byte
from dilated_models.training.samples import sample_now, sample_text
from dilated_models.training.stopping import Stopped, StopSignals
from dilated_models.training.tokens import Text

_SCORED_TOKENS = 4096  # in a batch of validation, at least: short windows alone would be slow


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that defines a run, checked before any of its files exists.

    Attributes:
        folder: Folder of its files.
        model: Configuration of the model.
        training: The numbers of the run.
        split: Training and validation text.
        run_id: Identity of the run, which its checkpoints carry.
        fingerprint: Of the text, from `Split.fingerprint`.
        text: The `--text` paths of the split; None for the standard library.
        vocabulary: Converts the text to tokens.
        device: Device to train on.
        is_edited: Whether `config.json`, from which a run is resumed, was edited by hand.
    """

    folder: Path
    model: LongNetConfig
    training: TrainingConfig
    split: Split
    run_id: str
    fingerprint: str
    text: Sequence[str] | None
    vocabulary: Vocabulary
    device: torch.device
    is_edited: bool = False

    def to_config(self) -> dict[str, Any]:
        """Content of `config.json`."""
        is_file = isinstance(self.vocabulary, TokenizerVocabulary)
        return {
            "run_id": self.run_id,
            "model": self.model.to_dict(),
            "tokenizer": TOKENIZER_FILE if is_file else "bytes",
            "training": self.training.to_dict(),
            "text": {
                "paths": None if self.text is None else list(self.text),
                "fingerprint": self.fingerprint,
                "train_bytes": sum(piece.num_bytes for piece in self.split.train),
                "validation_bytes": sum(piece.num_bytes for piece in self.split.validation),
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "dilated-core": version("dilated-core"),
                "dilated-models": version("dilated-models"),
            },
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a finished run.

    Attributes:
        evaluation: Loss on the validation text.
        xz_bits_per_byte: Bits per byte of `xz -9` on the same bytes.
        xz_bytes: Number of these bytes.
        gain: What the model gains from context; None if no document is long enough to tell.
        prompt: The beginning of the validation text.
        sample: Text that the model generated after the prompt.
    """

    evaluation: Evaluation
    xz_bits_per_byte: float
    xz_bytes: int
    gain: Gain | None
    prompt: str
    sample: str


class Observer(Protocol):
    """Receives progress events of a run."""

    def stepped(self, record: StepRecord) -> None:
        """Called after an optimiser step."""
        ...

    def validated(self, step: int, evaluation: Evaluation) -> None:
        """Called after a validation."""
        ...

    def busy(self, what: str) -> None:
        """Called before work other than a step, which `what` names."""
        ...

    def announce(self, text: str) -> None:
        """Called with what a user should read: a measure against a lack of memory, or a sample."""
        ...


def build(run: Run, over: OverRanks | None = None, *, compiler: str | None = None) -> TrainingState:
    """Model and optimiser of a run, drawn from its seed; writes no file.

    Args:
        run: The run.
        over: How the model is spread over processes, all of which call this; None: there is one.
        compiler: A backend of `torch.compile`, which compiles each block; None: no compilation.

    Raises:
        ValueError: If no backend can run the model, a window does not fit the model, or the memory
            does not suffice.
    """
    ranks = Ranks(run.device) if over is None else over.ranks
    dp, cp, fsdp = (1, 1, False) if over is None else (over.dp, over.cp, over.fsdp)
    left = ranks.first(lambda: left_measure(run.folder, ranks))
    measures = [] if left is None else [left]
    model_config, training = run.model, run.training
    for measure in measures:
        model_config, training = after_measure(model_config, training, measure)
    shards = ranks.size if fsdp else 1
    more = ranks.together(
        lambda: fit_memory(model_config, training, run.device, dp=dp, cp=cp, shards=shards)
    )
    measures += max(ranks.gather(more), key=len)  # of the rank that has least memory
    torch.manual_seed(run.training.seed)  # the same first weights on all ranks
    model = LongNetLM(run.model, device=run.device)
    if compiler is not None:
        compile_blocks(model, compiler)
    state = TrainingState(model, run.training, over)
    for measure in measures:
        state.take(measure)
    # These come from checks that all ranks make before they communicate.
    ranks.together(state.try_longest_windows, told=(ImportError, TypeError, ValueError))
    return state


def execute(
    run: Run,
    text: Text,
    state: TrainingState,
    observer: Observer,
    signals: StopSignals,
    ranks: Ranks,
) -> Report | None:
    """Train from the state's step to the last one, then validate and sample.

    Writes `config.json`, `metrics.jsonl`, a checkpoint, `model.safetensors` and `loss.png` into the
    run's folder, which the caller holds. A new run is saved before its first step, so that whatever
    happens it can be resumed. Rank 0 writes all of them but the checkpoint.

    Args:
        run: The run.
        text: From `open_text`.
        state: From `build`, perhaps restored.
        observer: Receives progress events.
        signals: Read between two steps. After a signal, the run saves its state and stops.
        ranks: The processes, all of which call this.

    Returns:
        The report; on other ranks than the first, None.

    Raises:
        Stopped: After a signal, when the state is saved; on all ranks, whichever got the signal.
        FloatingPointError: If the loss is no longer finite. The last checkpoint stays.
        OSError: If a file cannot be read or written. The last checkpoint stays.
    """
    run = dataclasses.replace(run, model=state.model.config, training=state.config)
    config, folder, validation = run.training, run.folder, text.validation
    # What was done before the first step holds from the step on from which the run continues.
    state.measures = [dataclasses.replace(x, step=state.step) for x in state.measures]
    _begin(run, state, ranks)
    with open_metrics(
        folder, after_step=state.step, ranks=ranks, has_tensorboard=config.tensorboard
    ) as metrics:

        def record_measures() -> None:
            nonlocal run, config
            if not state.measures:
                return
            run = dataclasses.replace(run, model=state.model.config, training=state.config)
            config = run.training
            for measure in state.measures:
                values = dataclasses.asdict(measure)
                metrics.write("out_of_memory", values.pop("step"), **values)
                observer.announce(str(measure))
            state.measures.clear()

            def remember() -> None:
                write_config(folder, run.to_config())  # for --resume
                (folder / MEASURE_FILE).unlink(missing_ok=True)

            ranks.first(remember)

        def save() -> None:
            observer.busy("saving")
            weights = state.whole_weights()
            ranks.first(metrics.sync)
            ranks.first(lambda: save_weights(folder, run.model, weights, run_id=run.run_id))
            save_checkpoint(state, folder, run_id=run.run_id, ranks=ranks)

        def stop_after_signal() -> None:
            received = ranks.largest(signals.received or 0)
            if received:
                save()
                if ranks.is_first:
                    plot_losses(folder, read_metrics(folder), copied_steps=config.copied_steps)
                raise Stopped(received, state.step)

        def validate(max_tokens: int) -> Evaluation:
            observer.busy("validating")
            result = state.evaluate(
                validation,
                max_tokens=max_tokens,
                batch_size=max(
                    config.batch_size // config.accumulation, _SCORED_TOKENS // config.seq_len
                ),
                before_batch=stop_after_signal,
            )
            if state.step not in metrics.validated:
                metrics.write("validation", state.step, bits_per_byte=result.bits_per_byte)
                observer.validated(state.step, result)
            return result

        def validate_if_due() -> None:
            due = state.step % config.validate_every == 0 and state.step < config.steps
            if due and state.step not in metrics.validated:
                validate(config.validation_tokens)

        def sample_if_due() -> None:
            every = config.sample_every
            if not every or state.step % every or state.step in metrics.sampled:
                return
            observer.busy("sampling")
            found = sample_now(
                state,
                run.vocabulary,
                validation,
                max_tokens=config.validation_tokens,
                check=stop_after_signal,
            )
            metrics.write("sample", state.step, **found.to_dict())
            observer.announce(f"step {state.step}: {found}")

        record_measures()
        stop_after_signal()
        validate_if_due()
        sample_if_due()
        for record in state.steps(text.train, text.order):
            record_measures()
            values = dataclasses.asdict(record) | {
                "peak_memory_bytes": peak_memory_bytes(run.device)
            }
            metrics.write("step", values.pop("step"), **values)
            observer.stepped(record)
            stop_after_signal()
            if state.step % config.checkpoint_every == 0 or state.step == config.steps:
                save()
            validate_if_due()
            sample_if_due()
        evaluation = validate(config.final_validation_tokens)
        with state.reporting():
            observer.busy("sampling")
            prompt, sample = sample_text(state.model, run.vocabulary, validation, stop_after_signal)
            observer.busy("measuring the gain from context")
            gain = _gain(run, state, text, stop_after_signal, ranks)
        if not ranks.is_first:
            return None
        observer.busy("compressing the same bytes with xz -9")
        ranges = scored_ranges(
            len(validation), seq_len=config.seq_len, max_tokens=config.final_validation_tokens
        )
        scored = b"".join(validation.text_of(start + 1, stop + 1) for start, stop in ranges)
        xz, xz_bytes = xz_bits_per_byte(scored)
        report = Report(
            evaluation=evaluation,
            xz_bits_per_byte=xz,
            xz_bytes=xz_bytes,
            gain=gain,
            prompt=prompt,
            sample=sample,
        )
        metrics.write("final", state.step, **dataclasses.asdict(report))
    plot_losses(folder, read_metrics(folder), copied_steps=config.copied_steps, xz=xz, gain=gain)
    return report


def _begin(run: Run, state: TrainingState, ranks: Ranks) -> None:
    """Write all that a resumed run needs; last `config.json`, which makes the folder a run's."""
    if not ranks.of_first((run.folder / CONFIG_FILE).exists()):
        weights = state.whole_weights()

        def write() -> None:
            (run.folder / METRICS_FILE).unlink(missing_ok=True)  # of a run that ended in here
            remove_checkpoints(run.folder)
            save_weights(run.folder, run.model, weights, run_id=run.run_id)
            if isinstance(run.vocabulary, TokenizerVocabulary):
                with write_atomically(run.folder / TOKENIZER_FILE) as part:
                    part.write_bytes(run.vocabulary.json_bytes)

        ranks.first(write)
        save_checkpoint(state, run.folder, run_id=run.run_id, ranks=ranks)
    ranks.first(lambda: write_config(run.folder, run.to_config()))
    ranks.remember_run(run.folder)


def _gain(
    run: Run, state: TrainingState, text: Text, check: Callable[[], None], ranks: Ranks
) -> Gain | None:
    """The contextwise loss, with a record of plain training beside it for the default text."""
    gain = measure_gain(
        state.model,
        text.validation,
        seq_len=run.training.seq_len,
        max_tokens=run.training.final_validation_tokens,
        training=text.train if ranks.is_first else None,
        autocast=state.autocast,
        before_batch=lambda done, total: check(),
        over=state.over,
    )
    is_default_text = run.text is None and not isinstance(run.vocabulary, TokenizerVocabulary)
    if gain is None or not is_default_text:
        return gain
    return dataclasses.replace(gain, plain=recorded_plain_training(run.model, run.training))
