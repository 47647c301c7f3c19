"""Run problems on a backend and combine their results in place, forward and backward.

Forward merges (out, lse) of each problem into one pair for all branches. Backward calls the backend
with the *merged* out and lse, so that each problem's probabilities are those of the softmax over
all keys, and adds up the gradients. A whole sequence, a hop of a ring and a step of streaming
differ only in the plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dilated_core.backends.contract import (
    AttentionBackend,
    AttentionOptions,
    Gradients,
    check_gradients,
    check_output,
)
from dilated_core.dropout import DropoutRows, branch_number
from dilated_core.merge import (
    AttentionOutput,
    accumulation_dtype,
    empty_partial,
    fold_,
    zero_key_partial,
)
from dilated_core.strips.plan import Problem
from dilated_core.strips.view import Rows, viewable


def attend_(
    into: AttentionOutput,
    problems: Sequence[Problem],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
    *,
    backend: AttentionBackend,
) -> None:
    """Merge the results of some problems into `into`, in place.

    Args:
        into: `out` `(B, M, H, D)` and `lse` `(B, M, H)`, contiguous or positions of contiguous
            tensors, in the `accumulation_dtype` of q; what `dilated_core.merge.empty_partial`
            returns, or the result over other keys.
        problems: As `plan_problems` returns them for these tensors.
        q: `(B, M, H, D)`, the positions of the span of queries.
        k, v: `(B, N, H_kv, D)`, the positions of the span of keys.
        options: `key_padding_mask` is `(B, N)`, or `(B, N, H_kv)` if k and v do not hold the same
            positions for every head; `dropout_rows` likewise. Problem number i has the dropout
            seed `dropout_seed + i`. `is_causal` is ignored, since each problem has its own.
        backend: As `choose_backend` returns it for these inputs.
    """
    attend(problems, q, k, v, options, backend=backend, into=into)


def attend(
    problems: Sequence[Problem],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
    *,
    backend: AttentionBackend,
    into: AttentionOutput | None = None,
) -> AttentionOutput:
    """`attend_`, or without `into` the result of the problems alone.

    Half precision is merged in float32, with one rounding at the end and not one per branch; the
    result is then float32, unless there is nothing to merge.
    """
    q, k, v = viewable(q), viewable(k), viewable(v)
    k, v = without_masked_rows(k, options), without_masked_rows(v, options)
    is_fresh, merged = into is None, 0
    if into is None and problems and _covers(problems[0].queries, q):
        # An undilated branch without a tail: all other results are merged into its result.
        first = problems[0]
        partial = _run(first, 0, q, k, v, options, backend)
        into = partial
        if not first.queries.is_everything:
            into = AttentionOutput(partial.out.reshape(q.shape), partial.lse.reshape(q.shape[:-1]))
        if len(problems) == 1 and not first.zero_keys:
            return into
        into = AttentionOutput(into.out.to(into.lse.dtype).contiguous(), into.lse.contiguous())
        del partial
        if first.zero_keys:
            fold_(into, zero_key_partial(first.zero_keys, into))
        merged = 1
    if into is None:
        into = empty_partial(q.shape, dtype=q.dtype, device=q.device)
    for i, problem in enumerate(problems[merged:], merged):
        queries = problem.queries
        rows = AttentionOutput(queries.view(into.out), queries.view(into.lse))
        if problem.keys.num_rows:
            partial = _run(problem, i, q, k, v, options, backend)
            if is_fresh and problem.is_first:
                rows.out.copy_(partial.out)
                rows.lse.copy_(partial.lse)
            else:
                fold_(rows, partial)
            del partial  # before the next one is made
        if problem.zero_keys:
            fold_(rows, zero_key_partial(problem.zero_keys, rows))
    return into


def _run(
    problem: Problem,
    index: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
    backend: AttentionBackend,
) -> AttentionOutput:
    """The backend's result for one problem, without zero keys; `q`, `k`, `v` are `viewable`."""
    queries, keys = problem.queries.view(q), problem.keys.view(k)
    result = backend.forward(queries, keys, problem.keys.view(v), _options(options, problem, index))
    check_output(backend, result[0], result[1], queries)
    return result


