"""Exact block-sparse attention: patterns of blocks, and attention that pays for kept blocks only.

The rooms, in the order to read them: `pattern` lists which blocks of the attention matrix are kept.
`execution` plans which rows a backend attends to in one call, and runs the calls. `operators`
defines forward and backward as PyTorch operators, and `ops` does so for block-sparse attention.
`attention` has the public functions, `windowed` dilated attention with a sliding window, `modules`
the modules and their factories, `presets` MoBA and NSA, and `adaptive` attention that learns which
blocks to keep. `factory` builds these three.
"""

from importlib.metadata import version as _version

from dilated_core.pattern.hilbert import hilbert_order

from dilated_sparse.adaptive.attention import AdaptiveSparseAttention
from dilated_sparse.adaptive.config import AdaptiveSparseConfig
from dilated_sparse.adaptive.decoding import AdaptiveCache
from dilated_sparse.adaptive.multihead import AdaptiveSparseMultiheadAttention
from dilated_sparse.attention import (
    block_sparse_attention,
    block_sparse_attention_with_lse,
)
from dilated_sparse.factory import AdaptiveMethod, create_adaptive_sparse_attention
from dilated_sparse.modules.attention import BlockSparseAttention
from dilated_sparse.modules.config import BlockSparseAttentionConfig, SparsePatternConfig
from dilated_sparse.modules.factory import create_block_sparse_attention
from dilated_sparse.modules.multihead import BlockSparseMultiheadAttention
from dilated_sparse.modules.windowed import (
    WindowedDilatedAttention,
    WindowedDilatedAttentionConfig,
)
from dilated_sparse.order.hilbert import attend_in_order, hilbert_token_order
from dilated_sparse.pattern.blocks import BlockPattern
from dilated_sparse.pattern.dilated import from_dilated, is_exact_for
from dilated_sparse.pattern.generators import (
    PatternType,
    dilated_sparse,
    global_local,
    hierarchical,
    local_window,
    pattern_of_type,
    random_blocks,
)
from dilated_sparse.pattern.selection import BlockSelection
from dilated_sparse.presets.config import MoBAConfig, NSAConfig
from dilated_sparse.presets.moba import moba_attention, moba_attention_with_lse
from dilated_sparse.presets.moba_modules import MoBAAttention, MoBAMultiheadAttention
from dilated_sparse.presets.nsa import NSASizes, native_sparse_attention
from dilated_sparse.presets.nsa_module import NativeSparseAttention
from dilated_sparse.windowed.attention import (
    windowed_dilated_attention,
    windowed_dilated_attention_with_lse,
)

__version__ = _version("dilated-sparse")

__all__ = [
    # attention
    "block_sparse_attention",
    "block_sparse_attention_with_lse",
    "moba_attention",
    "moba_attention_with_lse",
    "native_sparse_attention",
    "windowed_dilated_attention",
    "windowed_dilated_attention_with_lse",
    # modules
    "BlockSparseAttention",
    "BlockSparseAttentionConfig",
    "BlockSparseMultiheadAttention",
    "MoBAAttention",
    "MoBAConfig",
    "MoBAMultiheadAttention",
    "NSAConfig",
    "NSASizes",
    "NativeSparseAttention",
    "SparsePatternConfig",
    "WindowedDilatedAttention",
    "WindowedDilatedAttentionConfig",
    "create_block_sparse_attention",
    # content-adaptive
    "AdaptiveCache",
    "AdaptiveMethod",
    "AdaptiveSparseAttention",
    "AdaptiveSparseConfig",
    "AdaptiveSparseMultiheadAttention",
    "BlockSelection",
    "create_adaptive_sparse_attention",
    # orders of tokens
    "attend_in_order",
    "hilbert_order",
    "hilbert_token_order",
    # patterns
    "BlockPattern",
    "PatternType",
    "dilated_sparse",
    "from_dilated",
    "global_local",
    "hierarchical",
    "is_exact_for",
    "local_window",
    "pattern_of_type",
    "random_blocks",
]
