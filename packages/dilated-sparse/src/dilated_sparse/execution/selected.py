"""Run attention over a selection: each batch row and head of k and v has lists of its own.

Shapes: B batch, S positions, K heads of k and v, G heads of q that share one of k, N blocks, L
positions of a block, D head_dim, R = B·K·N rows of blocks, n rows of one call.

Every tensor is copied once into blocks `(R, L, …)`. A call of the backend takes rows that keep
equally many blocks as its batch, from any batch row and head, so the number of calls depends on the
amount of work and not on how selections differ. Nothing is cached between calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from dilated_core import AttentionBackend, AttentionOptions, AttentionOutput, Gradients, fold_
from dilated_core.dropout import DropoutRows, dropout_rows
from dilated_core.merge import accumulation_dtype
from torch.nn.functional import pad

from dilated_sparse.execution.plan import gathered_bytes
from dilated_sparse.execution.run import gradients_through_lse, takes_earlier_keys
from dilated_sparse.pattern.selection import BlockSelection


class SelectedCall(NamedTuple):
    """Everything that determines a call, apart from its tensors.

    Attributes:
        backend: Runs forward and backward.
        selection: The kept blocks.
        block_size: L.
        options: `key_padding_mask` is `(B, S)`; `is_causal` is that of the whole call.
    """

    backend: AttentionBackend
    selection: BlockSelection
    block_size: int
    options: AttentionOptions


class _Task(NamedTuple):
    """One call of the backend.

    Attributes:
        rows: int64 `(n,)`, its rows of blocks; None for all of them.
        columns: int64 `(n · count,)`, the blocks of keys of each; None for the row itself.
        num_keys: Positions of the blocks of a row together.
        is_causal: The last block of keys is the row itself, and query i sees keys j ≤ i of it.
        is_first: No earlier task has these rows.
    """

    rows: torch.Tensor | None
    columns: torch.Tensor | None
    num_keys: int
    is_causal: bool
    is_first: bool


@dataclass(frozen=True, slots=True)
class _Blocks:
    """How `(B, S, H, …)` tensors become blocks and back."""

    batch: int
    seq_len: int
    num_kv_heads: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        return -(-self.seq_len // self.block_size)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, S, H, …)` -> contiguous `(R, L, H/K, …)`, with 0 behind position S."""
        rest = x.shape[3:]
        missing = self.num_blocks * self.block_size - self.seq_len
        if missing:
            x = pad(x, (0,) * (2 * (x.dim() - 2)) + (0, missing))
        K = self.num_kv_heads
        x = x.reshape(self.batch, self.num_blocks, self.block_size, K, x.shape[2] // K, *rest)
        return x.movedim(3, 1).reshape(-1, self.block_size, x.shape[4], *rest)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`: contiguous `(B, S, H, …)`."""
        rest = x.shape[3:]
        x = x.view(self.batch, self.num_kv_heads, self.num_blocks, *x.shape[1:]).movedim(1, 3)
        x = x.reshape(self.batch, -1, self.num_kv_heads * x.shape[4], *rest)
        return x[:, : self.seq_len].contiguous()


def forward(
    call: SelectedCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> AttentionOutput:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`, not differentiable."""
    wide = accumulation_dtype(q.dtype)
    if not q.numel():
        return AttentionOutput(torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=wide))
    keys = _Keys.of(call, k, v)
    q_blocks = keys.blocks.split(q)
    into = AttentionOutput(
        q_blocks.new_empty(q_blocks.shape, dtype=wide),
        q_blocks.new_empty(q_blocks.shape[:-1], dtype=wide),
    )
    dropout = _dropout_rows(call.options, q, keys.blocks)
    for task in _tasks(call, q, keys.blocks):
        options = keys.options(call.options, task, dropout)
        result = call.backend.forward(_rows(q_blocks, task), *keys.of_task(task), options)
        if task.is_first:
            _put(into.out, task, result.out)
            _put(into.lse, task, result.lse)
        else:
            merged = AttentionOutput(_rows(into.out, task), _rows(into.lse, task))
            fold_(merged, result)
            _put(into.out, task, merged.out)
            _put(into.lse, task, merged.lse)
    return AttentionOutput(keys.blocks.join(into.out).to(q.dtype), keys.blocks.join(into.lse))


def backward(
    call: SelectedCall,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Gradients:
    """Contiguous gradients of q, k, v from those of out and, unless None, of lse."""
    if not q.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    wide = accumulation_dtype(q.dtype)
    keys = _Keys.of(call, k, v)
    # A row that sees no key at all: exp(score − ∞) is 0, where exp(−∞ + ∞) would be NaN.
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    delta = (dout.to(wide) * out.to(wide)).sum(-1)
    split = keys.blocks.split
    dropout = _dropout_rows(call.options, q, keys.blocks)
    q, dout, out, lse, delta = (split(x) for x in (q, dout, out, lse, delta))
    dlse = None if dlse is None else split(dlse)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (keys.k, keys.v))
    for task in _tasks(call, q, keys.blocks):
        options = keys.options(call.options, task, dropout)
        dout_rows, q_rows, out_rows, lse_rows, delta_rows = (
            _rows(x, task) for x in (dout, q, out, lse, delta)
        )
        k_rows, v_rows = keys.of_task(task)
        dq_rows, dk_rows, dv_rows = call.backend.backward(
            dout_rows, q_rows, k_rows, v_rows, out_rows, lse_rows, options, delta=delta_rows
        )
        if dlse is not None:
            more = gradients_through_lse(
                call.backend, options, _rows(dlse, task), q_rows, k_rows, lse_rows
            )
            dq_rows, dk_rows = dq_rows + more[0], dk_rows + more[1]
        _put(dq, task, dq_rows if task.is_first else _rows(dq, task) + dq_rows)
        keys.add(dk, task, dk_rows)
        keys.add(dv, task, dv_rows)
    dq, dk, dv = (keys.blocks.join(x).to(y.dtype) for x, y in ((dq, q), (dk, k), (dv, v)))
    if (mask := call.options.key_padding_mask) is not None:
        for grad in (dk, dv):
            grad.masked_fill_(mask[:, :, None, None], 0)
    return dq, dk, dv


def _dropout_rows(
    options: AttentionOptions, q: torch.Tensor, blocks: _Blocks
) -> DropoutRows | None:
    """The numbers by which probabilities are dropped: `(R, L, G)` and `(R, L)`, or None."""
    if not options.dropout_p:
        return None
    rows = dropout_rows(options.dropout_seed, q).of_heads()
    keys = rows.keys.unsqueeze(-1).expand(-1, -1, blocks.num_kv_heads)
    return DropoutRows(blocks.split(rows.queries), blocks.split(keys).squeeze(2))


def _rows(x: torch.Tensor, task: _Task) -> torch.Tensor:
    return x if task.rows is None else x.index_select(0, task.rows)


def _put(x: torch.Tensor, task: _Task, rows: torch.Tensor) -> None:
    if task.rows is None:
        x.copy_(rows)
    else:
        x[task.rows] = rows.to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Keys:
    """Keys and values in blocks, and the parts of them that a task reads.

    Attributes:
        blocks: Splits and joins.
        k, v: `(R, L, 1, D)`, with 0 in padding and in masked rows.
        mask: `(R, L)` bool or None.
    """

    blocks: _Blocks
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of(cls, call: SelectedCall, k: torch.Tensor, v: torch.Tensor) -> _Keys:
        B, S, K, _ = k.shape
        blocks = _Blocks(B, S, K, call.block_size)
        mask = call.options.key_padding_mask
        if mask is not None:
            # In masked rows, probability 0 times NaN would be NaN.
            k, v = (x.masked_fill(mask[:, :, None, None], 0) for x in (k, v))
            mask = blocks.split(mask.unsqueeze(2).expand(B, S, K)).squeeze(2)
        return cls(blocks, blocks.split(k), blocks.split(v), mask)

    def of_task(self, task: _Task) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of k and v of a task: `(n, num_keys, 1, D)`."""
        if task.columns is None:
            return self.k, self.v
        k, v = (self._gathered(x, task.columns, task) for x in (self.k, self.v))
        return k, v

    def options(
        self, options: AttentionOptions, task: _Task, dropout: DropoutRows | None
    ) -> AttentionOptions:
        """The options of the call of a task; what it drops depends on positions."""
        if dropout is not None:
            dropout = DropoutRows(_rows(dropout.queries, task), self._of_keys(dropout.keys, task))
        return options._replace(
            is_causal=task.is_causal,
            key_padding_mask=None if self.mask is None else self._of_keys(self.mask, task),
            dropout_rows=dropout,
        )

    def _of_keys(self, x: torch.Tensor, task: _Task) -> torch.Tensor:
        """What `(R, L)` has for the keys of a task: `(n, num_keys, 1)`."""
        x = x.unsqueeze(-1)
        return x if task.columns is None else self._gathered(x, task.columns, task)

    def add(self, grad: torch.Tensor, task: _Task, rows: torch.Tensor) -> None:
        """Add gradients of the rows of `of_task` to `grad` `(R, L, 1, D)`."""
        if task.columns is None:
            grad += rows
            return
        n, size = rows.shape[0], self.blocks.block_size
        missing = task.columns.shape[0] // n * size - task.num_keys
        rows = pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows
        grad.index_add_(0, task.columns, rows.reshape(-1, *grad.shape[1:]).to(grad.dtype))

    def _gathered(self, x: torch.Tensor, columns: torch.Tensor, task: _Task) -> torch.Tensor:
        n = columns.shape[0] if task.rows is None else task.rows.shape[0]
        rows = x.index_select(0, columns).view(n, -1, *x.shape[2:])
        return rows[:, : task.num_keys]


def _tasks(call: SelectedCall, q: torch.Tensor, blocks: _Blocks) -> Iterator[_Task]:
    """The calls: rows that keep equally many blocks.

    A backend that takes no earlier keys gets the diagonal of causal attention in a call before.
    """
    selection, size, N = call.selection, blocks.block_size, blocks.num_blocks
    is_causal = call.options.is_causal
    is_split = is_causal and not takes_earlier_keys(call.backend, q.device)
    if is_split:
        yield _Task(None, None, size, is_causal=True, is_first=True)
    indices = selection.block_indices.flatten(0, 2)
    counts = selection.counts.flatten() - int(is_split)
    missing = N * size - blocks.seq_len
    reaches_tail = torch.zeros_like(counts, dtype=torch.bool)
    if missing and not is_causal:
        # The short last block is the last of the blocks of a row, so its padding can be cut off.
        reaches_tail = indices.gather(1, counts[:, None] - 1).squeeze(1) == N - 1
    kinds = counts * 2 + reaches_tail
    order = torch.argsort(kinds, stable=True)
    # [kind, number of rows] for each kind, in the order of the rows.
    table = cast("list[list[int]]", torch.stack(_runs(kinds[order]), 1).tolist())  # pyright: ignore
    start = 0
    limit = gathered_bytes(q.device)
    for kind, number in table:
        count, is_cut = divmod(kind, 2)
        members = order[start : start + number]
        start += number
        if count == 0:
            continue
        step = max(1, limit // (2 * count * size * q.shape[-1] * q.element_size()))
        for rows in torch.split(members, step):
            first = rows - rows % N  # the first block of the same batch row and head
            columns = (indices[rows, :count] + first.unsqueeze(1)).flatten()
            yield _Task(
                *(rows, columns, count * size - is_cut * missing),
                is_causal=is_causal and not is_split,
                is_first=not is_split,
            )


def _runs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of sorted x, and how often each occurs."""
    return cast(Any, x.unique_consecutive(return_counts=True))
