"""Labels of slides from a CSV file, and their division into folds."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dilated_core.checks import check_integer
from numpy.typing import NDArray

_SLIDE_SUFFIXES = (".h5", ".hdf5", ".npz", ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn")


@dataclass(frozen=True)
class LabelledSlides:
    """Feature files with labels.

    Attributes:
        sources: Feature files, in the order of the CSV file.
        labels: int64 `(N,)`, index into `classes` of each.
        groups: Of each slide, the patient; slides of one patient stay in one fold.
        classes: The labels as they are written, sorted; numbers by value.
    """

    sources: Sequence[Path]
    labels: NDArray[np.int64]
    groups: Sequence[str]
    classes: Sequence[str]


def read_labels(
    path: Path,
    sources: Sequence[Path],
    *,
    slide_column: str = "slide_id",
    label_column: str = "label",
    patient_column: str | None = None,
) -> LabelledSlides:
    """Read the labels of feature files; files without a label are left out.

    Args:
        path: A CSV file with a header.
        sources: Feature files; a slide is named after its file, without its suffix.
        slide_column: Holds names of slides, with or without a suffix such as `.svs`.
        label_column: Holds labels.
        patient_column: Holds patients; None: each slide is a patient of its own.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column or a feature file is missing, a slide has two labels, or there are
            not two classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        for column in filter(None, (slide_column, label_column, patient_column)):
            if column not in columns:
                raise ValueError(
                    f"{str(path)!r} has the columns {', '.join(columns) or 'none'}; it must have "
                    f"{column!r}, so name the right column."
                )
        rows = list(reader)
    by_name = {source.stem: source for source in sources}
    found: dict[str, tuple[str, str]] = {}
    missing: list[str] = []
    for row in rows:
        name = _without_suffix(row[slide_column] or "")
        entry = ((row[label_column] or "").strip(), row[patient_column] if patient_column else name)
        if not entry[0]:
            continue
        if name not in by_name:
            missing.append(name)
        elif found.setdefault(name, entry) != entry:
            raise ValueError(
                f"{str(path)!r} has two rows for {name!r} that differ; each slide must have one."
            )
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(rows)} labelled slides have no feature file, the first "
            f"{missing[0]!r}; each must have one, so extract its features or leave out its row."
        )
    classes = _sorted({label for label, _ in found.values()})
    if len(classes) < 2:
        raise ValueError(
            f"the labelled slides have {len(classes)} classes; they must have at least 2."
        )
    index: Mapping[str, int] = {label: i for i, label in enumerate(classes)}
    return LabelledSlides(
        [by_name[name] for name in found],
        np.array([index[label] for label, _ in found.values()], dtype=np.int64),
        [group for _, group in found.values()],
        classes,
    )


def _without_suffix(name: str) -> str:
    name = Path(name.strip()).name
    for suffix in _SLIDE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _sorted(labels: set[str]) -> list[str]:
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)


def assign_folds(slides: LabelledSlides, folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each slide, `(N,)`: patients whole, and classes spread evenly.

    Patients are shuffled, sorted by their most frequent class, and dealt out in turn.

    Raises:
        TypeError: If `folds` is no integer.
        ValueError: If there are fewer patients than folds.

    Example:
        >>> slides = LabelledSlides([Path(n) for n in "abcd"], np.array([0, 1, 0, 1]),
        ...                         ["p", "q", "r", "s"], ["no", "yes"])
        >>> folds = assign_folds(slides, 2, seed=0)
        >>> sorted(slides.labels[folds == 0].tolist()), sorted(slides.labels[folds == 1].tolist())
        ([0, 1], [0, 1])
    """
    folds = check_integer("folds", folds, at_least=2)
    members: dict[str, list[int]] = {}
    for i, group in enumerate(slides.groups):
        members.setdefault(group, []).append(i)
    if len(members) < folds:
        raise ValueError(
            f"folds is {folds} and there are {len(members)} patients; there must be at least as "
            f"many patients as folds."
        )
    groups = list(members)
    np.random.default_rng(seed).shuffle(groups)
    groups.sort(key=lambda group: int(np.bincount(slides.labels[members[group]]).argmax()))
    assigned = np.empty(len(slides.labels), dtype=np.int64)
    for turn, group in enumerate(groups):
        assigned[members[group]] = turn % folds
    return assigned
