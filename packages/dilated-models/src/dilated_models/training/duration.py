"""How long a run takes, from the times of its steps."""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Iterator

import numpy as np

from dilated_models.training.config import TrainingConfig
from dilated_models.training.contextwise import context_lengths
from dilated_models.training.cost import FORWARD_SHARE
from dilated_models.training.gain import most_targets

_STEPS_REMEMBERED = 15  # their median leaves out the first step, which compiles and allocates


class StepTimes:
    """Estimates the time of the steps to come.

    A step takes longer when its windows are longer. Each length has its own times, and a length
    that no step had yet gets what lies between its neighbours.

    Args:
        config: The numbers of the run.

    Example:
        >>> config = TrainingConfig(steps=10, batch_size=1, seq_len=64, first_seq_len=32,
        ...                         learning_rate=1e-3, warmup_steps=1, validate_every=5,
        ...                         checkpoint_every=5)
        >>> times = StepTimes(config)
        >>> times.add(window=64, seconds=3.0)
        >>> times.add(window=32, seconds=1.0)
        >>> times.left(0, scorable=0)  # 5 steps with windows of 32 tokens, and 5 with 64
        20.0
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._seconds: dict[int, deque[float]] = {}  # by window

    def add(self, *, window: int, seconds: float) -> None:
        """Count a step, or part of one that was scaled up, with windows of this length."""
        self._seconds.setdefault(window, deque(maxlen=_STEPS_REMEMBERED)).append(seconds)

    @property
    def longest(self) -> float:
        """Seconds of a step with windows of full length."""
        return self._of(self._config.seq_len)

    def _of(self, window: int) -> float:
        """Seconds of a step with windows of this length; 0 as long as no step was timed."""
        if not self._seconds:
            return 0.0
        known = sorted(self._seconds)
        seconds = [statistics.median_low(self._seconds[x]) for x in known]
        return float(np.interp(window, known, seconds))

    def left(self, step: int, *, scorable: int) -> float:
        """Seconds of all steps after this one, of the validations between them and of the report.

        Args:
            step: Steps done.
            scorable: Length of the validation text, in tokens.
        """
        config = self._config
        training = sum(
            (stop - start) * self._of(window) for window, start, stop in self._parts(step)
        )
        due = max(0, (config.steps - 1) // config.validate_every - step // config.validate_every)
        scored = due * min(config.validation_tokens, scorable)
        scored += min(config.final_validation_tokens, scorable)
        targets = min(most_targets(config.final_validation_tokens), scorable)
        # Half of each window of the contextwise loss are targets.
        scored += 2 * targets * len(context_lengths(config.seq_len))
        if every := config.sample_every:
            samples = config.steps // every - step // every
            targets = min(most_targets(config.validation_tokens), scorable)
            scored += samples * 2 * targets * len(context_lengths(config.seq_len))
        per_token = self.longest / (config.batch_size * config.seq_len)
        return training + scored * per_token / FORWARD_SHARE

    def _parts(self, step: int) -> Iterator[tuple[int, int, int]]:
        """Windows that still come, each with the first step that has it and one past the last."""
        steps = range(self._config.steps)
        while step < len(steps):
            window = self._config.window_at(step)
            # The length never falls, so a search finds where it next rises, in a million steps too.
            stop = bisect.bisect_right(steps, window, lo=step, key=self._config.window_at)
            yield window, step, stop
            step = stop
