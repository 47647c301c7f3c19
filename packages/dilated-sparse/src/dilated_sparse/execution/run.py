"""Run the tasks of a plan on a backend and combine their results, forward and backward.

Shapes: B batch, S positions, N blocks, n query blocks of a task, H heads, K heads of k and v, D
head_dim. Backward calls the backend with the out and lse of all kept blocks together, as core does
with the branches of a pattern, so that each task's probabilities are those of the one softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from dilated_core import AttentionBackend, AttentionOptions, AttentionOutput, Gradients, fold_
from dilated_core.backends.contract import EarlierKeysBackend, has_capability
from dilated_core.dropout import DropoutRows, dropout_rows
from dilated_core.merge import accumulation_dtype, empty_partial
from dilated_core.strips.view import viewable
from torch.nn.functional import pad

from dilated_sparse.execution.plan import Geometry, Task, plan_tasks
from dilated_sparse.execution.sequences import Sequences, sequences_of
from dilated_sparse.pattern.blocks import BlockPattern
from dilated_sparse.pattern.rule import PatternRule


class Call(NamedTuple):
    """Everything that determines a call, apart from its tensors.

    Attributes:
        backend: Runs forward and backward.
        pattern: The kept blocks, or the rule that gives each sequence its own.
        block_size: Positions of a block.
        options: `key_padding_mask` is `(B, S)`; `is_causal` is that of the whole call.
    """

    backend: AttentionBackend
    pattern: BlockPattern | PatternRule
    block_size: int
    options: AttentionOptions

    def sequences(
        self, q: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> Iterator[tuple[Sequences, tuple[slice, slice]]]:
        """The sequences of the call, and the index of each in `(B, S, …)` tensors."""
        mask = self.options.key_padding_mask
        for part in sequences_of(
            q, self.pattern, self.block_size, cu_seqlens=cu_seqlens, key_padding_mask=mask
        ):
            yield part, (part.rows, part.span)

    def numbered(self, q: torch.Tensor) -> Call:
        """The call with the numbers `(B, S, H)` and `(B, S)` by which it drops, if it does."""
        if not (options := self.options).dropout_p:
            return self
        rows = dropout_rows(options.dropout_seed, q).of_heads()
        return self._replace(options=options._replace(dropout_rows=rows))


def forward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> AttentionOutput:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`, not differentiable.

    Args:
        call: The options.
        q: `(B, S, H, D)`; `(1, T, H, D)` if packed.
        k, v: The same with K heads.
        cu_seqlens: Where each document of a packed sequence begins, and T; None if not packed.

    Raises:
        ValueError: If the pattern or `cu_seqlens` does not fit.
    """
    wide = accumulation_dtype(q.dtype)
    if call.options.key_padding_mask is None:
        into = AttentionOutput(*(q.new_empty(x, dtype=wide) for x in (q.shape, q.shape[:-1])))
    else:
        # No sequence has the padding.
        into = empty_partial(q.shape, dtype=q.dtype, device=q.device)
    call = call.numbered(q)
    for part, at in call.sequences(q, cu_seqlens):
        sequence = _sequence(call, part, *(x[at] for x in (q, k, v)))
        out, lse = into.out[at], into.lse[at]
        for task in sequence.tasks:
            queries = sequence.queries(task)
            result = call.backend.forward(
                queries(sequence.q), *sequence.keys(task), sequence.options(task)
            )
            if task.is_first:
                queries.put(out, result.out)
                queries.put(lse, result.lse)
            else:
                merged = AttentionOutput(queries(out), queries(lse))
                fold_(merged, result)
                queries.put(out, merged.out)
                queries.put(lse, merged.lse)
            del result  # before the next one is made
    return AttentionOutput(into.out.to(q.dtype), into.lse)


