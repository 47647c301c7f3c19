"""Memory of a rank, part by part, at the moment when it is largest.

The sizes are those of the tensors that the model's operations make, counted from the layers. In
training, autograd keeps what the backward pass of each operation reads. d is the width of the
model, f that of its feed-forward, V its vocabulary, T the tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dilated_core.cross_entropy import chunk_tokens

from dilated_models.config import LongNetConfig
from dilated_models.longnet.size import Parameters, count_parameters
from dilated_models.planning.attention import Work, work_of
from dilated_models.planning.caches import cache_bytes
from dilated_models.planning.choosing import (
    bytes_attending,
    bytes_continuing,
    bytes_of_choice,
    kept_for_choice,
)
from dilated_models.planning.job import OPTIMIZER_BYTES, Job
from dilated_models.planning.kinds import channels, has_bounded_cache

_WIDE = 4  # bytes of a number of the residual stream in training, of statistics and of the loss
_TOKEN_BYTES = 32  # of a token's number, its target and its position in two counts, int64


class Memory(NamedTuple):
    """What a rank holds when it holds most.

    Attributes:
        moment: When that is.
        parts: Bytes by name.
    """

    moment: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def memory_of(job: Job, work: Work | None = None) -> Memory:
    """The largest memory of a rank that does the job.

    Args:
        job: The job.
        work: Its attention, if known.
    """
    work = work_of(job) if work is None else work
    moments = _training(job, work) if job.mode == "training" else _inference(job, work)
    return max(moments, key=lambda memory: memory.total)


def kept_per_token(job: Job) -> int:
    """Bytes that autograd keeps for the backward pass of one block, of each token."""
    model, narrow, is_cast = job.model, job.itemsize, job.is_autocast
    # Autocast on GPUs runs LayerNorm in float32, which then keeps a copy of its input.
    copy = _WIDE if is_cast and job.on_gpu else 0
    # Input of the block; of the three projections, each cast alone; q and out; input of the output
    # projection; input of the second half, and of its first product. Further k and v.
    wide = 2 * _WIDE + (3 if is_cast else 1) * narrow + 2 * narrow + copy + 2 * narrow
    keys = 2 * narrow
    hidden = 2 * narrow + copy
    if model.activation != "relu":  # which keeps its result, and that is kept anyway
        hidden += 0 if copy else narrow
    if model.positions == "alibi":  # which adds channels to each head, and out is cut again
        more = (channels(model, job.dtype) - model.head_dim) / model.head_dim
        wide += round(2 * more * narrow)
        keys += round(2 * more * narrow)
    # Inputs of each product of the convolution, masked between documents.
    wide += model.key_conv * _WIDE
    if model.dropout:
        mask = 1 if job.on_gpu else narrow
        wide += 2 * mask
        hidden += mask + narrow
    # Of each LayerNorm a mean and a deviation; of attention the lse.
    statistics = 8 * 4 + 4 * model.nhead
    return round(
        model.d_model * wide + model.kv_dim * keys + model.dim_feedforward * hidden + statistics
        + kept_for_choice(job)
    )  # fmt: skip


def _cross_per_token(job: Job) -> int:
    """Bytes that autograd keeps for the backward pass of cross-attention, of each token."""
    model, narrow = job.model, job.itemsize
    # Residual; its LayerNorm; q and out; states of the encoder, which autocast casts in each block.
    cast = 2 * narrow if job.is_autocast else 0
    wide = _WIDE + 3 * narrow + cast + (_WIDE if model.dropout else 0)
    return model.d_model * wide + model.kv_dim * 2 * narrow + 4 * model.nhead + 8


def _backward_per_token(job: Job, work: Work) -> int:
    """Bytes of gradients beside what a block keeps, at the worst point of its backward pass."""
    model, narrow = job.model, job.itemsize
    # At the output of the feed-forward: its gradient, and that of the last product's input.
    feed_forward = model.d_model * _WIDE + model.dim_feedforward * narrow
    # At attention, when what the feed-forward kept is released: gradients of its output, of the
    # residual, of q, k, v, and those of one branch before they are added.
    share = max((branch.share for branch in work.branches[1:]), default=0.0)
    wide = 4 if narrow < 4 else 0  # gradients of branches are added up in float32
    attention = model.d_model * (_WIDE + narrow + 3 * narrow + 3 * wide + 3 * share * narrow)
    released = model.d_model * (_WIDE + narrow) + model.dim_feedforward * 2 * narrow
    return round(max(feed_forward, attention - released))


def _training(job: Job, work: Work) -> Iterator[Memory]:
    model, tokens = job.model, job.tokens
    sizes = count_parameters(model)
    kept = tokens * kept_per_token(job)
    backward = tokens * _backward_per_token(job, work)
    is_recomputed = model.activation_checkpointing
    inputs = tokens * model.d_model * _WIDE
    cross = tokens * _cross_per_token(job) if sizes.num_cross else 0
    blocks = sizes.num_blocks * (inputs if is_recomputed else kept)
    blocks += 0 if is_recomputed else sizes.num_cross * cross
    norms = 2 if sizes.num_cross else 1
    outside = tokens * (_TOKEN_BYTES + _rotation_bytes(model) + norms * (model.d_model * _WIDE + 8))
    scored = tokens * model.d_model * job.itemsize  # what the output layer reads
    base = _states(job, sizes)
    accumulated = _gradient_bytes(job, sizes) if job.accumulation > 1 else 0
    messages = {"messages": work.received} if work.received else {}
    of_output = 4 * model.num_tokens * model.d_model
    in_block = sizes.block_products + sizes.cross_products
    loss_forward, loss_backward, gradients_of_loss = _loss_bytes(job)

    def memory(
        moment: str, activations: int, temporary: int, *, gradients: int = 0, loss: int = 0
    ) -> Memory:
        parts = {
            **base,
            "gradients": max(accumulated, gradients),
            "activations": activations,
            "loss": loss,
            "temporary": temporary,
            **messages,
        }
        copies = 0
        if job.is_autocast and not is_recomputed:
            copies = 2 * (sizes.products + model.num_tokens * model.d_model)
        elif job.is_autocast:
            copies = 2 * (in_block + model.num_tokens * model.d_model)
        parts["bfloat16 weights"] = copies
        return Memory(moment, {name: size for name, size in parts.items() if size})

    if choice := bytes_of_choice(job):
        # The last block has not made all it keeps yet: no feed-forward, not all of its attention.
        later = 2 * model.dim_feedforward * job.itemsize + round(kept_for_choice(job) / 2)
        held = blocks + outside - (0 if is_recomputed else tokens * later)
        yield memory("the choice of blocks", held, round(choice))
    everything = blocks + outside + scored
    yield memory("the loss", everything, 0, loss=loss_forward)
    yield memory(
        "the backward pass of the loss", everything, 0, gradients=gradients_of_loss,
        loss=loss_backward,
    )  # fmt: skip
    again = kept + cross - inputs if is_recomputed else 0
    some = _shard_of(job, of_output) + 4 * in_block
    yield memory(
        "the backward pass of the last block", blocks + outside + again, backward, gradients=some
    )
    last = _gradient_bytes(job, sizes) + (of_output if model.tie_embeddings else 0)
    yield memory("the backward pass of the first block", kept + outside, backward, gradients=last)
    if job.shards > 1:
        yield Memory(
            "building the model", {"parameters": 4 * sizes.total}
        )  # before they are spread
    step = 4 * (sizes.total // job.shards if job.on_gpu else max(in_block, of_output // 4))
    yield memory("the optimiser's step", 0, step, gradients=last)


def _states(job: Job, sizes: Parameters) -> dict[str, int]:
    """Parameters and optimiser, which are there all the time."""
    held = {
        "parameters": _shard_of(job, 4 * sizes.total),
        "optimiser": _shard_of(job, OPTIMIZER_BYTES[job.optimizer] * sizes.total),
    }
    if job.shards > 1:
        # FSDP gathers the outermost module for the whole pass, and two blocks at a time.
        held["gathered parameters"] = 4 * (sizes.outside + 2 * (sizes.block + sizes.cross))
    elif job.devices > 1:
        # DistributedDataParallel copies gradients to the buckets in which they travel.
        held["gradient buckets"] = 4 * sizes.total
    return held


def _gradient_bytes(job: Job, sizes: Parameters) -> int:
    """Of all gradients; of those that are not spread yet, two blocks'."""
    whole = 4 * sizes.total
    return whole if job.shards == 1 else _shard_of(job, whole) + 8 * (sizes.block + sizes.cross)


