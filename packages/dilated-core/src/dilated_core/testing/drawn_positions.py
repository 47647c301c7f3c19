"""The definition of dilated attention at a few positions of a sequence of any length, in float64.

The dense oracle holds S × S counts. Of a sequence of millions only some rows can be held, and those
suffice to tell whether a kernel computes the right thing there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from dilated_core.pattern.branches import DilatedPattern


def errors_at_drawn_positions(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    results: Mapping[str, torch.Tensor],
    pattern: DilatedPattern,
    *,
    is_causal: bool,
    num_positions: int = 48,
    num_heads: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """Relative errors of results over randomly drawn positions of drawn heads.

    out, lse and dq of a query follow from the inputs. dk and dv of a key take the lse and out of
    all queries from the results; where those are wrong, the drawn queries show it. With grouped
    queries dk and dv are not judged: a key gathers the gradients of several heads.

    Args:
        q, k, v, dout: `(1, S, H, D)` and `(1, S, H_kv, D)`.
        results: By name, out, lse, dq, dk and dv, or some of them; lse `(1, S, H)`.
        pattern: With `padding="masked"`.
        is_causal: As in the call.
        num_positions, num_heads, seed: Of the draw.

    Raises:
        ValueError: If the pattern has zero keys.
    """
    if pattern.padding != "masked":
        raise ValueError(f"padding is {pattern.padding!r}; zero keys are not part of this oracle.")
    _, S, H, _ = q.shape
    generator = torch.Generator().manual_seed(seed)
    squares: dict[str, list[float]] = {name: [0.0, 0.0] for name in results}
    drawn = torch.randperm(H, generator=generator)[:num_heads]
    for head in map(int, drawn):
        positions = torch.randint(S, (num_positions,), generator=generator)
        # The last positions are those that an overflow or a short segment gets wrong.
        positions[-2:] = torch.tensor([S - 2, S - 1])
        positions = positions.to(q.device)
        exact = _exact(q, k, v, dout, results, pattern, is_causal, head, positions)
        for name in squares.keys() & exact.keys():
            actual, right = results[name][0, positions, head].detach().double(), exact[name]
            # −∞ is right where it is expected, and infinitely wrong elsewhere.
            both_empty = (actual == -math.inf) & (right == -math.inf)
            difference = (actual - right).masked_fill(both_empty, 0)
            squares[name][0] += difference.square().sum().item()
            squares[name][1] += right.masked_fill(both_empty, 0).square().sum().item()
    judged = {name for name in results if k.shape[2] == H or name not in ("dk", "dv")}
    return {
        name: math.sqrt(off / (size or 1.0))
        for name, (off, size) in squares.items()
        if name in judged
    }


def _exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    results: Mapping[str, torch.Tensor],
    pattern: DilatedPattern,
    is_causal: bool,
    head: int,
    positions: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The results at these positions of one head, float64."""
    _, S, H, D = q.shape
    scale, group = 1 / math.sqrt(D), H // k.shape[2]
    q, dout = q[0, :, head].detach(), dout[0, :, head]
    k, v = (x[0, :, head // group].detach().double() for x in (k, v))
    counts = _count_keys(pattern, positions, head, S, H)
    everywhere = torch.arange(S, device=positions.device)
    seen = counts * (everywhere <= positions[:, None]) if is_causal else counts
    logits = q[positions].double() @ k.T * scale + seen.log()
    lse = logits.logsumexp(-1)
    p = (logits - lse.masked_fill(lse == -math.inf, 0)[:, None]).exp()
    dp = dout[positions].double() @ v.T
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    exact = {"out": p @ v, "lse": lse, "dq": ds @ k * scale}
    if group == 1 and {"out", "lse", "dk", "dv"} <= results.keys():
        seen = counts * (everywhere >= positions[:, None]) if is_causal else counts
        lse_of_queries = results["lse"][0, :, head].detach().double().nan_to_num(neginf=math.inf)
        p = seen * (k[positions] @ q.double().T * scale - lse_of_queries).exp()
        dout_wide = dout.double()
        delta = (dout_wide * results["out"][0, :, head].detach().double()).sum(-1)
        ds = p * (v[positions] @ dout_wide.T - delta)
        exact |= {"dk": ds @ q.double() * scale, "dv": p @ dout_wide}
    return exact


def _count_keys(
    pattern: DilatedPattern, positions: torch.Tensor, head: int, seq_len: int, num_heads: int
) -> torch.Tensor:
    """How many branches let each of `positions` see each position, float64 `(positions, S)`.

    The relation is symmetric without causality: the same counts tell which queries see a key.
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