def backward(
    call: Call,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> Gradients:
    """Contiguous gradients of q, k, v from those of out and, unless None, of lse."""
    wide = accumulation_dtype(q.dtype)
    has_padding = call.options.key_padding_mask is not None
    grads = tuple(
        (torch.zeros if has_padding else torch.empty)(x.shape, dtype=x.dtype, device=x.device)
        for x in (q, k, v)
    )
    dout, out = dout.contiguous(), out.contiguous()
    # A row that sees no key at all: exp(score − ∞) is 0, where exp(−∞ + ∞) would be NaN.
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    delta = (dout.to(wide) * out.to(wide)).sum(-1)
    call = call.numbered(q)
    for part, at in call.sequences(q, cu_seqlens):
        sequence = _sequence(call, part, *(x[at] for x in (q, k, v)))
        dq = q.new_empty(sequence.q.shape, dtype=wide)
        dk, dv = (
            torch.zeros(x.shape, dtype=wide, device=x.device) for x in (sequence.k, sequence.v)
        )
        for task in sequence.tasks:
            queries = sequence.queries(task)
            dout_rows, out_rows, lse_rows, delta_rows = (
                queries(x[at]) for x in (dout, out, lse, delta)
            )
            q_rows, (k_rows, v_rows) = queries(sequence.q), sequence.keys(task)
            options = sequence.options(task)
            dq_rows, dk_rows, dv_rows = call.backend.backward(
                dout_rows, q_rows, k_rows, v_rows, out_rows, lse_rows, options, delta=delta_rows
            )
            if dlse is not None:
                dlse_rows = queries(dlse[at])
                more = gradients_through_lse(
                    call.backend, options, dlse_rows, q_rows, k_rows, lse_rows
                )
                dq_rows, dk_rows = dq_rows + more[0], dk_rows + more[1]
            queries.put(dq, dq_rows if task.is_first else queries(dq) + dq_rows)
            sequence.add_to_keys(dk, task, dk_rows)
            sequence.add_to_keys(dv, task, dv_rows)
        length = dq.shape[1]
        for grad, x in zip(grads, (dq, dk[:, :length], dv[:, :length]), strict=True):
            grad[at] = x
    if (mask := call.options.key_padding_mask) is not None:
        for grad in grads[1:]:
            grad.masked_fill_(mask[:, :, None, None], 0)
    return grads[0], grads[1], grads[2]


def takes_earlier_keys(backend: AttentionBackend, device: torch.device) -> bool:
    """Whether a causal call may have the keys before a block of queries, too."""
    capable: Any = backend
    return has_capability(backend, EarlierKeysBackend) and capable.takes_earlier_keys(device)


def gradients_through_lse(
    backend: AttentionBackend,
    options: AttentionOptions,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a gradient of lse adds to the gradients of the rows of q and k: ds += p · dlse.

    Every backend can compute the two products: p·k is a forward with k in the place of v, and
    (p · dlse)ᵀ·q is the dv of a backward whose dout is dlse · q. Dropout comes after the softmax,
    so the lse does not depend on dropout.
    """
    options = options._replace(dropout_p=0.0)
    dlse = (dlse * options.scale).unsqueeze(-1)
    partial = backend.forward(q, k, k, options)
    weight = (partial.lse - lse).exp_().unsqueeze(-1)
    dout, zeros = (dlse * q).to(q.dtype), torch.zeros_like(q)
    dk = backend.backward(
        dout, q, k, torch.zeros_like(k), zeros, lse, options, delta=torch.zeros_like(lse)
    )[2]
    return dlse * weight * partial.out, dk


def split(x: torch.Tensor, dim: int, sizes: tuple[int, int]) -> torch.Tensor:
    """`Tensor.unflatten`, whose type PyTorch leaves open."""
    return x.unflatten(dim, sizes)  # pyright: ignore


@dataclass(frozen=True, slots=True)
class _Queries:
    """The rows of `(B, S, H, …)` tensors that are the query blocks of a task."""

    task: Task
    block_size: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """These rows as `(B·n, M, heads, …)`: a view where the blocks and batch rows allow one."""
        return self._blocks(x).flatten(0, 1)

    def put(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Write `rows` there, unless they are a view of x."""
        rows = split(rows, 0, (x.shape[0], -1))
        if self.task.first_row is not None:
            self._blocks(x).copy_(rows)
        else:
            self._all(x)[:, self.task.rows, :, self.task.heads] = rows.to(x.dtype)

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, n, M, heads, …)`."""
        task = self.task
        if task.first_row is None:
            return self._all(x)[:, :, :, task.heads].index_select(1, task.rows)
        n, start = task.rows.shape[0], task.first_row * self.block_size
        rows = x[:, start : start + n * task.num_queries, task.heads]
        return split(rows, 1, (n, task.num_queries))

    def _all(self, x: torch.Tensor) -> torch.Tensor:
        """The full blocks of x: `(B, N, block_size, H, …)`."""
        num_full = x.shape[1] // self.block_size
        return split(x[:, : num_full * self.block_size], 1, (num_full, self.block_size))


@dataclass(frozen=True, slots=True)
class _Sequence:
    """The tensors of one sequence, whole blocks of keys, and its tasks.

    Attributes:
        block_size: Positions of a block.
        call_options: The options of the whole call.
        tasks: See `plan_tasks`.
        q: `(B, S, H, D)`.
        k, v: `(B, N·block_size, K, D)`, with 0 in padding and in masked rows.
        mask: `(B, N·block_size)` bool or None.
        buffers: Where keys and values of a task are gathered.
        dropout: The numbers of queries `(B, S, H)` and of keys `(B, N·block_size)`, or None.
    """

    block_size: int
    call_options: AttentionOptions
    tasks: tuple[Task, ...]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    buffers: tuple[torch.Tensor, torch.Tensor]
    dropout: DropoutRows | None

    def queries(self, task: Task) -> _Queries:
        return _Queries(task, self.block_size)

    def keys(self, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of k and v of a task: `(B·n, num_keys, kv_heads, D)`."""
        k, v = (
            self._taken(x, task, buffer)
            for x, buffer in zip((self.k, self.v), self.buffers, strict=True)
        )
        return k, v

    def options(self, task: Task) -> AttentionOptions:
        """The options of the call of a task; what it drops depends on positions."""
        options, dropout = self.call_options, self.dropout
        if dropout is not None:
            queries = self.queries(task)(dropout.queries)
            dropout = DropoutRows(queries, self._of_keys(dropout.keys, task))
        return options._replace(
            is_causal=task.is_causal,
            key_padding_mask=None if self.mask is None else self._of_keys(self.mask, task),
            dropout_rows=dropout,
        )

    def _of_keys(self, x: torch.Tensor, task: Task) -> torch.Tensor:
        """What `(B, N·block_size)` has for the keys of a task: `(B·n, num_keys, kv_heads)`."""
        blocks = split(x, 1, (-1, self.block_size)).index_select(1, task.columns)
        n = x.shape[0] * task.rows.shape[0]
        num_kv_heads = task.kv_heads.stop - task.kv_heads.start
        return blocks.reshape(n, -1)[:, : task.num_keys, None].expand(-1, -1, num_kv_heads)

    def add_to_keys(self, grad: torch.Tensor, task: Task, rows: torch.Tensor) -> None:
        """Add gradients of the rows of `keys` to `grad` `(B, N·block_size, K, D)`."""
        size = self.block_size
        missing = task.count * size - task.num_keys
        rows = pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows
        grad = split(grad[:, :, task.kv_heads], 1, (-1, size))
        B, n = grad.shape[0], task.rows.shape[0]
        rows = rows.reshape(B, n * task.count, size, *rows.shape[2:]).to(grad.dtype)
        grad.index_add_(1, task.columns, rows)

    def _taken(self, x: torch.Tensor, task: Task, buffer: torch.Tensor) -> torch.Tensor:
        size = self.block_size
        x = x[:, :, task.kv_heads]
        B, n = x.shape[0], task.rows.shape[0]
        if task.first_column is not None and n == 1:
            return x.narrow(1, task.first_column * size, task.num_keys)
        # The contract of backends: no two elements of a view share memory.
        if task.first_column is not None and B == 1 and task.column_step >= task.count:
            row, *rest = x.stride()[1:]
            return x.as_strided(
                (n, task.num_keys, *x.shape[2:]),
                (task.column_step * size * row, row, *rest),
                x.storage_offset() + task.first_column * size * row,
            )
        blocks = split(x, 1, (-1, size))
        room = buffer[: B * n * task.count * size * x.shape[2] * x.shape[3]]
        room = room.view(B, n * task.count, *blocks.shape[2:])
        torch.index_select(blocks, 1, task.columns, out=room)
        return room.view(B * n, task.count * size, *x.shape[2:])[:, : task.num_keys]


def _sequence(
    call: Call, part: Sequences, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> _Sequence:
    B, S, K, D = k.shape
    size, mask = call.block_size, part.key_padding_mask
    geometry = Geometry(
        *(S, size, call.options.is_causal, takes_earlier_keys(call.backend, q.device)),
        *(q.shape[2], K, B * D * k.element_size(), q.device),
    )
    tasks = plan_tasks(part.pattern, geometry)
    q, k, v = viewable(q), viewable(k), viewable(v)
    missing = part.pattern.num_blocks * size - S
    if mask is not None:
        # In masked rows, probability 0 times NaN would be NaN.
        k, v = (x.masked_fill(mask[:, :, None, None], 0) for x in (k, v))
        mask = pad(mask, (0, missing), value=True)
    if missing:
        k, v = (pad(x, (0, 0, 0, 0, 0, missing)) for x in (k, v))
    largest = max(
        (B * t.columns.shape[0] * (t.kv_heads.stop - t.kv_heads.start) for t in tasks), default=0
    )
    buffers = k.new_empty(largest * size * D), v.new_empty(largest * size * D)
    if (dropout := call.options.dropout_rows) is not None:
        queries, keys = (x[part.rows, part.span] for x in (dropout.queries, dropout.keys))
        dropout = DropoutRows(queries, pad(keys, (0, missing)))
    return _Sequence(size, call.options, tasks, q, k, v, mask, buffers, dropout)
