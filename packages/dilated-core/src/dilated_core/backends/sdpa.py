"""Backend `sdpa`: PyTorch's own fused attention kernels, those that return the lse.

These operators are what `torch.nn.functional.scaled_dot_product_attention` dispatches to. They are
called directly because the public function neither returns the lse nor takes one for backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dilated_core.backends.contract import (
    CONTRACT_VERSION,
    AttentionInputs,
    AttentionOptions,
    Gradients,
)
from dilated_core.merge import AttentionOutput

_aten: Any = torch.ops.aten

_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HALF_DTYPES = (torch.bfloat16, torch.float16)
_AMPERE = (8, 0)

# The largest tiles of PyTorch's CPU kernel (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
_CPU_QUERY_TILE, _CPU_KEY_TILE = 256, 512


class SdpaBackend:
    """PyTorch's flash attention on CPU; its flash and memory-efficient attention on CUDA."""

    name = "sdpa"
    priority = 10
    contract = CONTRACT_VERSION

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """See `AttentionBackend.why_not`."""
        if inputs.dropout_p:
            return [f"dropout_p is {inputs.dropout_p}; it has no dropout."]
        kind = inputs.device.type
        if kind == "cpu":
            return _wrong_dtype(inputs, _CPU_DTYPES)
        if kind != "cuda":
            return [f"the device is {kind}; PyTorch has kernels that return lse for cpu and cuda."]
        if not torch.cuda.is_available():
            return ["the device is cuda; this PyTorch sees no CUDA device."]
        reasons = _wrong_dtype(inputs, (torch.float32, *_HALF_DTYPES))
        if inputs.max_workspace_bytes is not None:
            reasons.append(
                f"max_workspace_bytes is {inputs.max_workspace_bytes}; PyTorch does not report how "
                f"much memory its CUDA kernels allocate."
            )
        if inputs.has_key_padding_mask:
            reasons.append("key_padding_mask is given; PyTorch's CUDA flash kernel has no mask.")
        if (
            inputs.dtype == torch.bfloat16
            and torch.cuda.get_device_capability(inputs.device) < _AMPERE
        ):
            reasons.append("the dtype is bfloat16; this GPU is older than compute capability 8.0.")
        # One 16-byte load: 8 half-precision or 4 float32 values.
        multiple = 4 if inputs.dtype == torch.float32 else 8
        if inputs.head_dim % multiple:
            reasons.append(
                f"head_dim is {inputs.head_dim}; PyTorch's CUDA kernels need a multiple of "
                f"{multiple}."
            )
        return reasons

    def takes_earlier_keys(self, device: torch.device) -> bool:
        """See `EarlierKeysBackend`; the CUDA kernels put the M queries at the first positions."""
        return device.type == "cpu"

    def workspace_bytes(
        self, inputs: AttentionInputs, num_problems: int, num_queries: int, num_keys: int
    ) -> int:
        """See `BoundedWorkspaceBackend`; of PyTorch's kernel for CPUs."""
        H, D, itemsize = inputs.num_heads, inputs.head_dim, inputs.dtype.itemsize
        is_half = inputs.dtype in _HALF_DTYPES
        queries, keys = min(num_queries, _CPU_QUERY_TILE), min(num_keys, _CPU_KEY_TILE)
        # Per thread: scores, three numbers per row and out of a tile, in float32 or wider.
        tile = max(itemsize, 4) * queries * (keys + D + 3)
        rows = num_problems * H
        # q times a negative or zero scale.
        total = rows * num_queries * D * itemsize
        if is_half:
            # Scores once more in half precision; k and v in the order that matrix units read.
            tile += itemsize * queries * keys
            total += 2 * itemsize * rows * _rounded(num_keys, 64) * _rounded(D, 64)
        if inputs.has_key_padding_mask:
            # Hidden keys per head, as bool and as what is added; the running minimum with its
            # indices, and which rows see nothing.
            total += rows * (num_keys * (itemsize + 11) + num_queries)
        return total + torch.get_num_threads() * tile

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> AttentionOutput:
        """See `AttentionBackend.forward`."""
        hidden, is_causal = options.key_padding_mask, options.is_causal
        q, scale, _ = _with_positive_scale(q, options.scale)
        q_BHMD, k_BHND, v_BHND = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if q.device.type == "cpu":
            is_square, mask = _additive(q, k, options)
            out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
                q_BHMD, k_BHND, v_BHND, 0.0, is_square, attn_mask=mask, scale=scale
            )
            if hidden is not None:
                # For a row without keys the kernel returns lse = 0.
                lse.masked_fill_(_sees_nothing(hidden, q, is_causal), -math.inf)
        elif _has_cuda_flash(q):
            out, lse = _aten._scaled_dot_product_flash_attention(
                q_BHMD, k_BHND, v_BHND, 0.0, is_causal, False, scale=scale
            )[:2]
        else:
            out, lse = _aten._scaled_dot_product_efficient_attention(
                q_BHMD, *(_repeated(x, q_BHMD) for x in (k_BHND, v_BHND)),
                None, True, 0.0, is_causal, scale=scale,
            )[:2]  # fmt: skip
            lse = lse[:, :, : q.shape[1]]  # the kernel pads rows to a multiple of 32
        return AttentionOutput(out.transpose(1, 2), lse.transpose(1, 2))

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
        """See `AttentionBackend.backward`; PyTorch's kernels compute delta themselves."""
        M, (N, K) = q.shape[1], k.shape[1:3]
        is_causal, mask = options.is_causal, None
        if q.device.type == "cpu":
            is_causal, mask = _additive(q, k, options)
        q, scale, sign = _with_positive_scale(q, options.scale)
        dout, q, k, v, out, lse = (x.transpose(1, 2) for x in (dout, q, k, v, out, lse))
        if q.device.type == "cpu":
            if q.dtype in _HALF_DTYPES:
                # In half precision this kernel is far slower on strided rows than on contiguous
                # ones, by more than the copies cost. In float32 copying gains nothing.
                dout, q, k, v, out = (x.contiguous() for x in (dout, q, k, v, out))
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
            )
        else:
            # Neither kernel uses the random state without dropout, yet both require one.
            no_rng = torch.zeros((), dtype=torch.int64, device=q.device)
            if _has_cuda_flash(q):
                grads = _aten._scaled_dot_product_flash_attention_backward(
                    dout, q, k, v, out, lse.contiguous(), None, None, M, N, 0.0, is_causal,
                    no_rng, no_rng, scale=scale,
                )  # fmt: skip
            else:
                # A padded lse row must be +inf, for exp(score − lse) to be 0 there.
                lse = torch.nn.functional.pad(lse, (0, -M % 32), value=float("inf")).contiguous()
                grads = _aten._scaled_dot_product_efficient_attention_backward(
                    dout, q, _repeated(k, q), _repeated(v, q), None, out, lse, no_rng, no_rng, 0.0,
                    [True, True, True, False], is_causal, scale=scale,
                )[:3]  # fmt: skip
                grads = grads[0], *(_summed(grad, K) for grad in grads[1:])
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq if sign == 1 else dq * sign, dk, dv


