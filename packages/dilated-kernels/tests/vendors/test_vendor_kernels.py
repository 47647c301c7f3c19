"""Each adapter on CPU, over a stand-in for its kernel, against the oracle.

A stand-in has the real function's signature, layouts and refusals, and does in float64 what the
kernel does in half precision. Where the kernel trusts its caller, the stand-in is as merciless: it
reads an lse as raw memory, fails on rows that no 16-byte load can reach, and returns NaN for scales
that the kernel would get wrong.
"""

import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    available_backends,
    dilated_attention,
    register_backend,
)
from dilated_core.backends.contract import AttentionOptions
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.registry import forget_choices, unregister_backend
from dilated_core.testing import BackendConformance, Case, random_cases
from dilated_kernels import availability
from dilated_kernels.vendors import cuda_sdpa, flash
from dilated_kernels.vendors import xformers as xformers_backend
from hypothesis import HealthCheck, given, settings

EXACT = 1e-10


def check(*tensors, heads=None):
    """What flash_api.cpp checks (2.8.3.post2), and what it does not but relies on."""
    for x in tensors:
        assert x.dtype == torch.float64, "the tests run in float64"
        assert x.stride(-1) == 1, "Input tensor must have contiguous last dimension"
        assert x.shape[-1] % 8 == 0, "head_size should be a multiple of 8"
        assert x.shape[-1] <= 256, "head dimension at most 256"
        assert 0 < x.shape[0] <= 65535, "CUDA error: invalid configuration argument"
        for size, stride in zip(
            (1, *x.shape[:-1]), (x.storage_offset(), *x.stride()), strict=False
        ):
            assert size == 1 or stride * 8 % 16 == 0, "CUDA error: misaligned address"
    assert x.storage_offset() * 8 % 16 == 0, "CUDA error: misaligned address"


def check_shapes(query, key, value, *, rows):
    """Kernels without shared heads: only the numbers of rows may differ, and not if causal."""
    assert key.shape == value.shape, "Incompatible shapes"
    assert all(
        size == other
        for dim, (size, other) in enumerate(zip(query.shape, key.shape, strict=True))
        if dim != rows
    ), "Incompatible shapes"


def attend(q, k, v, is_causal, scale, nan_lse):
    """out `(B, M, H, D)` and contiguous lse `(B, H, M)`; lse of a NaN row is `nan_lse`."""
    check(q, k, v)
    out, lse = EagerBackend().forward(q, k, v, AttentionOptions(is_causal, scale))
    if scale <= 0:  # the largest score would be taken before scaling
        return torch.full_like(out, torch.nan), lse.transpose(1, 2).contiguous()
    return out.contiguous(), lse.transpose(1, 2).contiguous().masked_fill_(lse.mT.isnan(), nan_lse)


def differentiate(dout, q, k, v, out, lse, is_causal, scale):
    """From an lse that is read as the memory that it points to."""
    check(dout, q, k, v, out)
    assert scale > 0
    B, M, H, _ = q.shape
    raw = lse.as_strided((B, H, M), (H * M, M, 1))
    return EagerBackend().backward(
        dout, q, k, v, out, raw.transpose(1, 2), AttentionOptions(is_causal, scale)
    )


class Flash2:
    """flash-attn 2.8.3.post2, flash_attn/flash_attn_interface.py."""

    @staticmethod
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0, -1, -1, 0)
        assert alibi_slopes is None
        assert not return_softmax, "return_softmax is only supported when p_dropout > 0.0"
        out, lse = attend(q, k, v, causal, softmax_scale, torch.inf)
        return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0, -1, -1, 0)
        assert alibi_slopes is None
        assert deterministic
        grads = differentiate(dout, q, k, v, out, softmax_lse, causal, softmax_scale)
        for room, grad in zip((dq, dk, dv), grads, strict=True):
            room.copy_(grad)
        return softmax_lse


class Flash3Function:
    """flash_attn_3 3.0.0b1, hopper/flash_attn_interface.py of the 2.8.3.post2 sources."""

    @staticmethod
    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
        rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        nothing = (k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
                   seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k,
                   rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
                   v_descale)  # fmt: skip
        assert nothing == (None,) * 20
        return *attend(q, k, v, causal, softmax_scale, -torch.inf), None, None

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k,
        max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1),
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        nothing = (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k)
        assert nothing == (None,) * 6
        assert deterministic
        assert q.shape[2] == k.shape[2], "would wait on dk_semaphore, which is not initialised"
        grads = differentiate(dout, q, k, v, out, softmax_lse, causal, softmax_scale)
        for room, grad in zip((dq, dk, dv), grads, strict=True):
            room.copy_(grad)
        return dq, dk, dv, softmax_lse


