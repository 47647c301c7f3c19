"""The definition of dilated attention at a few positions of a sequence of any length, in float64.

The dense oracle holds S × S counts. Of a sequence of millions only some rows can be held, and those
suffice to tell whether a kernel computes the right thing there: this is how results too large for
the oracle are checked, before anything is timed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from dilated_core import DilatedPattern


class Call(NamedTuple):
    """One call and its results, all `(1, S, H, D)`, lse `(1, S, H)`; gradients may be None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    dq: torch.Tensor | None
    dk: torch.Tensor | None
    dv: torch.Tensor | None


def sampled_errors(
    call: Call,
    pattern: DilatedPattern,
    *,
    is_causal: bool,
    num_positions: int = 48,
    num_heads: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """Relative errors of out, lse and gradients over randomly drawn positions of drawn heads.

    out, lse and dq of a query follow from the inputs. dk and dv of a key take the lse and out of
    all queries from the call; where those are wrong, the drawn queries show it.
    """
    if pattern.padding != "masked":
        raise ValueError(f"padding is {pattern.padding!r}; zero keys are not part of this oracle.")
    _, S, H, _ = call.q.shape
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randperm(H, generator=generator)[:num_heads].tolist()
    off: dict[str, list[float]] = {}
    norm: dict[str, list[float]] = {}
    for head in heads:
        positions = torch.randint(S, (num_positions,), generator=generator)
        # The last positions are those that an overflow or a short segment gets wrong.
        positions[-2:] = torch.tensor([S - 2, S - 1])
        positions = positions.to(call.q.device)
        for name, (actual, exact) in _compare(call, pattern, is_causal, head, positions).items():
            off.setdefault(name, []).append((actual.double() - exact).square().sum().item())
            norm.setdefault(name, []).append(exact.square().sum().item())
    return {name: math.sqrt(sum(off[name]) / (sum(norm[name]) or 1.0)) for name in off}


def _compare(
    call: Call, pattern: DilatedPattern, is_causal: bool, head: int, positions: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the call says and what is right at these positions of one head."""
    _, S, H, D = call.q.shape
    scale = 1 / math.sqrt(D)
    group = H // call.k.shape[2]
    q, dout = call.q[0, :, head].detach(), call.dout[0, :, head]
    k, v = (x[0, :, head // group].detach().double() for x in (call.k, call.v))
    counts = count_keys(pattern, positions, head, S, H)
    everywhere = torch.arange(S, device=positions.device)
    seen = counts * (everywhere <= positions[:, None]) if is_causal else counts
    logits = q[positions].double() @ k.T * scale + seen.log()
    lse = logits.logsumexp(-1)
    empty = lse == -math.inf
    p = (logits - lse.masked_fill(empty, 0)[:, None]).exp()
    out = p @ v
    pairs = {"out": (call.out[0, positions, head].detach(), out)}
    if call.lse is not None:
        actual = call.lse[0, positions, head].detach()
        # -inf is right where it is expected, and infinitely wrong elsewhere.
        right = (actual == -math.inf) & empty
        pairs["lse"] = (actual.masked_fill(right, 0), lse.masked_fill(empty, 0))
    if call.dq is not None:
        dp = dout[positions].double() @ v.T
        delta = (p * dp).sum(-1, keepdim=True)
        pairs["dq"] = (call.dq[0, positions, head], (p * (dp - delta)) @ k * scale)
    # With grouped queries a key gathers the gradients of several heads.
    if call.dk is not None and call.dv is not None and call.lse is not None and group == 1:
        seen = counts * (everywhere >= positions[:, None]) if is_causal else counts
        scores = k[positions] @ q.double().T * scale
        lse_of_queries = call.lse[0, :, head].detach().double().nan_to_num(neginf=math.inf)
        p = seen * (scores - lse_of_queries).exp()
        dout_wide = dout.double()
        delta = (dout_wide * call.out[0, :, head].detach().double()).sum(-1)
        ds = p * (v[positions] @ dout_wide.T - delta)
        pairs["dk"] = (call.dk[0, positions, head], ds @ q.double() * scale)
        pairs["dv"] = (call.dv[0, positions, head], p @ dout_wide)
    return pairs


def count_keys(
    pattern: DilatedPattern, positions: torch.Tensor, head: int, seq_len: int, num_heads: int
) -> torch.Tensor:
    """How many branches let each of `positions` see each position, float64 `(positions, S)`.

    The relation is symmetric without causality: it also says which queries see a key.
    """
    everywhere = torch.arange(seq_len, device=positions.device)
    counts = torch.zeros(len(positions), seq_len, dtype=torch.float64, device=positions.device)
    for w, r in pattern.branches:
        w = min(w, seq_len)
        blocked = pattern.head_offsets == "blocked"
        offset = head // math.ceil(num_heads / r) if blocked else head % r
        kept = everywhere % w % r == offset
        same_segment = positions[:, None] // w == everywhere // w
        counts += same_segment & kept & kept[positions][:, None]
    return counts
