"""Folds of a fine-tuning on disk: each is trained once, and its files are written whole."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dilated_core.atomic_write import write_atomically
from numpy.typing import NDArray
from safetensors.torch import save

from dilated_models.checkpoints.slide import gigapath_state_dict
from dilated_models.pathology.classifier import SlideClassifier
from dilated_models.pathology.finetuning import (
    FineTuningConfig,
    StepReport,
    fine_tune,
    predict,
)
from dilated_models.pathology.labels import LabelledSlides, assign_folds
from dilated_models.pathology.scores import classification_scores
from dilated_models.slide.encoder import LongNetSlideEncoder

_SETTINGS_FILE = "finetune.json"


def cross_validate(
    make_encoder: Callable[[], LongNetSlideEncoder],
    slides: LabelledSlides,
    folder: Path,
    config: FineTuningConfig,
    *,
    folds: int,
    settings: Mapping[str, Any],
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, StepReport], None] = lambda fold, report: None,
    on_fold: Callable[[int, Mapping[str, float]], None] = lambda fold, scores: None,
) -> dict[str, tuple[float, float]]:
    """Train on all folds but one and score that one, for each fold.

    A fold whose files are in the folder is not trained again. `fold_0.safetensors` holds the
    weights under their published names, and `classifier.weight` and `.bias`; `fold_0.csv` the
    probabilities of its slides; `scores.json` the scores of all folds.

    Args:
        make_encoder: Returns the encoder to start from, with fresh copies of its weights.
        slides: The slides.
        folder: Gets the files; made if it does not exist.
        config: Of the fine-tuning.
        folds: Number of folds.
        settings: What the result depends on beside `config`, `folds` and labels.
        autocast: As for `fine_tune`.
        on_step: Called with the fold after each step.
        on_fold: Called with the scores of each fold.

    Returns:
        Mean and standard deviation over folds of each score.

    Raises:
        ValueError: If the folder holds folds with other settings, or as `assign_folds`.
    """
    assigned = assign_folds(slides, folds, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, slides, {**dataclasses.asdict(config), **settings, "folds": folds})
    scores: list[dict[str, float]] = []
    for fold in range(folds):
        test = np.flatnonzero(assigned == fold).tolist()
        path = folder / f"fold_{fold}.csv"
        if not path.exists():
            torch.manual_seed(config.seed)
            encoder = make_encoder()
            model = SlideClassifier(encoder, len(slides.classes), layers=config.layers)
            train = np.flatnonzero(assigned != fold).tolist()
            fine_tune(
                model,
                slides,
                train,
                config,
                autocast=autocast,
                on_step=lambda report, fold=fold: on_step(fold, report),
            )
            probabilities = predict(model, slides, test, config, autocast=autocast)
            _write_weights(folder / f"fold_{fold}.safetensors", model, slides)
            _write_predictions(path, slides, test, probabilities)
        scores.append(_scores_of(path, slides, test))
        on_fold(fold, scores[-1])
    summary = {
        name: (float(np.nanmean(values)), float(np.nanstd(values)))
        for name in scores[0]
        if (values := [fold[name] for fold in scores]) and not np.isnan(values).all()
    }
    with write_atomically(folder / "scores.json") as part:
        content = {"folds": scores, "mean": {k: v[0] for k, v in summary.items()}}
        part.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return summary


def _check_settings(folder: Path, slides: LabelledSlides, settings: Mapping[str, Any]) -> None:
    """Write what the folds depend on, or compare it with what was written."""
    names = [source.stem for source in slides.sources]
    content = {
        **settings,
        "classes": list(slides.classes),
        "labels": dict(zip(names, slides.labels.tolist(), strict=True)),
        "patients": dict(zip(names, slides.groups, strict=True)),
    }
    text = json.dumps(content, indent=2, default=list) + "\n"
    path = folder / _SETTINGS_FILE
    if not path.exists():
        with write_atomically(path) as part:
            part.write_text(text, "utf-8")
        return
    before, now = path.read_text("utf-8"), json.loads(text)
    if before == text:
        return
    try:
        old: Any = json.loads(before)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    differing = [name for name in sorted({*old, *now}) if old.get(name) != now.get(name)]
    raise ValueError(
        f"{str(folder)!r} holds folds with other {', '.join(differing)}; a folder must hold one "
        f"fine-tuning, so name another folder."
    )


def _write_weights(path: Path, model: SlideClassifier, slides: LabelledSlides) -> None:
    weights = gigapath_state_dict(model.slide_encoder)
    weights |= {f"classifier.{name}": w for name, w in model.classifier.state_dict().items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {"classes": json.dumps(list(slides.classes)), "layers": json.dumps(model.layers)}
    with write_atomically(path) as part:
        part.write_bytes(save(tensors, metadata))


def _write_predictions(
    path: Path, slides: LabelledSlides, test: list[int], probabilities: NDArray[np.float64]
) -> None:
    with write_atomically(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "label", *(f"p_{label}" for label in slides.classes)])
        for index, row in zip(test, probabilities.tolist(), strict=True):
            label = slides.classes[slides.labels[index]]
            writer.writerow([slides.sources[index].stem, label, *row])


def _scores_of(path: Path, slides: LabelledSlides, test: list[int]) -> dict[str, float]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    probabilities = np.array([[float(x) for x in row[2:]] for row in rows])
    return classification_scores(probabilities, slides.labels[test])
