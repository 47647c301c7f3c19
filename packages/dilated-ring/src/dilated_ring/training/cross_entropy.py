"""Cross-entropy of local hidden states, with never more than a chunk of the logits in memory."""

from __future__ import annotations

import torch
from dilated_core import linear_cross_entropy
from dilated_core.checks import check_integer
from dilated_core.cross_entropy import check_arguments, check_labels

from dilated_ring.sharding.group import Group, resolve_group
from dilated_ring.sharding.shards import reporting, transport_of
from dilated_ring.uncompiled import uncompiled


@uncompiled
def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    group: Group = None,
    timeout_s: float | None = None,
) -> torch.Tensor:
    """This rank's share of the mean loss over all tokens of a group that have a label.

    Example::

        loss = chunked_cross_entropy(hidden_local, head.weight, labels_local)

    The share is the sum of the losses of the local tokens, divided by the number of labels of the
    whole group. The shares of all ranks add up to the mean that one process computes, and so do
    their gradients, however unevenly labels are spread. So gradients must be summed over the ranks:

    - DistributedDataParallel and FSDP divide the sum by the number N of ranks that they reduce
      over. Multiply the loss by N, or for FSDP2 call `set_gradient_divide_factor(1.0)` on each
      module that `fully_shard` has wrapped; a call does not reach the modules inside.
    - With data parallelism beside context parallelism, pass the group of all dp × cp ranks, so that
      the mean is over the batch of all of them.
    - To report the loss, add the shares: `dist.all_reduce(loss.detach())`.

    The loss of a rank is `dilated_core.linear_cross_entropy` of its tokens, divided by the number
    of labels of the group. A chunk of the logits exists at a time. Which bits are those of whole
    logits is written there.

    Args:
        hidden: `(…, D)`, local tokens. Autocast casts hidden, weight and bias as for `linear`.
        weight: `(V, D)`, of the dtype of hidden. Pass it whole: inside the forward of the module
            that FSDP wraps.
        labels: `(…)`, int64: the class of each token, see `shift_sequence`.
        bias: `(V,)`, of the dtype of hidden.
        ignore_index: The label of tokens that do not count.
        group: The ranks that share the tokens, as in `shard_sequence`.
        timeout_s: Seconds that a rank waits for another one, see
            `dilated_ring.transport.DistributedTransport`.

    Returns:
        A scalar, float32 or wider. 0 with gradients of 0 if no token of the group has a label.

    Raises:
        TypeError: If an argument has the wrong type or dtypes differ.
        ValueError: If shapes or devices do not fit, a label is no class, or this process is not in
            the group.
        RankFailure: If another rank failed or did not answer.
    """
    ignore_index = check_integer("ignore_index", ignore_index)
    check_arguments(hidden, weight, labels, bias)
    ranks = resolve_group(group)
    transport = transport_of(ranks, timeout_s)
    with reporting(transport):
        check_labels(labels.cpu(), weight.shape[0], ignore_index)
        count = int((labels != ignore_index).sum())
        if transport is not None:
            local = torch.tensor([count], device="cpu")
            count = sum(map(int, transport.all_gather(ranks.rank, local)))
    return linear_cross_entropy(
        hidden, weight, labels, bias=bias, ignore_index=ignore_index, count=count
    )
