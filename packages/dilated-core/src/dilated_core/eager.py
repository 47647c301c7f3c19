"""Backend `eager`: matrix product, softmax, matrix product; any device, any floating dtype."""

from __future__ import annotations

import torch

from dilated_core.backend import CONTRACT_VERSION, AttentionInputs
from dilated_core.output import AttentionOutput

# Scores held at once. 2^24 float32 are 64 MiB: large enough for full-speed products, small beside
# the inputs of any sequence whose scores exceed it.
_MAX_SCORES = 2**24


class EagerBackend:
    """Plain attention from PyTorch's elementary operations, a tile of queries at a time."""

    name = "eager"
    priority = 0
    contract = CONTRACT_VERSION

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """See `AttentionBackend.why_not`."""
        if not inputs.dtype.is_floating_point:
            dtype = str(inputs.dtype).removeprefix("torch.")
            return [f"the dtype is {dtype}; it takes any floating dtype."]
        return []

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: int,
    ) -> AttentionOutput:
        """See `AttentionBackend.forward`."""
        q_BHMD, k_BHMD, v_BHMD = (_wide(x) for x in (q, k, v))
        out_BHMD = torch.empty_like(q_BHMD)
        lse_BHM = q_BHMD.new_empty(q_BHMD.shape[:-1])
        generator = _generator(q.device, dropout_seed)
        for rows in _row_tiles(q_BHMD):
            s = _scores(q_BHMD, k_BHMD, rows, is_causal, scale)
            lse_BHM[:, :, rows] = s.logsumexp(-1)
            p = torch.softmax(s, -1)
            if dropout_p:
                p.mul_(_dropout_mask(p, dropout_p, generator))
            out_BHMD[:, :, rows] = p @ v_BHMD[:, :, : p.shape[-1]]
        return AttentionOutput(out_BHMD.transpose(1, 2).to(q.dtype), lse_BHM.transpose(1, 2))

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        is_causal: bool,
        scale: float,
        dropout_p: float,
        dropout_seed: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.backward`."""
        dout_BHMD, q_BHMD, k_BHMD, v_BHMD = (_wide(x) for x in (dout, q, k, v))
        delta_BHM = (dout_BHMD * _wide(out)).sum(-1)
        lse_BHM = lse.transpose(1, 2)
        dq, dk, dv = torch.empty_like(q_BHMD), torch.zeros_like(k_BHMD), torch.zeros_like(v_BHMD)
        generator = _generator(q.device, dropout_seed)
        for rows in _row_tiles(q_BHMD):
            s = _scores(q_BHMD, k_BHMD, rows, is_causal, scale)
            keys = slice(s.shape[-1])
            p = (s - lse_BHM[:, :, rows, None]).exp_()
            ds = dout_BHMD[:, :, rows] @ v_BHMD[:, :, keys].transpose(-1, -2)
            kept = p
            if dropout_p:
                # The tiles are those of forward, so the generator gives each its mask again.
                mask = _dropout_mask(p, dropout_p, generator)
                kept = p * mask
                ds.mul_(mask)
            dv[:, :, keys] += kept.transpose(-1, -2) @ dout_BHMD[:, :, rows]
            ds.sub_(delta_BHM[:, :, rows, None]).mul_(p).mul_(scale)
            dq[:, :, rows] = ds @ k_BHMD[:, :, keys]
            dk[:, :, keys] += ds.transpose(-1, -2) @ q_BHMD[:, :, rows]
        return (
            dq.transpose(1, 2).to(q.dtype),
            dk.transpose(1, 2).to(k.dtype),
            dv.transpose(1, 2).to(v.dtype),
        )


def _wide(x: torch.Tensor) -> torch.Tensor:
    """`(B, M, H, D)` -> `(B, H, M, D)` in the dtype to accumulate in: at least float32."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _dropout_mask(p: torch.Tensor, dropout_p: float, generator: torch.Generator) -> torch.Tensor:
    """Factors of probabilities: 0 with probability `dropout_p`, else 1/(1 − `dropout_p`)."""
    keep = torch.empty_like(p).bernoulli_(1 - dropout_p, generator=generator)
    return keep.div_(1 - dropout_p)


def _row_tiles(q_BHMD: torch.Tensor) -> list[slice]:
    B, H, M, _ = q_BHMD.shape
    step = max(1, _MAX_SCORES // (B * H * M))
    return [slice(start, min(start + step, M)) for start in range(0, M, step)]


def _scores(
    q_BHMD: torch.Tensor, k_BHMD: torch.Tensor, rows: slice, is_causal: bool, scale: float
) -> torch.Tensor:
    """Scaled scores of a tile of queries; when causal, only over keys up to the tile's last row."""
    keys = rows.stop if is_causal else k_BHMD.shape[2]
    s = (q_BHMD[:, :, rows] * scale) @ k_BHMD[:, :, :keys].transpose(-1, -2)
    if is_causal:
        ahead = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
        s.masked_fill_(ahead.triu_(rows.start + 1), float("-inf"))
    return s
