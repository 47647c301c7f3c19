"""How well class probabilities fit labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def classification_scores(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> dict[str, float]:
    """Accuracy, balanced accuracy, AUROC and quadratic kappa.

    Args:
        probabilities: `(N, C)`.
        labels: `(N,)`, each in [0, C).

    Returns:
        `accuracy`; `balanced_accuracy`, the mean recall of the classes that occur; `macro_auroc`,
        the mean over classes against the rest, NaN where no class has both; `quadratic_kappa`.

    Example:
        >>> scores = classification_scores(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 1]))
        >>> scores["accuracy"], scores["macro_auroc"], scores["quadratic_kappa"]
        (1.0, 1.0, 1.0)
    """
    C = probabilities.shape[1]
    guessed = probabilities.argmax(axis=1)
    confusion = np.zeros((C, C))
    np.add.at(confusion, (labels, guessed), 1)
    occurring = confusion.sum(axis=1) > 0
    recalls = confusion.diagonal()[occurring] / confusion.sum(axis=1)[occurring]
    areas = [_auroc(probabilities[:, c], labels == c) for c in range(C)]
    known = [area for area in areas if not np.isnan(area)]
    return {
        "accuracy": float((guessed == labels).mean()),
        "balanced_accuracy": float(recalls.mean()),
        "macro_auroc": float(np.mean(known)) if known else float("nan"),
        "quadratic_kappa": _kappa(confusion),
    }


def _auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Probability that a positive has the higher score than a negative; ties count a half."""
    high, low = scores[positive], np.sort(scores[~positive])
    if not len(high) or not len(low):
        return float("nan")
    below, up_to = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + up_to).mean() / (2 * len(low)))


def _kappa(confusion: NDArray[np.float64]) -> float:
    """Cohen's kappa with quadratic weights; NaN if labels and guesses are all of one class."""
    position = np.arange(len(confusion))
    weights = np.square(position[:, None] - position)
    by_chance = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / confusion.sum()
    expected = float((weights * by_chance).sum())
    return 1 - float((weights * confusion).sum()) / expected if expected else float("nan")
