"""What ends the processes of a run though the run may continue."""


class RankLost(RuntimeError):  # noqa: N818 - the failure is another rank's
    """Another process of the run failed, or does not answer; this one ends because of it."""


class NeedsRestart(RuntimeError):  # noqa: N818 - the run goes on when its processes start again
    """A process ran out of memory and left a measure for the next start of all processes."""