def differentiate_(
    into: Gradients,
    problems: Sequence[Problem],
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: AttentionOptions,
    *,
    backend: AttentionBackend,
    delta: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
) -> None:
    """Add the gradients of some problems to `into`, in place.

    Args:
        into: dq `(B, M, H, D)`, dk and dv `(B, N, H_kv, D)`, contiguous or positions of contiguous
            tensors, in the `accumulation_dtype` of q.
        problems, q, k, v, options, backend: As for `attend_`.
        dout: Gradient of out, as q.
        out, lse: The result over all keys that the queries see, those of other calls included.
        delta: rowsum(dout · out), `(B, M, H)`, if the caller has it.
        dlse: Gradient of lse, `(B, M, H)`; None: none.
    """
    tensors = (dout, q, k, v, out, lse)
    differentiate(problems, *tensors, options, backend=backend, delta=delta, dlse=dlse, into=into)


def differentiate(
    problems: Sequence[Problem],
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: AttentionOptions,
    *,
    backend: AttentionBackend,
    delta: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    into: Gradients | None = None,
) -> Gradients:
    """`differentiate_`, or without `into` the gradients of the problems alone."""
    q, k, v, dout = (viewable(x) for x in (q, k, v, dout))
    # `Rows.view` is planned for the strides of contiguous tensors.
    out, lse = out.contiguous(), lse.contiguous()
    delta, dlse = (None if x is None else x.contiguous() for x in (delta, dlse))
    k, v = without_masked_rows(k, options), without_masked_rows(v, options)
    if options.key_padding_mask is not None:
        # A row that sees no key at all: exp(score − ∞) is 0, where exp(−∞ + ∞) would be NaN.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    wide = accumulation_dtype(q.dtype)
    for i, problem in enumerate(problems):
        queries, keys = problem.queries, problem.keys
        if keys.num_rows == 0:
            continue
        q_rows, k_rows, v_rows = queries.view(q), keys.view(k), keys.view(v)
        grads = backend.backward(
            *(queries.view(dout), q_rows, k_rows, v_rows, queries.view(out), queries.view(lse)),
            _options(options, problem, i),
            delta=None if delta is None else queries.view(delta),
        )
        check_gradients(backend, grads, (q_rows, k_rows, v_rows))
        if into is None:
            if _covers(queries, q) and _covers(keys, k):
                dq, dk, dv = (
                    _all_rows(grad, x, wide) for grad, x in zip(grads, (q, k, v), strict=True)
                )
                into = dq, dk, dv
                continue
            dq, dk, dv = (_zeros_like(x) for x in (q, k, v))
            into = dq, dk, dv
        queries.view(into[0]).add_(grads[0])
        keys.view(into[1]).add_(grads[1])
        keys.view(into[2]).add_(grads[2])
        del grads  # before the next ones are made
    if into is None:
        dq, dk, dv = (_zeros_like(x) for x in (q, k, v))
        into = dq, dk, dv
    if dlse is not None:
        _add_gradient_through_lse_(into, problems, dlse, q, k, lse, options, backend)
    if (mask := options.key_padding_mask) is not None:
        # 0 · NaN: a masked row has gradient 0 whatever the other factors are.
        mask = _per_head(mask).unsqueeze(-1)
        into[1].masked_fill_(mask, 0)
        into[2].masked_fill_(mask, 0)
    return into


def _covers(rows: Rows, x: torch.Tensor) -> bool:
    """Whether the rows are all of x `(B, L, H, …)`."""
    return rows.num_elements == x.shape[0] * x.shape[1] * x.shape[2]


