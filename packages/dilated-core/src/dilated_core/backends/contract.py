"""What a backend is: ordinary attention with its lse, forward, and backward from a given lse.

B batch, M rows of q, N rows of k and v, H heads, H_kv heads of k and v, D head_dim.

Dilation happens outside of a backend: core cuts the sequence into strided views and calls the
backend on each view. Each further capability is a protocol below. A backend has the capability if
it has the methods of the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from dilated_core.backends.cache_layout import CacheLayout
from dilated_core.dropout import DropoutRows
from dilated_core.merge import AttentionOutput, accumulation_dtype
from dilated_core.pattern.branches import DilatedPattern

CONTRACT_VERSION = 2
"""Raised when the methods below change meaning; a backend written for another one is refused."""


class AttentionInputs(NamedTuple):
    """The properties of a call by which a backend decides whether it can run.

    Attributes:
        device: Of q, k and v.
        dtype: Of q, k and v.
        num_heads: H.
        head_dim: D.
        dropout_p: Probability of dropping an attention probability.
        num_kv_heads: H_kv, which divides H; H if None.
        has_key_padding_mask: Whether keys are masked.
        is_packed: Whether several documents are packed into one sequence. Matters only to backends
            that run the whole pattern in one launch; the others get one document at a time.
        max_workspace_bytes: Limit of the memory beyond inputs and results, or None.
        seq_len: S, or T if packed; None for inputs of any length.
        is_rectangular: Whether k and v may have other rows than q (M ≠ N), as in a ring.
        block_size: Positions of a block of block-sparse attention, or None. A `BlockSparseBackend`
            then gets whole sequences with the lists of their blocks; any other backend gets blocks
            of queries with the keys that they keep, so `is_rectangular` is True, too.
    """

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    head_dim: int
    dropout_p: float = 0.0
    num_kv_heads: int | None = None
    has_key_padding_mask: bool = False
    is_packed: bool = False
    max_workspace_bytes: int | None = None
    seq_len: int | None = None
    is_rectangular: bool = False
    block_size: int | None = None


class AttentionOptions(NamedTuple):
    """The options of one attention call, the last argument of every method of a backend.

    Attributes:
        is_causal: Query i sees only the keys j ≤ i. True only where N = M, unless the backend is an
            `EarlierKeysBackend`.
        scale: Factor of the scores; finite, of any sign.
        dropout_p: Each probability is dropped with this probability, and the others are divided by
            1 − `dropout_p`. A backend without dropout refuses it in `why_not`.
        dropout_seed: Which probabilities are dropped follows from this number and the rows: the
            same in forward and backward.
        dropout_rows: For `forward` and `backward`, the numbers of the rows of q and of k by which
            `dilated_core.dropout` decides instead; None: rows are numbered as they lie. A backend
            that does not use them refuses dropout where inputs are rectangular.
        key_padding_mask: bool, True for keys to leave out, or None: `(B, N, H_kv)` for `forward`
            and `backward`, `(B, S)` for a whole pattern. A query left without keys has out 0 and
            lse −∞.
    """

    is_causal: bool
    scale: float
    dropout_p: float = 0.0
    dropout_seed: int = 0
    key_padding_mask: torch.Tensor | None = None
    dropout_rows: DropoutRows | None = None


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""dq, dk, dv, of the shapes and the dtype of q, k, v."""


