"""Dilated attention over a sequence that is spread over ranks, exact on any number of them.

The rooms, in the order to read them: `layout` tells which positions each rank holds. `plan`
computes which rows travel. `transport` carries them. `sharding` cuts sequences and puts them
together. `execution` attends while rows travel, forward and backward. `over_ranks` runs a call.
`attention` and `block_attention` have the public functions, `modules` the layers, `training` the
loss, and `gradients` a hook for DistributedDataParallel.
"""

from importlib.metadata import version as _version

from dilated_ring.attention import (
    ring_dilated_attention,
    ring_dilated_attention_with_lse,
    simulated_ring_attention,
)
from dilated_ring.block_attention import (
    ring_block_sparse_attention,
    ring_block_sparse_attention_with_lse,
    simulated_ring_block_sparse_attention,
)
from dilated_ring.gradients import TopKCompression, topk_hook
from dilated_ring.layout import Layout
from dilated_ring.modules.block_sparse import RingBlockSparseAttention
from dilated_ring.modules.config import RingAttentionConfig, RingBlockSparseConfig
from dilated_ring.modules.factory import create_ring_attention
from dilated_ring.modules.multihead import (
    RingBlockSparseMultiheadAttention,
    RingMultiheadDilatedAttention,
)
from dilated_ring.modules.ring import (
    DistributedRingAttention,
    HilbertRingAttention,
    StandardRingAttention,
)
from dilated_ring.plan.blocks import BlocksForLength, KeptBlocks
from dilated_ring.plan.cost import BranchPlan, ExchangePlan, Message, RankPlan, exchange_plan
from dilated_ring.sharding.positions import local_positions
from dilated_ring.sharding.sequence import shard_sequence, unshard_sequence
from dilated_ring.sharding.shift import shift_sequence
from dilated_ring.training.cross_entropy import chunked_cross_entropy
from dilated_ring.training.same_batch import check_same_batch

__version__ = _version("dilated-ring")

__all__ = [
    # attention
    "ring_block_sparse_attention",
    "ring_block_sparse_attention_with_lse",
    "ring_dilated_attention",
    "ring_dilated_attention_with_lse",
    "simulated_ring_attention",
    "simulated_ring_block_sparse_attention",
    # the plan of an attention call
    "BranchPlan",
    "ExchangePlan",
    "Message",
    "RankPlan",
    "exchange_plan",
    # patterns of blocks
    "BlocksForLength",
    "KeptBlocks",
    # modules
    "DistributedRingAttention",
    "HilbertRingAttention",
    "RingAttentionConfig",
    "RingBlockSparseAttention",
    "RingBlockSparseConfig",
    "RingBlockSparseMultiheadAttention",
    "RingMultiheadDilatedAttention",
    "StandardRingAttention",
    "create_ring_attention",
    # shards of a sequence
    "Layout",
    "local_positions",
    "shard_sequence",
    "shift_sequence",
    "unshard_sequence",
    # training
    "check_same_batch",
    "chunked_cross_entropy",
    # gradients
    "TopKCompression",
    "topk_hook",
]
