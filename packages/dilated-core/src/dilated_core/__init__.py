"""Dilated attention (LongNet, arXiv 2307.02486), exact on any device.

The rooms, in the order to read them: `pattern` computes which positions each head keeps. `strips`
plans the strided views that cover these positions, and runs a backend on each view. `backends`
attend within one view and return (out, lse). `merge` combines the results. `ops` registers forward
and backward as PyTorch operators. `attention` has the public functions. `reference` is the
definition, with which every test compares.
"""

from importlib.metadata import version as _version

from dilated_core.attention import dilated_attention, dilated_attention_with_lse
from dilated_core.backends.contract import (
    AttentionBackend,
    AttentionInputs,
    AttentionOptions,
    Gradients,
)
from dilated_core.backends.dtype import recommended_dtype
from dilated_core.backends.registry import (
    available_backends,
    choose_backend,
    explain_backends,
    register_backend,
    unregister_backend,
)
from dilated_core.cross_entropy import linear_cross_entropy
from dilated_core.decoding.cache import DecodingCache
from dilated_core.decoding.size import decoding_cache_nbytes, decoding_cache_rows
from dilated_core.decoding.step import decode_step, decode_step_with_lse
from dilated_core.decoding.tokens import decode_tokens
from dilated_core.inspection.attention_rows import AttentionRows, attention_rows
from dilated_core.inspection.memory_profile import MemoryProfile, memory_profile
from dilated_core.merge import AttentionOutput, empty_partial, fold_, merge_partials
from dilated_core.modules.config import (
    DilatedAttentionConfig,
    DynamicDilatedAttentionConfig,
    MultiheadConfig,
)
from dilated_core.modules.dilated import DilatedAttention
from dilated_core.modules.dynamic import DynamicDilatedAttention
from dilated_core.modules.factory import (
    AttentionVariant,
    create_dilated_attention,
    create_multihead_dilated_attention,
)
from dilated_core.modules.multihead import MultiheadDilatedAttention
from dilated_core.pattern.branches import Branch, DilatedPattern, head_offset, kept_rows
from dilated_core.pattern.ladder import Segments, select_segments
from dilated_core.pattern.visible import VisibleKeys, visible_keys
from dilated_core.positions.alibi import AlibiInputs, alibi_bias, alibi_slopes, with_alibi
from dilated_core.positions.rotary import Rotation, check_decay_range, rotate, rotation_at
from dilated_core.reference import (
    reference_dilated_attention,
    reference_dilated_attention_with_lse,
)
from dilated_core.streaming.stream import dilated_attention_streamed
from dilated_core.streaming.tensors import MappedTensor, tensor_sink, tensor_source
from dilated_core.strips.attend import attend_, differentiate_
from dilated_core.strips.plan import Problem, Span, plan_problems
from dilated_core.strips.view import Rows

__version__ = _version("dilated-core")

__all__ = [
    # attention
    "AttentionOutput",
    "dilated_attention",
    "dilated_attention_with_lse",
    "merge_partials",
    "reference_dilated_attention",
    "reference_dilated_attention_with_lse",
    # the loss of a language model
    "linear_cross_entropy",
    # decoding, and rows of the attention matrix
    "AttentionRows",
    "DecodingCache",
    "attention_rows",
    "decode_step",
    "decode_step_with_lse",
    "decode_tokens",
    "decoding_cache_nbytes",
    "decoding_cache_rows",
    # the pattern
    "Branch",
    "DilatedPattern",
    "Segments",
    "VisibleKeys",
    "select_segments",
    "visible_keys",
    # positions
    "AlibiInputs",
    "Rotation",
    "alibi_bias",
    "alibi_slopes",
    "check_decay_range",
    "rotate",
    "rotation_at",
    "with_alibi",
    # parts of attention, for packages that spread it over devices or blocks
    "Gradients",
    "Problem",
    "Rows",
    "Span",
    "attend_",
    "differentiate_",
    "empty_partial",
    "fold_",
    "head_offset",
    "kept_rows",
    "plan_problems",
    # modules
    "AttentionVariant",
    "DilatedAttention",
    "DilatedAttentionConfig",
    "DynamicDilatedAttention",
    "DynamicDilatedAttentionConfig",
    "MultiheadConfig",
    "MultiheadDilatedAttention",
    "create_dilated_attention",
    "create_multihead_dilated_attention",
    # backends
    "AttentionBackend",
    "AttentionInputs",
    "AttentionOptions",
    "available_backends",
    "choose_backend",
    "explain_backends",
    "recommended_dtype",
    "register_backend",
    "unregister_backend",
    # sequences larger than memory
    "MappedTensor",
    "dilated_attention_streamed",
    "tensor_sink",
    "tensor_source",
    # memory
    "MemoryProfile",
    "memory_profile",
]
