"""What ends a run because of another process."""


class RankLost(RuntimeError):  # noqa: N818 - the failure is another rank's
    """Another process of the run failed, or does not answer; this one ends because of it."""