def _with_positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float, int]:
    """Rewrite q and scale to the same product with scale above 0; also returns the factor of q.

    PyTorch's kernels mask scores with −inf before they scale them: NaN for 0, +inf below it.
    """
    if scale > 0:
        return q, scale, 1
    sign = -1 if scale < 0 else 0
    return q * sign, -scale or 1.0, sign


def _additive(
    q: torch.Tensor, k: torch.Tensor, options: AttentionOptions
) -> tuple[bool, torch.Tensor | None]:
    """Whether the CPU kernel masks by causality itself, and what it is to add to the scores.

    The latter is None or `(B, H, M, N)`, expanded where it can be. The kernel puts the M queries at
    the first of the N positions.
    """
    M, N = q.shape[1], k.shape[1]
    mask = None
    if (hidden := options.key_padding_mask) is not None:
        hidden = _per_head(hidden, q.shape[2])
        mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        mask = mask[:, :, None].expand(-1, -1, M, -1)
    if not options.is_causal or M == N:
        return options.is_causal, mask
    later = q.new_full((M, N), -math.inf).triu_(N - M + 1)
    return False, later.expand(q.shape[0], q.shape[2], M, N) if mask is None else mask + later


def _per_head(key_padding_mask: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The mask `(B, N, K)` for each head of q: `(B, H, N)`."""
    hidden = key_padding_mask.transpose(1, 2)
    return hidden.repeat_interleave(num_heads // hidden.shape[1], dim=1)


def _sees_nothing(key_padding_mask: torch.Tensor, q: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """Which rows see no key: `(B, H, M)`, or `(B, H, 1)` for all rows alike."""
    hidden = _per_head(key_padding_mask, q.shape[2])
    if not is_causal:
        return hidden.all(-1, keepdim=True)
    return torch.cummin(hidden, -1)[0][..., hidden.shape[-1] - q.shape[1] :]


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _repeated(x_BKMD: torch.Tensor, q_BHMD: torch.Tensor) -> torch.Tensor:
    """Heads of k or v as often as q has them, for the kernel that cannot share them."""
    return x_BKMD.repeat_interleave(q_BHMD.shape[1] // x_BKMD.shape[1], dim=1)


def _summed(grad_BHMD: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    B, _, M, D = grad_BHMD.shape
    return grad_BHMD.view(B, num_kv_heads, -1, M, D).sum(2)


def _wrong_dtype(inputs: AttentionInputs, allowed: tuple[torch.dtype, ...]) -> list[str]:
    if inputs.dtype in allowed:
        return []
    dtype, *names = (str(d).removeprefix("torch.") for d in (inputs.dtype, *allowed))
    return [f"the dtype is {dtype}; it takes {', '.join(names)}."]


def _has_cuda_flash(q: torch.Tensor) -> bool:
    """Whether PyTorch's CUDA flash kernel takes these; its memory-efficient one takes the rest."""
    return (
        q.dtype in _HALF_DTYPES
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= _AMPERE
    )