@runtime_checkable
class AttentionBackend(Protocol):
    """Ordinary attention that returns its lse, on strided `(B, M, H, D)` views.

    The last stride of the views is 1, the others may be anything; no two elements of a view share
    memory. Results are new tensors.

    Attributes:
        name: The value of `backend=` that selects it, such as "sdpa".
        priority: `backend="auto"` takes the highest that can run, and a negative one never. eager
            is 0, sdpa is 10.
        contract: The `CONTRACT_VERSION` the backend was written for.
    """

    name: str
    priority: int
    contract: int

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """Reasons why it cannot run these inputs, each a sentence; empty if it can."""
        ...

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> AttentionOutput:
        """Softmax attention of q `(B, M, H, D)` over k and v `(B, N, H_kv, D)`, N ≥ 1.

        H_kv divides H, and H/H_kv consecutive heads of q share one of k and v. The lse is that of
        all visible keys, whatever dropout removes.

        Returns:
            `out` `(B, M, H, D)` in the dtype of q, `lse` `(B, M, H)` float32 (float64 for float64
            inputs), natural logarithm.
        """
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        options: AttentionOptions,
        *,
        delta: torch.Tensor | None = None,
    ) -> Gradients:
        """Gradients of q, k and v, *given* `out` and `lse` of a softmax over possibly more keys.

        p = exp(scale · q·kᵀ − lse), ds = p · (m · dout·vᵀ − delta);
        dq = scale · ds·k, dk = scale · dsᵀ·q, dv = (m · p)ᵀ·dout, where m is the dropout mask of
        forward, 0 or 1/(1 − dropout_p), and 1 without dropout. Nothing is renormalised: with the
        lse and out that were merged over all keys of a query, the sum of these over parts of the
        keys is the exact gradient. A row with lse +∞ has p = 0 and gradient 0.

        Args:
            dout, out: `(B, M, H, D)`, as q.
            q, k, v, options: As for `forward`.
            lse: `(B, M, H)`, float32 or wider.
            delta: rowsum(dout · out), `(B, M, H)`, float32 or wider, for callers that have it:
                several calls for the same queries then share it. A backend may compute it again.
        """
        ...


@runtime_checkable
class WholePatternBackend(Protocol):
    """A backend that also runs all branches of a pattern on whole tensors in its own launches.

    `dilated_attention` calls these methods instead of cutting strips, unless only a range of the
    heads is given.
    """

    def dilated_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pattern: DilatedPattern,
        options: AttentionOptions,
        *,
        cu_seqlens: torch.Tensor | None,
    ) -> AttentionOutput:
        """Dilated attention of `(B, S, H, D)`; `(1, T, H, D)` with `cu_seqlens`."""
        ...

    def dilated_backward(
        self,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        pattern: DilatedPattern,
        options: AttentionOptions,
        *,
        cu_seqlens: torch.Tensor | None,
    ) -> Gradients:
        """Its gradients, through out and, unless `dlse` is None, through lse."""
        ...


@runtime_checkable
class DecodingBackend(Protocol):
    """A backend that also decodes, one token at a time."""

    def decode_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: CacheLayout,
        *,
        position: int,
        scale: float,
    ) -> AttentionOutput:
        """Append one token to a cache, and return what the token sees of the cache then.

        Writes k and v `(B, 1, H_kv, D)` of the token at `position` to its rows of the cache, keys
        and values `(B, rows, D)`. No other row is written, and no row is read that the token does
        not see. All sequences of a call are at `position`; core calls once for each run of
        neighbouring sequences at one position, with their part of the batch.

        Returns:
            The result for q `(B, 1, H, D)`.
        """
        ...


@runtime_checkable
class RankedBackend(Protocol):
    """A backend whose rank depends on the inputs, instead of being `priority` for all of them."""

    def priority_for(self, inputs: AttentionInputs) -> tuple[int, str]:
        """Its rank for these inputs, and where the rank comes from, for `explain_backends`.

        A negative rank: `"auto"` skips the backend for these inputs, and its name selects it.
        """
        ...


@runtime_checkable
class BoundedWorkspaceBackend(Protocol):
    """A backend that reports how much memory it allocates, so that a limit can be kept.

    Other backends are refused where `max_workspace_bytes` is given.
    """

    def workspace_bytes(
        self, inputs: AttentionInputs, num_problems: int, num_queries: int, num_keys: int
    ) -> int:
        """Bytes that one call of `forward` allocates at most, apart from its inputs and results.

        Args:
            inputs: Heads, head_dim, dtype and options of the call.
            num_problems: Size of the batch dimension.
            num_queries: M.
            num_keys: N.
        """
        ...


@runtime_checkable
class EarlierKeysBackend(Protocol):
    """A backend whose causal calls may have more keys than queries.

    The M queries are at the last M of the N positions: query i sees the keys j ≤ i + N − M.
    Callers otherwise attend to the earlier keys in a call of their own, and merge the two.
    """

    def takes_earlier_keys(self, device: torch.device) -> bool:
        """Whether it does on this device."""
        ...


