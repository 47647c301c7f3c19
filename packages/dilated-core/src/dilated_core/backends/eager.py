"""Backend `eager`: matrix product, softmax, matrix product; any device, any floating dtype."""

from __future__ import annotations

import torch

from dilated_core.backends.cache_layout import CacheLayout
from dilated_core.backends.contract import CONTRACT_VERSION, AttentionInputs
from dilated_core.backends.eager_decoding import append_tokens, attend_newest
from dilated_core.merge import AttentionOutput

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
        key_padding_mask: torch.Tensor | None,
    ) -> AttentionOutput:
        """See `AttentionBackend.forward`."""
        G = q.shape[2] // k.shape[2]
        q_BKGMD, k_BK1MD, v_BK1MD = _grouped(q, G), _grouped(k, 1), _grouped(v, 1)
        out_BKGMD = torch.empty_like(q_BKGMD)
        lse_BKGM = q_BKGMD.new_empty(q_BKGMD.shape[:-1])
        generator = _generator(q.device, dropout_seed)
        for rows in _row_tiles(q_BKGMD):
            s = _scores(q_BKGMD, k_BK1MD, rows, is_causal, scale, key_padding_mask)
            lse = s.logsumexp(-1, keepdim=True)
            lse_BKGM[..., rows] = lse.squeeze(-1)
            # A row without any key has lse −inf, and −inf − −inf is NaN.
            p = s.sub_(lse.masked_fill_(lse == float("-inf"), 0)).exp_()
            if dropout_p:
                p.mul_(_dropout_mask(p, dropout_p, generator))
            out_BKGMD[..., rows, :] = _matmul(p, v_BK1MD[..., : p.shape[-1], :])
        out_BHMD, lse_BHM = out_BKGMD.flatten(1, 2), lse_BKGM.flatten(1, 2)
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
        key_padding_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.backward`."""
        G = q.shape[2] // k.shape[2]
        dout_BKGMD, q_BKGMD, out_BKGMD = (_grouped(x, G) for x in (dout, q, out))
        k_BK1MD, v_BK1MD = _grouped(k, 1), _grouped(v, 1)
        delta_BKGM = (dout_BKGMD * out_BKGMD).sum(-1)
        lse_BKGM = lse.transpose(1, 2).view(delta_BKGM.shape)
        dq = torch.empty_like(q_BKGMD)
        dk, dv = torch.zeros_like(k_BK1MD), torch.zeros_like(v_BK1MD)
        generator = _generator(q.device, dropout_seed)
        for rows in _row_tiles(q_BKGMD):
            s = _scores(q_BKGMD, k_BK1MD, rows, is_causal, scale, key_padding_mask)
            keys = slice(s.shape[-1])
            p = s.sub_(lse_BKGM[..., rows, None]).exp_()
            ds = _matmul(dout_BKGMD[..., rows, :], v_BK1MD[..., keys, :].transpose(-1, -2))
            kept = p
            if dropout_p:
                # The tiles are those of forward, so the generator gives each its mask again.
                mask = _dropout_mask(p, dropout_p, generator)
                kept = p * mask
                ds.mul_(mask)
            dv[..., keys, :] += _sum_over_group(kept, dout_BKGMD[..., rows, :])
            ds.sub_(delta_BKGM[..., rows, None]).mul_(p).mul_(scale)
            dq[..., rows, :] = _matmul(ds, k_BK1MD[..., keys, :])
            dk[..., keys, :] += _sum_over_group(ds, q_BKGMD[..., rows, :])
        return (
            dq.flatten(1, 2).transpose(1, 2).to(q.dtype),
            dk.flatten(1, 2).transpose(1, 2).to(k.dtype),
            dv.flatten(1, 2).transpose(1, 2).to(v.dtype),
        )

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
        """See `AttentionBackend`."""
        append_tokens(k, v, keys, values, layout, position)
        return attend_newest(q, keys, values, layout, position=position, scale=scale)


def _grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """`(B, M, H, D)` -> `(B, K, group, M, D)` in the dtype to accumulate in: at least float32.

    K is the number of kv heads, of which each serves a group of G heads of q.
    """
    B, M, H, D = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.transpose(1, 2).view(B, H // group, group, M, D)


def _matmul(a_BKGMN: torch.Tensor, b_BK1ND: torch.Tensor) -> torch.Tensor:
    """Return a @ b, with the rows of a group as rows of one product, so that b is not repeated."""
    B, K, G, M, N = a_BKGMN.shape
    return (a_BKGMN.reshape(B, K, G * M, N) @ b_BK1ND.squeeze(2)).view(B, K, G, M, -1)


def _sum_over_group(a_BKGMN: torch.Tensor, b_BKGMD: torch.Tensor) -> torch.Tensor:
    """Σ over the group of aᵀ @ b: `(B, K, 1, N, D)`."""
    a, b = a_BKGMN.flatten(2, 3), b_BKGMD.flatten(2, 3)
    return (a.transpose(-1, -2) @ b).unsqueeze(2)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _dropout_mask(p: torch.Tensor, dropout_p: float, generator: torch.Generator) -> torch.Tensor:
    """Factors of probabilities: 0 with probability `dropout_p`, else 1/(1 − `dropout_p`)."""
    keep = torch.empty_like(p).bernoulli_(1 - dropout_p, generator=generator)
    return keep.div_(1 - dropout_p)


def _row_tiles(q_BKGMD: torch.Tensor) -> list[slice]:
    B, K, G, M, _ = q_BKGMD.shape
    step = max(1, _MAX_SCORES // (B * K * G * M))
    return [slice(start, min(start + step, M)) for start in range(0, M, step)]


def _scores(
    q_BKGMD: torch.Tensor,
    k_BK1MD: torch.Tensor,
    rows: slice,
    is_causal: bool,
    scale: float,
    key_padding_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Scaled scores of a tile of queries; when causal, only over keys up to the tile's last row."""
    keys = rows.stop if is_causal else k_BK1MD.shape[3]
    s = _matmul(q_BKGMD[..., rows, :] * scale, k_BK1MD[..., :keys, :].transpose(-1, -2))
    if is_causal:
        ahead = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
        s.masked_fill_(ahead.triu_(rows.start + 1), float("-inf"))
    if key_padding_mask is not None:
        s.masked_fill_(key_padding_mask[:, :keys].transpose(1, 2)[:, :, None, None], float("-inf"))
    return s
