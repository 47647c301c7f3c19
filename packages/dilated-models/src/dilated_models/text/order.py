"""Which stretch of the text each row of a batch is, as a pure function of seed and step."""

from __future__ import annotations

import hashlib

_FEISTEL_ROUNDS = 4


class RowOrder:
    """Rows of `seq_len` tokens, each once per epoch in an order drawn from the seed.

    Epoch e cuts the text into rows from a random phase of its own, and visits them in the order
    of a four-round Feistel permutation. Row i of the epoch is computed from i alone. So a resumed
    run needs only its step, and a long text needs no shuffled list in memory.

    Args:
        num_tokens: Length of the text, in tokens.
        seq_len: Inputs per row, in tokens; the target of the last one is one token further.
        seed: Of the order.

    Raises:
        ValueError: If the text is shorter than one row and its last target.

    Example:
        >>> order = RowOrder(num_tokens=41, seq_len=10, seed=0)
        >>> order.rows_per_epoch
        3
        >>> sorted(order.start(i) // 10 for i in range(3))
        [0, 1, 2]
    """

    def __init__(self, *, num_tokens: int, seq_len: int, seed: int) -> None:
        if num_tokens < seq_len + 1:
            raise ValueError(
                f"the training text has {num_tokens} tokens; it must have at least seq_len + 1 = "
                f"{seq_len + 1}, one window, so use more text or a smaller --seq-len."
            )
        self._seq_len = seq_len
        self._seed = seed
        spare = num_tokens - 1
        # One row fewer than would fit leaves room for the phase. A text of one row has none.
        self.rows_per_epoch = max(1, spare // seq_len - 1)
        self._phases = spare - self.rows_per_epoch * seq_len + 1
        self._half_bits = max(1, ((self.rows_per_epoch - 1).bit_length() + 1) // 2)

    def start(self, sample: int) -> int:
        """First token of the row with number `sample`, which counts from 0 over all epochs."""
        epoch, index = divmod(sample, self.rows_per_epoch)
        phase = self._hash(epoch, 0, 0) % min(self._phases, self._seq_len)
        return phase + self._permute(epoch, index) * self._seq_len

    def _permute(self, epoch: int, index: int) -> int:
        mask = (1 << self._half_bits) - 1
        # The permutation is of a power of 4, at most 4 times rows_per_epoch. Repeating it until
        # the index is in range takes less than 4 rounds on average.
        while True:
            left, right = index >> self._half_bits, index & mask
            for round_number in range(1, _FEISTEL_ROUNDS + 1):
                left, right = right, left ^ (self._hash(epoch, round_number, right) & mask)
            index = (left << self._half_bits) | right
            if index < self.rows_per_epoch:
                return index

    def _hash(self, *numbers: int) -> int:
        text = ",".join(map(str, (self._seed, *numbers)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