def _shard_of(job: Job, num_bytes: int) -> int:
    return -(-num_bytes // job.shards)


def _rotation_bytes(model: LongNetConfig) -> int:
    """Of a token: sine and cosine for q and for k, which all blocks share."""
    return 16 * model.head_dim if model.positions in ("xpos", "rotary") else 0


def _loss_bytes(job: Job) -> tuple[int, int, int]:
    """Largest memory of the loss in forward and backward, and the gradient of the output layer."""
    vocabulary, width = job.model.num_tokens, job.model.d_model
    cast = job.itemsize if job.is_autocast else 0
    if not job.chunked_loss:
        logits = job.tokens * vocabulary
        # Logits and their logarithmic softmax; then that and the gradients of both.
        return logits * (8 + cast), logits * 12, 0
    # A chunk runs forward and backward, and its gradients are added: the gradients of hidden and
    # weight are there in forward. In backward a number multiplies them.
    chunk = min(job.tokens, chunk_tokens(vocabulary)) * vocabulary
    gradients = job.tokens * width * job.itemsize + 4 * vocabulary * width
    product = 4 * vocabulary * width
    return chunk * (12 + 2 * cast) + gradients + product, 2 * gradients, product


def _inference(job: Job, work: Work) -> Iterator[Memory]:
    model, narrow = job.model, job.itemsize
    sizes = count_parameters(model)
    base = {"parameters": _shard_of(job, narrow * sizes.total)}
    if job.shards > 1:
        base["gathered parameters"] = narrow * (sizes.outside + 2 * (sizes.block + sizes.cross))
    if job.mode != "forward":
        base["cache"] = cache_bytes(job)
    if work.received:
        base["messages"] = work.received
    tokens, wide = job.tokens, max(4, narrow)
    per_token = _TOKEN_BYTES + (_rotation_bytes(model) if job.mode != "decoding" else 0)

    def memory(moment: str, temporary: float) -> Memory:
        return Memory(moment, {**base, "temporary": round(temporary + tokens * per_token)})

    # Residual, its LayerNorm, q, k and v; and on top the rotation of one, in float32.
    rotation = 0 if model.positions == "none" else 3 * wide + narrow
    share = max((branch.share for branch in work.branches[1:]), default=0.0)
    attention = 6 * narrow + (1 + share) * (wide if narrow < 4 else share * narrow)
    largest = tokens * model.d_model * max(5 * narrow + rotation, attention)
    if job.mode == "decoding" and narrow < 4 and not job.on_gpu:
        # A processor computes with keys and values of a block in float32.
        largest += cache_bytes(job) // model.num_decoder_layers
    if job.mode != "decoding":
        largest = max(largest, bytes_attending(job))
    elif not has_bounded_cache(model):
        largest += bytes_continuing(job)
    yield memory("the attention of a block", largest)
    if job.memory_len is not None and model.kv_dim < model.d_model:
        # PyTorch's dense attention gets a copy of keys and values for each head of the queries.
        copies = 2 * job.rows * job.memory_len * model.d_model
        yield memory("the cross-attention", narrow * (copies + 6 * tokens * model.d_model))
    # Input of the block, both LayerNorms, residual, result, and the inputs of the convolution; and
    # of an operation in between input and result.
    held = 5 + bool(model.key_conv)
    hidden = tokens * narrow * (held * model.d_model + 2 * model.dim_feedforward)
    yield memory("the feed-forward of a block", hidden)
    scored = tokens if job.mode == "forward" else job.rows
    yield memory("the scores", narrow * (2 * tokens * model.d_model + scored * model.num_tokens))