class Operator:
    """A stand-in for the result of torch.library.custom_op: callable, but no function."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def _forward_of_3_0(
    q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
    cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None,
    seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,
    rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    empty = q.new_empty(0)
    return *attend(q, k, v, causal, softmax_scale, -torch.inf), empty, empty


def _backward_of_3_0(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
    sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
    softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
    deterministic=False, sm_margin=0,
):  # fmt: skip
    return Flash3Function._flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k,
        max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, is_causal,
        deterministic=deterministic,
    )[3]  # fmt: skip


class Flash3Operator:
    """flash_attn_3 3.0.0, hopper/flash_attn_interface.py at commit 01afd16d."""

    _flash_attn_forward = Operator(_forward_of_3_0)
    _flash_attn_backward = Operator(_backward_of_3_0)


class Flash4:
    """flash-attn-4 4.0.0b36, flash_attn/cute/interface.py."""

    @staticmethod
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None,
        score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None,
        lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None,
        v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
    ):  # fmt: skip
        out, lse = attend(q, k, v, causal, softmax_scale, -torch.inf)
        needs_lse = return_lse or q.requires_grad
        return out, lse if needs_lse else None, None, None, None

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128,
        num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2,
        V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
        score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
        block_sparse_tensors=None, dlse=None, learnable_sink=None,
    ):  # fmt: skip
        assert deterministic
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        return differentiate(dout, q, k, v, out, lse, causal, softmax_scale)


def _padded(lse, value):
    return torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=value)


class Xformers:
    """xformers 0.0.35, xformers/ops/fmha/__init__.py: CUTLASS forward, flash3 backward."""

    class LowerTriangularMask:
        pass

    @staticmethod
    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        check_shapes(query, key, value, rows=1)
        is_causal = isinstance(attn_bias, Xformers.LowerTriangularMask)
        out, lse = attend(query, key, value, is_causal, scale, torch.nan)
        return out, _padded(lse, 7.0)

    @staticmethod
    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        check_shapes(query, key, value, rows=1)
        assert lse.ndim == query.ndim - 1
        is_causal = isinstance(attn_bias, Xformers.LowerTriangularMask)
        return differentiate(grad, query, key, value, output, lse, is_causal, scale)


class Aten:
    """The schemas of torch 2.11 and 2.15, which test_cuda_sdpa.py holds against torch's own."""

    @staticmethod
    def _rows_first(*tensors):
        return [x.transpose(1, 2) for x in tensors]

    def _scaled_dot_product_cudnn_attention(
        self, query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
        return_debug_mask=False, *, scale=None,
    ):  # fmt: skip
        assert compute_log_sumexp
        check_shapes(query, key, value, rows=2)
        assert key.shape[2] != 1, "cudnn SDPA does not support key/value sequence length 1."
        out, lse = attend(*self._rows_first(query, key, value), is_causal, scale, torch.nan)
        return out.transpose(1, 2), lse.unsqueeze(-1), None, None, 0, 0, None, None, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias,
        cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert key.shape[2] != 1, "cudnn SDPA does not support key/value sequence length 1."
        assert logsumexp.shape == (*query.shape[:3], 1)
        grad_out, query, key, value, out = self._rows_first(grad_out, query, key, value, out)
        return self._rows_first(
            *differentiate(grad_out, query, key, value, out, logsumexp, is_causal, scale)
        )

    def _scaled_dot_product_efficient_attention(
        self, query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *,
        scale=None,
    ):  # fmt: skip
        assert compute_log_sumexp
        check_shapes(query, key, value, rows=2)
        out, lse = attend(*self._rows_first(query, key, value), is_causal, scale, torch.nan)
        return out.transpose(1, 2), _padded(lse, 7.0), None, None

    def _scaled_dot_product_efficient_attention_backward(
        self, grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset,
        dropout_p, grad_input_mask, is_causal=False, *, scale=None,
    ):  # fmt: skip
        M = query.shape[2]
        assert logsumexp.shape[2] % 32 == 0
        assert (logsumexp[:, :, M:] == torch.inf).all()
        assert list(grad_input_mask) == [True, True, True, False]
        grad_out_, query, key, value, out = self._rows_first(grad_out_, query, key, value, out)
        lse = logsumexp[:, :, :M].contiguous()
        grads = differentiate(grad_out_, query, key, value, out, lse, is_causal, scale)
        return *self._rows_first(*grads), None


