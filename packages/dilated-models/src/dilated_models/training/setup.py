"""Build a checked `Run` from a user's options, or from a run's folder; write no file."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, cast

import torch
from dilated_core.checks import check_choice

from dilated_models.config import LongNetConfig
from dilated_models.longnet.saving import CONFIG_FILE, is_edited, load_vocabulary, read_config
from dilated_models.text.files import Split, split_files, standard_library_files, text_files
from dilated_models.text.vocabulary import ByteVocabulary, TokenizerVocabulary
from dilated_models.training.config import PRESETS, TrainingConfig
from dilated_models.training.cost import most_validation_tokens
from dilated_models.training.folder import check_free
from dilated_models.training.ranks import Ranks
from dilated_models.training.run import Run
from dilated_models.training.tensorboard import check_tensorboard

_BRANCHES = ("segment_lengths", "dilation_rates")


def new_run(
    *,
    folder: Path,
    preset: str,
    text: Sequence[Path] | None,
    tokenizer: str,
    device: torch.device,
    model: Mapping[str, Any],
    training: Mapping[str, Any],
) -> Run:
    """A new run with the numbers of a preset.

    If `seq_len` is given without segment lengths, the preset's segment lengths are scaled by the
    same factor, and so is its first length of windows unless that is given. If `steps` is given,
    the preset's warm-up and its interval between validations are scaled by the same factor, unless
    they are given. A short run validates less often and on less text than the preset, so that
    validation takes about half as long as training at most.

    Args:
        folder: Folder of the run; must not hold another run.
        preset: A name in `PRESETS`.
        text: Files and folders; None means the standard library's sources.
        tokenizer: `"bytes"` or the path of a tokenizer file.
        device: Device to train on.
        model: Fields of `LongNetConfig` that replace the preset's.
        training: Fields of `TrainingConfig` that replace the preset's.

    Raises:
        FileNotFoundError: If a path does not exist.
        FileExistsError: If the folder holds a run, or is a file.
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range, or there is no text.
    """
    check_choice("preset", preset, tuple(PRESETS))
    base = PRESETS[preset]
    numbers = base.training | dict(training)
    if (steps := numbers["steps"]) != base.training["steps"] and steps > 0:
        for name in ("warmup_steps", "validate_every"):
            scaled = max(1, base.training[name] * steps // base.training["steps"])
            numbers[name] = training.get(name, scaled)
    if (seq_len := numbers["seq_len"]) != base.training["seq_len"] and seq_len > 0:
        first = base.training.get("first_seq_len")
        scaled = None if first is None else max(1, first * seq_len // base.training["seq_len"])
        numbers["first_seq_len"] = training.get("first_seq_len", scaled)
    if "growth" in training and numbers.get("first_seq_len") is None:
        raise ValueError(
            f"growth is {training['growth']:g} and first_seq_len is not given; windows grow from "
            f"that length, so give it too, or leave growth out."
        )
    config = _without_long_validation(TrainingConfig.from_dict(numbers), given=set(training))
    if config.tensorboard:
        check_tensorboard()
    fields = base.model | dict(model)
    if "segment_lengths" not in model and config.seq_len != base.training["seq_len"]:
        fields["segment_lengths"] = [
            max(1, length * config.seq_len // base.training["seq_len"])
            for length in base.model["segment_lengths"]
        ]
    kind = fields.get("attention_kind", "dilated")
    if kind == "ring":
        raise ValueError(
            "attention_kind is 'ring'; a run spreads the rows of a dilated model over processes by "
            "--cp, so leave attention_kind out and give that."
        )
    if kind != "dilated":  # no branches, unless they are given and refused
        fields = {name: x for name, x in fields.items() if name in model or name not in _BRANCHES}
    vocabulary = ByteVocabulary() if tokenizer == "bytes" else TokenizerVocabulary(Path(tokenizer))
    longnet = LongNetConfig.from_dict(fields | {"num_tokens": vocabulary.num_tokens})
    check_free(folder)
    if any(path.is_dir() and path.resolve() == folder.resolve() for path in text or ()):
        raise ValueError(
            f"{str(folder)!r} is both --text and --out; the run would write its files into its own "
            f"text, so choose another folder for --out, which may lie inside the text."
        )
    split = _split(text, config)
    return Run(
        folder=folder,
        model=longnet,
        training=config,
        split=split,
        run_id=secrets.token_hex(8),
        fingerprint=split.fingerprint(),
        text=None if text is None else [str(path.resolve()) for path in text],
        vocabulary=vocabulary,
        device=device,
    )


def resumed_run(folder: Path, *, device: torch.device, training: Mapping[str, Any]) -> Run:
    """The run in a folder, to continue it.

    Args:
        folder: Of a run that was stopped.
        device: Device to train on.
        training: Fields of `TrainingConfig` to change: those that change no step that is done.

    Raises:
        FileNotFoundError: If the folder holds no run, or its text is gone.
        ValueError: If the text is no longer the same.
    """
    content = read_config(folder)
    try:
        numbers = {**content["training"], **training}
        if numbers["steps"] != (before := content["training"]["steps"]):
            numbers["planned_steps"] = numbers.get("planned_steps") or before
        config = TrainingConfig.from_dict(numbers)
        model = LongNetConfig.from_dict(content["model"])
        paths, fingerprint = content["text"]["paths"], content["text"]["fingerprint"]
        text = None if paths is None else [Path(path) for path in _strings(paths)]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{str(folder / CONFIG_FILE)!r} cannot be resumed from: {error}; put back what dilated "
            f"train wrote there, or start a new run."
        ) from error
    if config.tensorboard:
        check_tensorboard()
    split = _split(text, config)
    if split.fingerprint() != fingerprint:
        raise ValueError(
            f"the text has changed since {str(folder)!r} was started (a file was added, removed, "
            f"renamed or edited); it must be the same to continue, so start a new run."
        )
    return Run(
        folder=folder,
        model=model,
        training=config,
        split=split,
        run_id=content.get("run_id", ""),
        fingerprint=fingerprint,
        text=paths,
        vocabulary=load_vocabulary(folder),
        device=device,
        is_edited=is_edited(content),
    )


def same_run(run: Run, ranks: Ranks) -> Run:
    """The run of rank 0, after a check that all ranks have made the same one.

    Raises:
        ValueError: On all ranks, if options or text differ between them.
    """
    content = run.to_config() | {"run_id": None}
    ranks.same("the model, training, text or version", json.dumps(content, sort_keys=True))
    folder, run_id = ranks.of_first((run.folder, run.run_id))
    return dataclasses.replace(run, folder=folder, run_id=run_id)


def _without_long_validation(config: TrainingConfig, *, given: Set[str]) -> TrainingConfig:
    """Lower what the user has not given: tokens of a validation, and how often there is one."""
    most = most_validation_tokens(
        config.steps, batch_size=config.batch_size, seq_len=config.seq_len
    )
    fields: dict[str, int] = {}
    for name in ("validation_tokens", "final_validation_tokens"):
        if name not in given:
            fields[name] = min(getattr(config, name), most)
    if "validate_every" not in given:
        scored = fields.get("validation_tokens", config.validation_tokens)
        fewest = -(-config.steps * scored // most)
        fields["validate_every"] = max(config.validate_every, fewest)
    return dataclasses.replace(config, **fields)


def _strings(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(x, str) for x in cast("Any", values)):
        raise TypeError(f"text.paths is {values!r}; it must be a list of paths")
    return cast("list[str]", values)


def _split(text: Sequence[Path] | None, config: TrainingConfig) -> Split:
    pieces, skipped = standard_library_files() if text is None else text_files(text)
    split = split_files(pieces, skipped, validation_share=config.validation_share)
    num_validation = sum(piece.num_bytes for piece in split.validation)
    if num_validation < 2 or not split.train:
        raise ValueError(
            f"the text has {sum(piece.num_bytes for piece in pieces)} bytes; it must have enough "
            f"to hold out {config.validation_share:g} of them for validation, so use more text."
        )
    return split