def _all_rows(rows: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows that are all of `x`, contiguous, in its shape and this dtype."""
    # Calls of PyTorch that change nothing cost a microsecond each.
    rows = rows if rows.dtype == dtype else rows.to(dtype)
    return (rows if rows.shape == x.shape else rows.reshape(x.shape)).contiguous()


def _zeros_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(x.shape, dtype=accumulation_dtype(x.dtype))


def without_masked_rows(x: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """K or v `(B, N, H_kv, D)` with 0 in masked rows: there, probability 0 times NaN is NaN."""
    if options.key_padding_mask is None:
        return x
    copy = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
    return copy.masked_fill_(_per_head(options.key_padding_mask).unsqueeze(-1), 0)


def _per_head(mask: torch.Tensor) -> torch.Tensor:
    """A mask `(B, N)` as `(B, N, 1)`; one for each head as it is."""
    return mask if mask.dim() == 3 else mask.unsqueeze(-1)


def _add_gradient_through_lse_(
    into: Gradients,
    problems: Sequence[Problem],
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    options: AttentionOptions,
    backend: AttentionBackend,
) -> None:
    """Add the gradients of q and k that come from a gradient of lse: ds += p · dlse.

    Every backend can compute the two products: p·k is a forward with k in the place of v, and
    (p · dlse)ᵀ·q is the dv of a backward whose dout is dlse · q. Dropout comes after the softmax,
    so the lse does not depend on dropout.
    """
    options = options._replace(dropout_p=0.0)
    dlse = (dlse * options.scale).unsqueeze(-1).contiguous()
    dout = (dlse * q).to(q.dtype).contiguous()
    zeros_q, zeros_k = q.new_zeros(q.shape), k.new_zeros(k.shape)
    for problem in problems:
        queries, keys = problem.queries, problem.keys
        if keys.num_rows == 0:
            continue
        strip_options = _options(options, problem, 0)
        q_rows, k_rows, lse_rows = queries.view(q), keys.view(k), queries.view(lse)
        partial = backend.forward(q_rows, k_rows, k_rows, strip_options)
        weight = (partial.lse - lse_rows).exp_().unsqueeze(-1)
        queries.view(into[0]).add_(queries.view(dlse) * weight * partial.out)
        dk_rows = backend.backward(
            queries.view(dout), q_rows, k_rows, keys.view(zeros_k), queries.view(zeros_q), lse_rows,
            strip_options,
        )[2]  # fmt: skip
        keys.view(into[1]).add_(dk_rows)


def _options(options: AttentionOptions, problem: Problem, index: int) -> AttentionOptions:
    """The options of a call of the backend; each problem drops by a seed of its own."""
    keys, mask = problem.keys, options.key_padding_mask
    if mask is not None:
        mask = keys.view(_over_heads(mask, keys))
    return AttentionOptions(
        problem.is_causal,
        options.scale,
        options.dropout_p,
        options.dropout_seed + index,
        mask,
        _dropout_rows(options, problem),
    )


def _dropout_rows(options: AttentionOptions, problem: Problem) -> DropoutRows | None:
    if not options.dropout_p or (rows := options.dropout_rows) is None:
        return None
    queries, keys = problem.queries, problem.keys
    numbers = queries.view(_over_heads(rows.queries, queries)) + branch_number(problem.branch)
    if rows.heads is not None:
        last = queries.first_head + (queries.num_heads - 1) * queries.head_step + 1
        numbers += rows.heads[queries.first_head : last : queries.head_step]
    return DropoutRows(numbers, keys.view(_over_heads(rows.keys, keys)))


def _over_heads(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """`(B, L)` as `(B, L, H)` for the heads of `rows`; `(B, L, H)` as it is."""
    x = x.contiguous()
    if x.dim() == 3:
        return x
    # Every head has the same numbers, hence stride 0; their offsets are in the view.
    num_heads = rows.first_head + (rows.num_heads - 1) * rows.head_step + 1
    return x.as_strided((*x.shape, num_heads), (*x.stride(), 0))
