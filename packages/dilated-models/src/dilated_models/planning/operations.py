"""What a step computes on a rank: matrix products, attention, and elementwise operations.

Elementwise operations are counted by the bytes that they read and write, as PyTorch runs them one
by one. The counts are of numbers of one token in units of the width d of the model or f of its
feed-forward, added up over the operations of the layers and of their derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from dilated_models.longnet.size import count_parameters
from dilated_models.planning.attention import BACKWARD_OVER_FORWARD, Work
from dilated_models.planning.job import Job
from dilated_models.planning.kinds import Branch, Product, dense_branches, has_bounded_cache
from dilated_models.planning.memory import kept_per_token

Kind = Literal["products", "attention", "elementwise"]


class Operation(NamedTuple):
    """Operations of one kind, of a whole step.

    Attributes:
        name: For tables.
        kind: Which rate of `Hardware` is theirs.
        flops: FLOPs of matrix products and of attention, as PyTorch's `FlopCounterMode` counts.
        bytes: Read and written.
        size: What the rate depends on: the smallest side of a product, rows of a segment, or the
            bytes that are in use.
        num_operations: How many operations PyTorch runs.
        is_backward: Whether they belong to the backward pass.
        numbers: Numbers of the functions in `Hardware.number_s`.
    """

    name: str
    kind: Kind
    flops: float
    bytes: float
    size: float
    num_operations: float
    is_backward: bool = False
    numbers: tuple[tuple[str, float], ...] = ()


class _Elementwise(NamedTuple):
    """Numbers read and written for a token, and how many operations that takes."""

    d: float
    f: float
    num_operations: int


# LayerNorms read and write (3 of width d, 1 of f); two residual sums; the activation.
_FORWARD = _Elementwise(3 * 2 + 2 * 3, 2 + 2, 9)
# Turn q and k: negate and interleave pairs, multiply twice, add.
_ROTATION = _Elementwise(2 * 10, 0, 14)
_CONVOLUTION = _Elementwise(4, 0, 1)  # for each lag
# LayerNorms read two tensors, write one, and read both again for their parameters; gradients of the
# residual and of the input of three projections are added; biases sum up their gradients.
_BACKWARD = _Elementwise(3 * 5 + 2 * 3 + 2 * 3 + 5, 5 + 3 + 1, 24)
_ROTATION_BACKWARD = _Elementwise(2 * 17, 0, 30)
_CONVOLUTION_BACKWARD = _Elementwise(9, 0, 4)
_OPTIMIZER = {"adamw": (20, 12), "sgd": (3, 2)}  # numbers of a parameter, operations of a tensor
_CLIPPING = (3, 2)
_TENSORS_OF_BLOCK = 20
_FEED_FORWARD = "feed-forward"  # two products of equal size
_LOSS = 4  # numbers of a logit that are read and written
# Operations of a token from a `DecodingCache` on a CPU, where no kernel runs the whole pattern:
# beside those of a forward pass, in each block, for each of its branches, and outside of blocks.
_DECODING, _DECODING_BRANCH, _DECODING_OUTSIDE = 42, 46, 48


def operations_of(job: Job, work: Work) -> list[Operation]:
    """All operations of a step of the job on the rank that has most to do."""
    is_training = job.mode == "training"
    model = job.model
    parts = job.accumulation
    if job.mode == "prefill":
        parts = -(-job.seq_len // job.prompt_part)
    times = job.num_blocks * parts
    forward = list(_of_block(job, work))
    found = [_times(x, times) for x in forward]
    cross = _times_all(_of_cross(job), model.num_decoder_layers * parts)
    found += cross
    found += [_times(x, parts) for x in _outside(job)]
    if not is_training:
        return found
    found += _cross_backward(cross)
    found += [_times(x, times) for x in _of_block_backward(job, work)]
    if model.activation_checkpointing:
        found += [_times(x, times) for x in _again(forward)]
        found += [x._replace(name=f"{x.name}, again", is_backward=True) for x in cross]
    found += [_times(x, parts) for x in _outside_backward(job)]
    found.append(_of_optimizer(job))
    return found


def _of_cross(job: Job) -> list[Operation]:
    """Attention of a block to the states of an encoder, which is dense."""
    model, tokens = job.model, job.tokens
    if not job.has_cross:
        return []
    width = model.d_model
    dense = Work(_cross_branches(job))
    found = [
        _product("cross-attention, projections", job, tokens, width, width, 2),
        *(x._replace(name="cross-attention") for x in _attention(job, dense, is_backward=False)),
        _elementwise("cross-attention, LayerNorm", job, _Elementwise(5, 0, 4)),
    ]
    if job.memory_len is None:  # a cache holds the keys and values of another text
        found.append(
            _product("cross-attention, keys and values", job, tokens, width, model.kv_dim, 2)
        )
    return found


def _cross_branches(job: Job) -> tuple[Branch, ...]:
    """The pairs of cross-attention: causal of one text, all of two texts."""
    model, rows = job.model, job.rows
    if job.memory_len is not None:
        flops = 4.0 * job.tokens * job.memory_len * model.d_model
        return (Branch(job.memory_len, flops, 1.0),)
    if job.mode == "decoding":
        keys = job.seq_len + 1
        return (Branch(keys, 4.0 * rows * keys * model.d_model, 1.0),)
    branches = dense_branches(model, job.seq_len, rows, head_dim=model.head_dim)
    share = job.cp if job.mode != "prefill" else -(-job.seq_len // job.prompt_part)
    return tuple(x._replace(flops=x.flops / share) for x in branches)


def _cross_backward(cross: list[Operation]) -> list[Operation]:
    factors = {"products": 2.0, "attention": BACKWARD_OVER_FORWARD, "elementwise": 2.0}
    return [_times(x, factors[x.kind])._replace(is_backward=True) for x in cross]


def _times_all(operations: list[Operation], times: float) -> list[Operation]:
    return [_times(x, times) for x in operations]


def _again(forward: list[Operation]) -> Iterator[Operation]:
    """What is recomputed: all but the last product, whose result nothing in backward reads."""
    for x in forward:
        recomputed = _times(x, 0.5) if x.name == _FEED_FORWARD else x
        yield recomputed._replace(name=f"{x.name}, again", is_backward=True)


def _times(x: Operation, times: float) -> Operation:
    return x._replace(
        flops=x.flops * times,
        bytes=x.bytes * times,
        num_operations=x.num_operations * times,
        numbers=tuple((name, count * times) for name, count in x.numbers),
    )


def _product(name: str, job: Job, m: int, k: int, n: int, times: int = 1) -> Operation:
    numbers = m * k + k * n + m * n
    return Operation(
        name, "products", 2.0 * m * k * n * times, float(numbers * job.itemsize * times),
        min(m, k, n), times,
    )  # fmt: skip


def _twice(x: Operation) -> Operation:
    """The two products of the backward pass: for the gradients of input and weight."""
    return _times(x, 2)._replace(is_backward=True)


def _products_of_block(job: Job) -> list[Operation]:
    tokens, d, f = job.tokens, job.model.d_model, job.model.dim_feedforward
    projected = _projected(job)
    return [
        _product("projections", job, projected, d, d, 2),
        _product("keys and values", job, projected, d, job.model.kv_dim, 2),
        _product(_FEED_FORWARD, job, tokens, d, f, 2),
    ]


def _projected(job: Job) -> int:
    """Tokens that are projected: with a cache, NSA projects all of each text once more."""
    if job.model.attention_kind != "nsa" or job.mode in ("training", "forward"):
        return job.tokens
    if job.mode == "decoding":
        return job.rows * (job.seq_len + 1)
    parts = -(-job.seq_len // job.prompt_part)
    whole = sum(min(job.seq_len, (i + 1) * job.prompt_part) for i in range(parts))
    return job.rows * whole // parts


def _products_of_kind(job: Job, products: tuple[Product, ...]) -> Iterator[Operation]:
    """What attention of some kinds multiplies beside pairs and projections."""
    for x in products:
        numbers = x.times * (x.m * x.k + x.k * x.n + x.m * x.n)
        yield Operation(
            x.name, "products", x.flops, float(numbers * job.itemsize), min(x.m, x.k, x.n), x.calls
        )


def _backward_of_kind(job: Job, products: tuple[Product, ...]) -> Iterator[Operation]:
    for x, operation in zip(products, _products_of_kind(job, products), strict=True):
        if x.backward:
            yield _times(operation, x.backward)._replace(is_backward=True)


def _elementwise(name: str, job: Job, numbers: _Elementwise) -> Operation:
    model, item = job.model, _wide(job)
    total = numbers.d * model.d_model + numbers.f * model.dim_feedforward
    return Operation(
        name,
        "elementwise",
        0.0,
        float(job.tokens * total * item),
        _in_use(job),
        numbers.num_operations,
    )


def _wide(job: Job) -> int:
    """Bytes of a number of the residual stream."""
    return 4 if job.mode == "training" else job.itemsize


def _in_use(job: Job) -> float:
    """Bytes that pass through the caches before a tensor is read again."""
    if job.mode == "training":
        model = job.model
        blocks = 1 if model.activation_checkpointing else model.num_decoder_layers
        return float(job.tokens * kept_per_token(job) * blocks)
    return float(job.tokens * _wide(job) * (4 * job.model.d_model + 2 * job.model.dim_feedforward))


def _functions(job: Job, *, is_backward: bool) -> tuple[tuple[str, float], ...]:
    """Numbers of the functions of a block that compute more than they move."""
    model, found = job.model, list[tuple[str, float]]()
    if model.activation != "relu":
        found.append(("gelu", float(job.tokens * model.dim_feedforward)))
    if model.dropout and job.mode == "training" and not is_backward:
        dropped = job.tokens * (2 * model.d_model + model.dim_feedforward)
        found.append(("dropout", float(dropped)))
    return tuple(found)


def _sum(*parts: _Elementwise) -> _Elementwise:
    return _Elementwise(*(sum(numbers) for numbers in zip(*parts, strict=True)))


def _of_block(job: Job, work: Work) -> Iterator[Operation]:
    model = job.model
    yield from _products_of_block(job)
    yield from _products_of_kind(job, work.products)
    yield from _attention(job, work, is_backward=False)
    # Results of all branches but the first are read and added to it.
    merged = sum(branch.share for branch in work.branches[1:])
    numbers = [_FORWARD, _Elementwise(4 * merged, 0, 6 * (len(work.branches) - 1))]
    if model.positions in ("xpos", "rotary"):
        numbers.append(_ROTATION)
    numbers += [_CONVOLUTION] * model.key_conv
    if model.dropout and job.mode == "training":
        numbers.append(_Elementwise(8, 4, 6))
    if _decodes_by_many_operations(job):
        numbers.append(
            _Elementwise(0, 0, _DECODING + _DECODING_BRANCH * len(model.segment_lengths))
        )
    operation = _elementwise("LayerNorm and others", job, _sum(*numbers))
    yield operation._replace(numbers=_functions(job, is_backward=False))


def _decodes_by_many_operations(job: Job) -> bool:
    return job.mode == "decoding" and not job.on_gpu and has_bounded_cache(job.model)


def _of_block_backward(job: Job, work: Work) -> Iterator[Operation]:
    model = job.model
    yield from map(_twice, _products_of_block(job))
    yield from _backward_of_kind(job, work.products)
    yield from _attention(job, work, is_backward=True)
    merged = sum(branch.share for branch in work.branches)
    numbers = [_BACKWARD, _Elementwise(9 * merged, 0, 6 * len(work.branches))]
    if model.positions in ("xpos", "rotary"):
        numbers.append(_ROTATION_BACKWARD)
    numbers += [_CONVOLUTION_BACKWARD] * model.key_conv
    if model.dropout:
        numbers.append(_Elementwise(6, 3, 3))
    operation = _elementwise("LayerNorm and others", job, _sum(*numbers))
    yield operation._replace(is_backward=True, numbers=_functions(job, is_backward=True))


def _attention(job: Job, work: Work, *, is_backward: bool) -> Iterator[Operation]:
    factor = BACKWARD_OVER_FORWARD if is_backward else 1.0
    width, item = job.model.d_model, job.itemsize
    for branch in work.branches:
        rows = job.tokens * branch.share
        numbers = (8 if is_backward else 4) * rows * width
        if job.mode == "decoding":
            numbers = 2 * branch.rows * job.rows * width  # all keys and values are read
        yield Operation(
            "attention", "attention", branch.flops * factor, float(numbers * item), branch.rows,
            6 if is_backward else 4, is_backward,
        )  # fmt: skip


def _scored(job: Job) -> int:
    """Tokens whose scores are computed at once."""
    return job.tokens if job.mode in ("training", "forward") else job.rows


def _outside(job: Job) -> Iterator[Operation]:
    model = job.model
    yield _product("output layer", job, _scored(job), model.d_model, model.num_tokens)
    numbers = [_Elementwise(2 + 2 + 2, 0, 5)]
    if _decodes_by_many_operations(job):
        numbers.append(_Elementwise(0, 0, _DECODING_OUTSIDE))
    yield _elementwise("embedding", job, _sum(*numbers))
    if job.mode == "training":
        yield _loss(job)


def _loss(job: Job) -> Operation:
    logits = float(job.tokens * job.model.num_tokens)
    return Operation(
        "loss", "elementwise", 0.0, 4 * _LOSS * logits, max(_in_use(job), 8 * logits), 8,
        numbers=(("softmax", logits),),
    )  # fmt: skip


def _outside_backward(job: Job) -> Iterator[Operation]:
    model, tokens = job.model, job.tokens
    output = _product("output layer", job, tokens, model.d_model, model.num_tokens)
    yield _twice(output)
    yield _loss(job)._replace(is_backward=True)
    embedding = _elementwise("embedding", job, _Elementwise(8, 0, 6))
    yield embedding._replace(is_backward=True)


def _of_optimizer(job: Job) -> Operation:
    sizes = count_parameters(job.model)
    numbers, count = _OPTIMIZER[job.optimizer]
    mine = sizes.total / job.shards
    tensors = _TENSORS_OF_BLOCK * (sizes.num_blocks + sizes.num_cross / 2) + 3
    return Operation(
        "optimiser", "elementwise", 0.0, 4.0 * mine * (numbers + _CLIPPING[0]),
        12.0 * mine, tensors * (count + _CLIPPING[1]), True,
    )  # fmt: skip
