"""Memory of attention that chooses its blocks: what it keeps, and what choosing takes meanwhile.

Scores of queries and blocks are formed in strips of bounded size; the factors below are bytes of a
number of a strip, with all tensors that are there at the same time, measured on a CPU.
"""

from __future__ import annotations

from typing import Any

from dilated_models.planning.adaptive import MASS_STRIP, AdaptiveSizes, kept_blocks
from dilated_models.planning.job import Job
from dilated_models.planning.kinds import attention_options, has_bounded_cache

_CHOICE_STRIP = 2**22  # numbers, of `dilated_sparse.presets`
_MOBA_BYTES = 24
_NSA_BYTES, _NSA_BYTES_OF_GROUPS = 3, 34  # of a head of q, and of a head of k
_MASS_BYTES = 12
_SELECTION_BYTES = 15  # of a pair of blocks: masks, counts and lists of kept blocks


def kept_for_choice(job: Job) -> float:
    """Bytes that autograd keeps of each token in a block, beyond those of dilated attention."""
    model, n, wide = job.model, job.itemsize, max(4, job.itemsize)
    kind = model.attention_kind
    if model.has_branches or kind == "block_sparse":
        return 0.0
    options = attention_options(model)
    if kind == "moba":
        return 8.0 * model.nhead * (options.topk - 1)
    if kind == "nsa":
        return _kept_by_nsa(job, options, n, wide)
    sizes = AdaptiveSizes.of(model, options, job.seq_len)
    found = 0.0
    if options.gate_gradient is not None:  # each place in the lists is a partial result
        kept = kept_blocks(options, sizes.num_blocks)
        found += kept * (model.d_model * (n + wide) + 3 * 4 * model.nhead)
    if options.gate_gradient is None and options.distillation == "none":
        return found
    # What the gate has read of each sub-block of keys, and made of it; of queries of each block.
    D, d = sizes.head_dim, sizes.gate_dim
    keys = (3 * D + 2 * (2 * d + 28)) * 4 / options.positions_per_mean
    queries = (4 * D + 2 * d) * 4 / sizes.block_size
    found += sizes.num_kv_heads * (keys + queries)
    if options.distillation == "all":
        found += sizes.num_kv_heads * sizes.num_blocks * 4 / sizes.block_size
    return found


def _kept_by_nsa(job: Job, options: Any, n: int, wide: int) -> float:
    model, sizes = job.model, options.sizes
    # The compressed branch has copies of the queries, and of its keys and values one for each
    # position of a stride. Results of three branches; their stack and its sum.
    found = (
        model.d_model * (4 * n + (3 * wide if options.mix == "gate" else 2 * n)) + 8 * model.nhead
    )
    overlap = sizes.compression_block_size / sizes.compression_stride
    found += model.kv_dim * n * (5 + 2 * overlap + 8 / sizes.compression_stride)
    found += 8 * (model.num_kv_heads or model.nhead) * (sizes.num_selected_blocks - 1)
    if options.mix == "gate":
        found += 2 * max(1, model.d_model // 4) * n + 3 * model.nhead * (n + wide)
    return found


# Numbers of a token that are there at once while a block attends, without gradients: in units of
# the width of the model, and of all heads of keys. Measured on a CPU.
_ATTENDING = {
    "dilated": (8, 7), "block_sparse": (8, 6), "block_sparse_adaptive": (8, 8), "moba": (8, 7),
    "nsa": (14, 10),
}  # fmt: skip
_CHOOSING = 10
_WITH_HISTORY = 3  # queries of a whole text, and their results
_WITH_SELECTION = 5  # queries and keys without positions, too
# The same of `KeyHistory`, of one new token of each text.
_CONTINUING = {"dilated": (6, 2), "block_sparse": (3, 4), "moba": (5, 4), "nsa": (14, 10)}
_CHOOSING_AGAIN = 5


def bytes_attending(job: Job) -> float:
    """Bytes of temporary tensors while a block attends by a kind that is not plain dilated."""
    model = job.model
    if has_bounded_cache(model):
        return 0.0
    wide, narrow = _ATTENDING["dilated" if model.has_branches else model.attention_kind]
    if model.attention_kind == "block_sparse_adaptive":
        wide += _WITH_SELECTION if job.mode == "prefill" else 0
        options = attention_options(model)
        if options.gate_gradient is not None:  # each place in the lists is a partial result
            sizes = AdaptiveSizes.of(model, options, job.seq_len)
            wide += kept_blocks(options, sizes.num_blocks)
    elif job.mode == "prefill":
        wide += _WITH_HISTORY
    tokens = job.rows * (job.seq_len if job.mode == "prefill" else job.local_seq_len)
    held = tokens * model.d_model * _CHOOSING * job.itemsize
    attending = tokens * job.itemsize * (wide * model.d_model + narrow * model.kv_dim)
    return max(attending, held + bytes_of_choice(job))


def bytes_continuing(job: Job) -> float:
    """Bytes of temporary tensors while a block decodes a token with a cache that grows."""
    model = job.model
    if model.attention_kind == "block_sparse_adaptive":
        options = attention_options(model)
        num_blocks = job.seq_len // options.block_size + 1
        # Copies of the keys and values of the kept blocks, of one text after another.
        keys = kept_blocks(options, num_blocks) * options.block_size
        return 4.0 * max(4, job.itemsize) * keys * model.kv_dim
    # `KeyHistory` attends from all tokens, and keeps the rows of the new ones.
    wide, narrow = _CONTINUING["dilated" if model.has_branches else model.attention_kind]
    tokens = job.rows * (job.seq_len + 1) * job.itemsize
    attending = tokens * (wide * model.d_model + narrow * model.kv_dim)
    choosing = tokens * _CHOOSING_AGAIN * model.d_model + bytes_of_choice(job)
    return max(attending, choosing)


def bytes_of_choice(job: Job) -> float:
    """Bytes that choosing blocks takes while it runs, in one block."""
    model, seq_len = job.model, job.seq_len
    kind, H = model.attention_kind, model.nhead
    if model.has_branches or kind == "block_sparse":
        return 0.0
    options = attention_options(model)
    learns = job.mode == "training"
    # Training computes each sequence alone; texts of a cache that select blocks, too.
    alone = kind == "block_sparse_adaptive" and job.mode != "forward"
    rows = 1 if learns or alone else job.rows
    if kind == "moba":
        numbers = rows * H * seq_len * (seq_len // options.block_size)
        return float(_MOBA_BYTES * min(_CHOICE_STRIP, numbers))
    K = model.num_kv_heads or H
    if kind == "nsa":
        numbers = rows * H * seq_len * options.sizes.num_compressed(seq_len)
        each = _NSA_BYTES + _NSA_BYTES_OF_GROUPS * K / H
        return each * min(_CHOICE_STRIP, numbers)
    sizes = AdaptiveSizes.of(model, options, seq_len)
    N, L = sizes.num_blocks, sizes.block_size
    pairs = float(_SELECTION_BYTES * rows * K * N * N)
    if not learns or options.distillation == "none":
        return pairs
    measured = N
    if options.distillation == "kept":
        measured = kept_blocks(options, N) + min(options.num_random, N)
    row = H * L * measured * L
    at_once = max(row, min(N * row, MASS_STRIP // row * row))
    copied = K * sizes.head_dim / (H * L) if options.distillation == "kept" else 0.0
    return pairs + at_once * (_MASS_BYTES + 4 * copied)
