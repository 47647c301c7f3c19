"""Training and scoring a LongNet: the loop, a run and its files, evaluation, report."""
