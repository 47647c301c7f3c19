"""What every rank of a group raises when one of them fails, or when they disagree."""

from __future__ import annotations

_ADVICE = "No rank of the group can go on: restart all from the last checkpoint, as torchrun does."


class RankFailure(RuntimeError):  # noqa: N818 - the failure is another rank's
    """A rank of the group failed, and this rank ends because of it.

    Attributes:
        rank: The rank that failed, counted in the world, as torchrun counts.
        cause: What happened to it.
    """

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(rank, cause)
        self.rank = rank
        self.cause = cause

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.cause} {_ADVICE}"


class DisagreementError(ValueError):
    """Arguments differ between ranks, or are wrong together.

    Every rank raises this alike; the group stays usable.
    """