@dataclass
class Question:
    """xformers.ops.fmha.Inputs."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_bias: object = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: torch.dtype | None = None
    is_partial: bool = False


def _fmha():
    def kernel(*problems):
        operator = SimpleNamespace(not_supported_reasons=lambda question: list(problems))
        return SimpleNamespace(FwOp=operator, BwOp=operator)

    absent, present = kernel("operator wasn't built"), kernel()
    return {"Inputs": Question, "flash3": absent, "flash": absent, "cutlass": present}


# Backend, version, and what stands where its module is.
LIBRARIES = {
    "flash2": (flash.flash2, flash.FLASH2, "2.8.3.post2", Flash2),
    "flash3": (flash.flash3, flash.FLASH3, "3.0.0b1", Flash3Function),
    "flash3, operator": (flash.flash3, flash.FLASH3, "3.0.0", Flash3Operator),
    "flash4": (flash.flash4, flash.FLASH4, "4.0.0b36", Flash4),
    "xformers": (xformers_backend.xformers, xformers_backend.XFORMERS, "0.0.35", Xformers),
}
TORCH = {"cudnn": cuda_sdpa.cudnn, "efficient": cuda_sdpa.efficient}


def _module(name, contents):
    module = ModuleType(name)
    vars(module).update(contents)
    return module


@pytest.fixture(params=[*LIBRARIES, *TORCH])
def vendor(request, monkeypatch):
    """Name of a backend whose kernel has a stand-in, and which takes float64 on CPU."""
    halves = (torch.float64, *availability.HALF_DTYPES)
    monkeypatch.setattr(availability, "HALF_DTYPES", halves)
    monkeypatch.setattr(availability, "cuda_reasons", lambda inputs, **limits: [])
    monkeypatch.setattr(availability, "cudnn_version", lambda: 91100)
    if request.param in TORCH:
        backend = TORCH[request.param]
        monkeypatch.setattr(cuda_sdpa, "_aten", Aten())
    else:
        backend, library, version, stand_in = LIBRARIES[request.param]
        monkeypatch.setattr(availability, "installed_version", {library.distribution: version}.get)
        contents = {name: getattr(stand_in, name) for name in vars(stand_in) if name[:2] != "__"}
        module = _module(library.module, contents)
        monkeypatch.setitem(sys.modules, library.module, module)
        monkeypatch.setitem(sys.modules, "xformers.ops.fmha", _module("fmha", _fmha()))
    is_registered = backend.name in available_backends()
    if not is_registered:
        register_backend(backend)
    forget_choices()
    availability.import_problem.cache_clear()
    yield backend.name
    if not is_registered:
        unregister_backend(backend.name)
    forget_choices()
    availability.import_problem.cache_clear()


class TestAdapters(BackendConformance):
    dtypes = (torch.float64,)
    multiple = 8  # as kernels in half precision load
    may_refuse = True  # they have no mask of keys

    @pytest.fixture(autouse=True)
    def of_a_vendor(self, vendor, monkeypatch):
        monkeypatch.setattr(type(self), "backend", vendor, raising=False)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=random_cases(with_options=True))
def test_random_cases(vendor, case):
    case = replace(case, head_dim=8, masked=None)
    suite = type("Suite", (TestAdapters,), {"backend": vendor})()
    suite._compare_with_oracle(case, torch.float64, EXACT)


def test_a_named_backend_says_why_it_cannot(vendor):
    case = Case(seq_len=8, head_dim=12, pattern=DilatedPattern([4, 8], [1, 2]))
    q, k, v, _ = case.tensors(dtype=torch.float64)
    with pytest.raises(ValueError, match="head_dim is 12; it needs a multiple of 8"):
        dilated_attention(q, k, v, case.pattern, backend=vendor)
