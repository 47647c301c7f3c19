"""Windows of the standard library's source files, plain and as edited copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dilated_models.text.copies import PLAIN_SHARE, copied_row
from dilated_models.text.files import split_files, standard_library_files
from dilated_models.text.streams import ByteStream
from torch import Tensor

from longnet_paper.sizes import Size

COPIED_SHARE = 0.4  # of the steps, the first ones


class Text:
    """Training batches of every length from the same files: those longer than the longest window.

    Args:
        size: Of the experiment.
    """

    def __init__(self, size: Size) -> None:
        split = split_files(*standard_library_files(), validation_share=0.05)
        longest = size.long[-1]
        self.size = size
        self.validation = ByteStream(split.validation)
        self.training = ByteStream([p for p in split.train if p.num_bytes > longest])
        starts = self.training.document_starts(0, len(self.training))
        self._first = starts
        self._lengths = np.diff(np.append(starts, len(self.training)))

    def batch(self, seq_len: int, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, `(tokens_per_step / S, S)`, of the same number of tokens for any S.

        The first `COPIED_SHARE` of the steps are the warm-up of `dilated train`: without it, so
        short a training does not use context beyond some ten bytes.
        """
        random = np.random.default_rng((seed, step))
        copies = step < COPIED_SHARE * self.size.steps
        rows: list[Any] = []
        for sample in range(self.size.tokens_per_step // seq_len):
            if copies and random.random() >= PLAIN_SHARE:
                row = copied_row(
                    self.training,
                    seq_len=seq_len,
                    window=seq_len,
                    seed=seed,
                    sample=step * self.size.tokens_per_step + sample,
                )
                rows.append(np.append(row.inputs, row.targets[-1]))
            else:
                rows.append(self._window(seq_len, random))
        windows = torch.from_numpy(np.stack(rows))
        return windows[:, :-1], windows[:, 1:]

    def _window(self, seq_len: int, random: np.random.Generator) -> Any:
        """S + 1 bytes inside one file; each place in the text is equally likely."""
        places = self._lengths - seq_len
        document = random.choice(len(places), p=places / places.sum())
        start = int(self._first[document] + random.integers(places[document]))
        return self.training.read(start, start + seq_len + 1)