class BlockLists(NamedTuple):
    """The blocks of the attention matrix to compute, by rows and by columns, on the device of q.

    A block is `block_size` queries by as many keys; the last of the N = ⌈S / block_size⌉ blocks of
    positions may be short. Each of P lists is for H / P consecutive heads of q. Nothing here has
    O(N²) entries.

    Attributes:
        block_size: Positions of a block.
        row_offsets: int64 `(P, N + 1)`: `row_offsets[p, i]` and `row_offsets[p, i + 1]` bound the
            entries of row i of list p in `key_blocks`. A row may be empty.
        key_blocks: int32, the blocks of keys of each row, ascending.
        column_offsets: int64 `(P, N + 1)`, the same for column j in `query_blocks`.
        query_blocks: int32, the blocks of queries of each column, ascending.
    """

    block_size: int
    row_offsets: torch.Tensor
    key_blocks: torch.Tensor
    column_offsets: torch.Tensor
    query_blocks: torch.Tensor


@runtime_checkable
class BlockSparseBackend(Protocol):
    """A backend that also attends over a list of blocks, on whole sequences.

    `options.key_padding_mask` is `(B, S)`; masked rows of k and v may hold NaN, add nothing to any
    result, and have gradients 0. `options.is_causal`: the lists keep no block above the
    diagonal, and query i sees only the keys j ≤ i of its own block. `options.dropout_p` is 0, or
    `why_not` has accepted dropout for inputs with a `block_size`; `options.dropout_rows` then has
    the numbers of the rows, `(B, S, H)` and `(B, S)`.
    """

    def block_sparse_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: BlockLists,
        options: AttentionOptions,
    ) -> AttentionOutput:
        """Attention of q `(B, S, H, D)` over the keys of the listed blocks of k and v."""
        ...

    def block_sparse_backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        blocks: BlockLists,
        options: AttentionOptions,
    ) -> Gradients:
        """As `AttentionBackend.backward`, over the keys of the listed blocks.

        Args:
            dout, q, k, v, blocks, options: As for `block_sparse_forward`.
            lse: `(B, S, H)`, float32 or wider; +∞ for a row without keys.
            delta: rowsum(dout · out) − dlse, `(B, S, H)`, float32 or wider: the gradient of lse
                enters the scores as ds = p · (dout·vᵀ − delta).
        """
        ...


def has_capability(backend: AttentionBackend, capability: type) -> bool:
    """Whether the backend has the methods of one of the protocols above.

    `issubclass` remembers its answer for a class; `isinstance` would compare all names again at
    each call.
    """
    return issubclass(type(backend), capability)


def check_output(backend: Any, out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor) -> None:
    """Compare the result of a forward method of `backend` with the contract.

    Raises:
        ValueError: If a shape or a dtype is another one.
    """
    if out.shape != q.shape or lse.shape != q.shape[:-1]:
        raise ValueError(
            f"backend {backend.name!r} returned out of shape {tuple(out.shape)} and lse of shape "
            f"{tuple(lse.shape)} for q of shape {tuple(q.shape)}; out must have the shape of "
            f"q, and lse that shape without head_dim."
        )
    if out.dtype != q.dtype or lse.dtype != accumulation_dtype(q.dtype):
        raise ValueError(
            f"backend {backend.name!r} returned out in {out.dtype} and lse in {lse.dtype} for q in "
            f"{q.dtype}; out must have the dtype of q, and lse {accumulation_dtype(q.dtype)}."
        )


def check_gradients(backend: Any, grads: Gradients, tensors: Sequence[torch.Tensor]) -> None:
    """Compare the result of a backward method of `backend` for q, k and v with the contract.

    Raises:
        ValueError: If there are not three gradients, or a shape or a dtype is another one.
    """
    if len(grads) != 3:
        raise ValueError(
            f"backend {backend.name!r} returned {len(grads)} gradients; it must return dq, dk and "
            f"dv."
        )
    for i, (grad, x) in enumerate(zip(grads, tensors, strict=True)):
        if grad.shape != x.shape or grad.dtype != x.dtype:
            name = ("dq", "dk", "dv")[i]
            raise ValueError(
                f"backend {backend.name!r} returned {name} of shape {tuple(grad.shape)} in "
                f"{grad.dtype}; it must have the shape of {name[1]}, {tuple(x.shape)}, and its "
                f"dtype, {x.dtype}."
            )
