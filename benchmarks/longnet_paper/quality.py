"""Table 2, figure 7b, and detached mixing weights: what models of equal tokens have learnt.

Each contender trains on the same number of bytes, in windows of one length. Then all score the same
unseen bytes, in windows of three lengths, and with growing context. Fixed-sparse attention has as
many keys for a query as LongNet with windows as long. Dense and fixed-sparse attention read inputs
that are longer than their training windows with blockwise causal attention, as in the paper;
LongNet's segments end at the training length by themselves.

The official implementation computes the weights of the branches without a gradient. Its forward
pass is the same, so "detached" trains from the same weights on the same batches as LongNet.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.training.contextwise import contextwise, read_stretches
from torch import Tensor
from torch.nn.functional import cross_entropy

from longnet_paper.attention import (
    DetachedMixing,
    MaskedAttention,
    blockwise_causal,
    columns_for,
    fixed_sparse,
    mean_keys,
)
from longnet_paper.sizes import Size
from longnet_paper.text import Text
from longnet_paper.training import Batch, fit

TARGETS = 8192
BYTES_PER_FORWARD = 8192
PROJECTIONS = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}


def contenders(size: Size) -> dict[str, tuple[str, int]]:
    """Kind of attention and length of the training windows, by name; the order of Table 2."""
    names = {f"dense, {size.short}": ("dense", size.short)}
    for seq_len in size.long:
        for kind in ("fixed-sparse", "LongNet"):
            names[f"{kind}, {seq_len}"] = (kind, seq_len)
    return names | {f"detached, {size.long[-1]}": ("detached", size.long[-1])}


def build(kind: str, seq_len: int, size: Size, *, seed: int) -> tuple[LongNetLM, dict[str, Any]]:
    """A model, and facts about its attention that the result records.

    Args:
        kind: "dense", "fixed-sparse", "LongNet", or "detached" for LongNet with `DetachedMixing`.
        seq_len: Of the training windows.
        size: Of the experiment.
        seed: Of the weights, which are the same for all kinds.
    """
    torch.manual_seed(seed)
    pattern = size.pattern(seq_len)
    model = LongNetLM(LongNetConfig(**size.model(pattern)))
    keys = mean_keys(pattern, seq_len, size.num_heads)
    facts: dict[str, Any] = {"mean_keys": round(keys, 1)}
    if kind == "detached":
        replace_attention(model, lambda: DetachedMixing(pattern))
    elif kind != "LongNet":
        columns = columns_for(keys, seq_len, size.short) if kind == "fixed-sparse" else 0

        def mask(length: int) -> Tensor:
            allowed = blockwise_causal(length, seq_len)
            return allowed & fixed_sparse(length, size.short, columns) if columns else allowed

        replace_attention(model, lambda: MaskedAttention(mask))
        facts = {"columns": columns, "mean_keys": round(float(mask(seq_len).sum() / seq_len), 1)}
    return model, facts


def replace_attention(model: LongNetLM, make: Any) -> None:
    """Give every block of a model another attention inside."""
    for block in model.blocks:
        inner: Any = block.attention
        attention = make()
        attention.config = inner.attention.config  # which DilatedSelfAttention reads
        inner.attention = attention


def measure(name: str, seed: int, size: Size, device: str = "cpu") -> dict[str, Any]:
    """Train and score one contender."""
    kind, seq_len = contenders(size)[name]
    model, facts = build(kind, seq_len, size, seed=seed)
    model.to(device)
    text, began = Text(size), time.process_time()
    unseen_batch = text.batch(seq_len, size.steps, seed)
    if has_branches := kind in ("LongNet", "detached"):
        facts["gradient_error"] = {"before": gradient_error(model, unseen_batch, size)}
    losses = fit(model, lambda step: text.batch(seq_len, step, seed), steps=size.steps)
    if has_branches:
        facts["gradient_error"]["after"] = gradient_error(model, unseen_batch, size)
    trained = time.process_time()
    stretches = read_stretches(text.validation, seq_len=size.long[-1], max_targets=TARGETS)
    assert stretches is not None
    tokens = stretches.tokens[: TARGETS // size.long[-1] or 1]
    by_context = contextwise(model, text.validation, stretches).by_context
    return {
        "contender": name,
        "kind": kind,
        "seq_len": seq_len,
        **facts,
        "seed": seed,
        "scale": size.scale,
        "steps": size.steps,
        "tokens": size.steps * size.tokens_per_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "last_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "by_window": [
            {"window": window, "bits_per_byte": round(score(model, tokens, window), 4)}
            for window in size.scored
        ],
        "by_context": [
            {"context": row.context, "bits_per_byte": round(row.bits_per_byte, 4)}
            for row in by_context
        ],
        "targets": tokens[:, 1:].numel(),
        "targets_by_context": stretches.byte_lengths.numel(),
        "train_cpu_s": round(trained - began, 1),
        "score_cpu_s": round(time.process_time() - trained, 1),
        "model": model.config.to_dict(),
    }


@torch.no_grad()
def score(model: LongNetLM, tokens: Tensor, window: int) -> float:
    """Bits per byte of all targets, each window read on its own: mean over its positions."""
    device = next(model.parameters()).device
    inputs, targets = (x.reshape(-1, window) for x in (tokens[:, :-1], tokens[:, 1:]))
    rows = max(1, BYTES_PER_FORWARD // window)
    total = 0.0
    for first in range(0, len(inputs), rows):
        logits = model(inputs[first : first + rows].to(device))
        part = targets[first : first + rows].to(device)
        total += float(cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="sum"))
    return total / targets.numel() / torch.tensor(2.0).log().item()


def gradient_error(model: LongNetLM, batch: Batch, size: Size) -> dict[str, float]:
    """Of the detached against the exact gradient at the same weights: ‖difference‖ / ‖exact‖."""
    gradients: dict[str, dict[str, Tensor]] = {}
    for kind in ("LongNet", "detached"):
        twin, _ = build(kind, batch[0].shape[1], size, seed=0)
        twin.load_state_dict(model.state_dict())
        twin.to(device := next(model.parameters()).device)
        inputs, targets = (x.to(device) for x in batch)
        cross_entropy(twin(inputs).flatten(0, 1), targets.flatten()).backward()
        gradients[kind] = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    exact, detached = gradients["LongNet"], gradients["detached"]
    chosen = {"all": list(exact)} | {
        part: [n for n in exact if infix in n] for part, infix in PROJECTIONS.items()
    }
    return {
        part: round(relative_error(detached, exact, names), 4) for part, names in chosen.items()
    }


def relative_error(other: dict[str, Tensor], exact: dict[str, Tensor], names: list[str]) -> float:
    """Norm of the difference of all named tensors together, over that of `exact`."""
    difference, norm = (
        torch.stack([x.double().square().sum() for x in parts]).sum().sqrt()
        for parts in ([other[n] - exact[n] for n in names], [exact[n] for n in names])
    )
    return float(difference / norm)
