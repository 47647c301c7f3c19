"""A predictor that counts: what the tokens before a target give away without a neural network.

It is a yardstick for the contextwise loss. Counts of the training text stand still. Counts of the
window start empty and grow with the context, so they gain from distant tokens by copying.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dilated_models.text.streams import Int64Array, TokenStream
from dilated_models.training.contextwise import ContextLoss, Stretches, bits_per_byte
from dilated_models.training.evaluation import scored_ranges

_ORDERS = range(6)  # numbers of tokens before the predicted one
_TRAINING_TOKENS = 1 << 20
_STRETCH_TOKENS = 1 << 16
# Weight of the order below, in observations of the window; by order.
_INERTIA = (1000.0, 1000.0, 100.0, 16.0, 4.0, 1.0)
_BASE, _ROW = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)  # odd, high entropy

_Keys = npt.NDArray[np.uint64]
_Floats = npt.NDArray[np.float64]


def predictor_losses(
    stretches: Stretches, training: TokenStream, *, num_tokens: int
) -> tuple[ContextLoss, ...]:
    """Bits per byte of the counting predictor on the targets of the contextwise loss.

    For orders 0 … 5, p ← (n(x) + λ·p) / (n + λ): first with counts of at most 2²⁰ training tokens,
    λ being the number of different tokens seen after the context (Witten and Bell's method C), then
    with counts of the window.

    Args:
        stretches: The targets.
        training: The training text.
        num_tokens: Size of the vocabulary.

    Returns:
        One loss for each context of the stretches.
    """
    known = _read(training)
    half = stretches.byte_lengths.shape[1]
    static = np.full(stretches.byte_lengths.shape, 1 / num_tokens)
    for order in _ORDERS:
        contexts, grams = _keys(stretches.tokens.numpy(), order)
        static = _blend_training(static, known, order, contexts[:, -half:], grams[:, -half:])
    losses: list[ContextLoss] = []
    for context in stretches.contexts:
        inputs, targets = stretches.windows(context)
        tokens = torch.cat((inputs, targets[:, -1:]), dim=1).numpy()
        p = static.reshape(targets.shape)
        for order in _ORDERS:
            seen, matched = (_earlier(keys)[:, -context // 2 :] for keys in _keys(tokens, order))
            p = (matched + _INERTIA[order] * p) / (seen + _INERTIA[order])
        nats = torch.from_numpy(-np.log(p)).view_as(stretches.byte_lengths)  # pyright: ignore[reportUnknownMemberType]
        loss = bits_per_byte(nats, stretches.byte_lengths)
        losses.append(ContextLoss(context=context, bits_per_byte=loss))
    return tuple(losses)


def _read(training: TokenStream) -> Int64Array:
    """At most 2²⁰ tokens, spread over the text."""
    ranges = scored_ranges(len(training), seq_len=_STRETCH_TOKENS, max_tokens=_TRAINING_TOKENS)
    return np.concatenate([training.read(start, stop) for start, stop in ranges])


def _keys(tokens: Int64Array, order: int) -> tuple[_Keys, _Keys]:
    """Hashes of each token's context of `order` tokens, and of that context with the token.

    Args:
        tokens: `(N, L)`.
        order: Number of tokens in a context.

    Returns:
        Both `(N, L − order)`, for the tokens from `order` on.
    """
    numbers = tokens.astype(np.uint64) + np.uint64(1)
    length = tokens.shape[1] - order
    contexts = np.zeros((len(tokens), length), dtype=np.uint64)
    for start in range(order):
        contexts = (contexts + numbers[:, start : start + length]) * _BASE
    # uint64 wraps around. Equal keys of different contexts are as rare as in any 64-bit hash.
    return contexts, contexts + numbers[:, order:]


def _blend_training(
    p: _Floats, known: Int64Array, order: int, contexts: _Keys, grams: _Keys
) -> _Floats:
    """P with the counts of the training text at one order."""
    known_contexts, known_grams = (keys[0] for keys in _keys(known[None], order))
    first_of_gram = np.unique(known_grams, return_index=True)[1]
    followers = _count(known_contexts[first_of_gram], contexts)
    seen, matched = _count(known_contexts, contexts), _count(known_grams, grams)
    return np.where(seen > 0, (matched + followers * p) / np.maximum(seen + followers, 1), p)


def _count(known: _Keys, keys: _Keys) -> Int64Array:
    """How often each key is among the known ones."""
    ascending = np.sort(known)
    return np.searchsorted(ascending, keys, "right") - np.searchsorted(ascending, keys, "left")


def _earlier(keys: _Keys) -> Int64Array:
    """How often each key comes earlier in its row, `(N, L)`."""
    rows = np.arange(len(keys), dtype=np.uint64)[:, None]
    flat = (keys + rows * _ROW).ravel()
    order = np.argsort(flat, kind="stable")
    ascending = flat[order]
    is_first = np.append(True, ascending[1:] != ascending[:-1])
    places = np.arange(len(flat))
    counts = np.empty_like(places)
    counts[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return counts.reshape(keys.shape)
