"""How the rows of a batch and the positions of a row are divided by the processes of a run."""

from __future__ import annotations

import math


def check_grid(size: int, *, cp: int, fsdp: bool) -> None:
    """Check how a run is spread over processes.

    Raises:
        ValueError: If the number of processes does not do.
    """
    if size % cp:
        raise ValueError(
            f"cp is {cp} and there {'is 1 process' if size == 1 else f'are {size} processes'}; cp "
            f"must divide their number, so start torchrun with another --nproc-per-node."
        )
    if fsdp and size == 1:
        raise ValueError(
            "fsdp is given and there is 1 process; there must be several to spread a model over, "
            "so start with torchrun --nproc-per-node N -m dilated_models.train."
        )


def parts_of_rank(batch_size: int, accumulation: int, dp: int) -> int:
    """In how many parts a rank computes its rows: no part is larger than on one process.

    Raises:
        ValueError: If the batch cannot be spread evenly.

    Example:
        >>> [parts_of_rank(12, 4, dp) for dp in (1, 2, 3, 4, 6)]
        [4, 2, 2, 1, 1]
    """
    if batch_size % dp:
        raise ValueError(
            f"batch_size is {batch_size} and its rows are spread over {dp} ranks; batch_size must "
            f"be a multiple of that, so use another --batch-size, another number of processes, or "
            f"--cp to spread the positions of each row instead."
        )
    rows = batch_size // dp
    most = batch_size // accumulation
    return next(n for n in range(math.ceil(rows / most), rows + 1) if rows % n == 0)
