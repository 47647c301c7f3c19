"""The layout of a decoding cache: which rows hold which keys, and index tensors on its device.

B batch, H heads, H_kv heads of k and v, D head_dim, w segment length, r dilation rate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dilated_core.pattern.branches import Branch, DilatedPattern, head_offset, kept_rows

# Positions have 64 bits on a device, and no cache ever sees this many tokens.
MAX_POSITION = 2**62


class Section(NamedTuple):
    """Rows of the cache that belong to one branch and one offset of heads.

    Attributes:
        offset: Position in a segment at which its heads start.
        first_row: Its first row in the cache.
        num_rows: Rows per head of k and v.
        kv_heads: The heads of k and v that it stores.
        q_heads: For each of them, the heads of q that read it: equally many.
    """

    offset: int
    first_row: int
    num_rows: int
    kv_heads: list[int]
    q_heads: list[list[int]]


def plan_sections(
    pattern: DilatedPattern,
    num_heads: int,
    num_kv_heads: int,
    max_seq_len: int | None,
    head_range: tuple[int, int] | None = None,
) -> tuple[list[list[Section]], int]:
    """The sections of each branch, one after the other in the cache, and the number of all rows.

    With `head_range` (first, total), head h here has the offset of head first + h of `total`.
    """
    first_head, total = head_range or (0, num_heads)
    sections: list[list[Section]] = []
    first_row = 0
    for w, r in pattern.branches:
        w = w if max_seq_len is None else min(w, max_seq_len)
        readers: dict[tuple[int, int], list[int]] = {}
        for head in range(num_heads):
            offset = head_offset(first_head + head, r, total, pattern.head_offsets)
            kv_head = head // (num_heads // num_kv_heads)
            readers.setdefault((offset, kv_head), []).append(head)
        # Where r does not divide H / H_kv, some heads of k and v have one reader more than others.
        # A section holds heads with equally many readers, so that its queries are a dense matrix.
        regular: dict[tuple[int, int], list[int]] = {}
        for (offset, kv_head), heads in readers.items():
            regular.setdefault((offset, len(heads)), []).append(kv_head)
        branch: list[Section] = []
        for (offset, _), kv_heads in regular.items():
            num_rows = kept_rows(w, r, offset)
            q_heads = [readers[offset, kv_head] for kv_head in kv_heads]
            branch.append(Section(offset, first_row, num_rows, kv_heads, q_heads))
            first_row += len(kv_heads) * num_rows
        sections.append(branch)
    return sections, first_row


class IndexedSection:
    """A section of the plan with its heads as index tensors on the device of the cache.

    Attributes:
        offset: Position in a segment at which its heads start.
        kv_heads: int64, the heads of k and v that it stores.
        q_heads: int64, the heads of q that read these, the ones of each together.
        shape: Heads of k and v, and heads of q that read each of them.
    """

    def __init__(self, section: Section, device: torch.device) -> None:
        self.offset = section.offset
        self.kv_heads = torch.tensor(section.kv_heads, device=device)
        self.q_heads = torch.tensor(section.q_heads, device=device).flatten()
        self._first_row = section.first_row
        self._num_rows = section.num_rows
        self.shape = (len(section.kv_heads), len(section.q_heads[0]))

    def view(self, cached: torch.Tensor) -> torch.Tensor:
        """The section's part of the keys or values: `(B, heads of k and v, rows, D)`."""
        B, _, D = cached.shape
        G, M = self.shape[0], self._num_rows
        return cached[:, self._first_row : self._first_row + G * M].view(B, G, M, D)


class CacheLayout(NamedTuple):
    """Which rows of a cache belong to which heads, made once so that a step copies nothing.

    The token at position t has the index i = t mod w in its segment. A branch keeps this token for
    the heads whose offset is i mod r, in row i // r of their section, and these heads see the rows
    up to this row. Heads with another offset see nothing of the branch. Heads of q that share an
    offset and a head of k and v read the same rows.

    Attributes:
        branches: w and r of each branch, clipped to 64 bits.
        sections: For each branch, its sections with their heads.
        branch_table: int64 `(branches, 2)`: `branches` on the device of the cache.
        offsets: int64 `(branches, H)`: position in a segment at which each head of q starts.
        first_rows: int64 `(branches, H)`: the first row of the section that each head of q reads.
    """

    branches: tuple[Branch, ...]
    sections: list[list[IndexedSection]]
    branch_table: torch.Tensor
    offsets: torch.Tensor
    first_rows: torch.Tensor


def index_sections(
    pattern: DilatedPattern,
    sections: list[list[Section]],
    num_heads: int,
    max_seq_len: int | None,
    device: torch.device,
) -> CacheLayout:
    """The sections of `plan_sections` with their index tensors on `device`."""
    longest = MAX_POSITION if max_seq_len is None else min(max_seq_len, MAX_POSITION)
    lengths = [min(w, longest) for w in pattern.segment_lengths]
    # A rate beyond w keeps what w as the rate keeps; the offsets are those of the rate itself.
    branches = tuple(
        Branch(w, min(r, w)) for w, r in zip(lengths, pattern.dilation_rates, strict=True)
    )
    # On the CPU whatever the default device is: they are filled entry by entry.
    table = torch.zeros(2, len(sections), num_heads, dtype=torch.int64, device="cpu")
    offsets, first_rows = table.unbind()
    for index, branch in enumerate(sections):
        for section in branch:
            for i, q_heads in enumerate(section.q_heads):
                offsets[index, q_heads] = section.offset
                first_rows[index, q_heads] = section.first_row + i * section.num_rows
    return CacheLayout(
        branches,
        [[IndexedSection(section, device) for section in branch] for branch in sections],
        torch.tensor(branches, device=device),
        offsets.to(device),
        first_rows.to(device),
    )
