"""One model on several processes: rows of the batch over "dp", positions of each row over "cp"."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from dilated_models.layers.blocks import SelfAttentionBlock
from dilated_models.layers.context_parallel import ContextParallel
from dilated_models.longnet.language_model import evaluating
from dilated_models.text.streams import TokenStream
from dilated_models.text.windows import PackedWindows, text_row
from dilated_models.training.evaluation import (
    Evaluation,
    autocast_to,
    batches,
    evaluation_of,
    scored_ranges,
)
from dilated_models.training.grid import check_grid
from dilated_models.training.ranks import Ranks

if TYPE_CHECKING:
    from dilated_models.training.loss import WithLoss

_Row = TypeVar("_Row")


class OverRanks:
    """How a model trains on the processes of a run.

    Ranks form a grid ("dp", "cp"). Each of the `cp` ranks in a row of the grid holds a part of the
    positions of the same rows of the batch; different rows of the grid hold different rows of the
    batch. The batch, its loss and its gradient are those of one process, whatever the grid.

    Args:
        ranks: The processes.
        cp: Ranks that share a sequence. It divides the number of processes.
        fsdp: Whether parameters, gradients and the optimiser's state are spread over all ranks
            (FSDP2). Otherwise each rank holds all of them (DistributedDataParallel).

    Attributes:
        ranks: The processes.
        dp: Number of parts of a batch.
        dp_rank: Which part this process holds.

    Raises:
        ModuleNotFoundError: If `cp` is above 1 and dilated-ring is not installed.
        ValueError: If `cp` does not divide the number of processes.
    """

    def __init__(self, ranks: Ranks, *, cp: int = 1, fsdp: bool = False) -> None:
        check_grid(ranks.size, cp=cp, fsdp=fsdp)
        if cp > 1:
            import dilated_ring  # noqa: F401  # pyright: ignore[reportUnusedImport]
        self.ranks = ranks
        self.fsdp = fsdp
        self.dp, self.cp = ranks.size // cp, cp
        mesh = init_device_mesh(ranks.device.type, (self.dp, cp), mesh_dim_names=("dp", "cp"))
        self.dp_rank = mesh.get_local_rank("dp")
        self.cp_rank = mesh.get_local_rank("cp")
        self._cp_group = mesh["cp"]
        self._parallel: nn.Module | None = None
        self._context_parallel = (
            ContextParallel(group=mesh["cp"], timeout_s=ranks.timeout_s) if cp > 1 else None
        )

    def __str__(self) -> str:
        engine = "FSDP" if self.fsdp else "DDP"
        return f"{engine} over {self.dp} x {self.cp} processes (dp x cp)"

    def wrap(self, model: WithLoss) -> nn.Module:
        """The model as it is called for training; the optimiser must be made after this."""
        if self.fsdp:
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.ranks.device.type, (self.ranks.size,))
            blocks = [m for m in model.modules() if isinstance(m, SelfAttentionBlock)]
            modules: list[Any] = [*blocks, model]
            for module in modules:
                sharded = cast("Any", fully_shard(module, mesh=mesh))
                # Gradients are added: the loss is divided by the targets of all ranks already.
                sharded.set_gradient_divide_factor(1.0)
                sharded.set_force_sum_reduction_for_comms(enable=True)  # all that gloo has
            self._parallel = model
        else:
            from torch.nn.parallel import DistributedDataParallel

            self._parallel = DistributedDataParallel(model)
        return self._parallel

    @property
    def factor(self) -> int:
        """What the share of a loss is multiplied by before the backward pass: DDP averages."""
        return 1 if self.fsdp else self.ranks.size

    def rows(self, rows: Sequence[_Row]) -> Sequence[_Row]:
        """The rows of a batch that this process computes, perhaps together with its cp peers."""
        count = len(rows) // self.dp
        return rows[self.dp_rank * count : (self.dp_rank + 1) * count]

    def loss(self, part: PackedWindows, *, count: int | None = 1) -> Tensor:
        """Nats of the targets that this process holds, of the rows that it computes, by count."""
        assert self._parallel is not None
        inputs, targets, context_parallel = part.inputs, part.targets, None
        if self._context_parallel is not None:
            from dilated_ring import shard_sequence

            inputs, targets = (
                shard_sequence(x, dim=0, group=self._cp_group) for x in (inputs, targets)
            )
            context_parallel = self._context_parallel.knowing(len(part.inputs))
        device = self.ranks.device
        return self._parallel(
            inputs.to(device), targets.to(device), part.cu_seqlens, context_parallel, count=count
        )

    def counts(self, *numbers: int) -> list[int]:
        """The sums over the batch of what each process counted in the rows that it computes."""
        return self.ranks.total(*(number if self.cp_rank == 0 else 0 for number in numbers))

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(x)
        return x

    @contextmanager
    def backward_of(self, part: int, parts: int) -> Generator[None]:
        """The block computes a part of a batch; DDP adds gradients over the ranks in the last."""
        is_last = self.fsdp or part + 1 == parts
        with nullcontext() if is_last else cast("Any", self._parallel).no_sync():
            yield

    def seed_dropout(self, seed: int, step: int) -> None:
        """Let dropout of a step follow from seed, step and rank alone, as the batch does."""
        digest = blake2b(f"{seed},{step},{self.ranks.rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest) >> 1)

    def check_same_batch(self, part: PackedWindows) -> None:
        """Refuse a batch that is not the same on all ranks that share its sequences.

        Raises:
            ValueError: If it is not.
        """
        if self.cp > 1:
            from dilated_ring import check_same_batch

            check_same_batch(
                cast("Any", part._asdict()), self._cp_group, timeout_s=self.ranks.timeout_s
            )

    def evaluate(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        max_tokens: int,
        batch_size: int,
        autocast: torch.dtype | None,
        before_batch: Callable[[int, int], None],
    ) -> Evaluation:
        """`dilated_models.evaluate` over all ranks; arguments as there."""
        ranges = scored_ranges(len(stream), seq_len=seq_len, max_tokens=max_tokens)
        todo = list(batches(ranges, seq_len * batch_size))
        nats = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        num_targets = num_bytes = 0

        def part_of(number: int) -> PackedWindows:
            return PackedWindows.of([text_row(stream, *todo[number], window=seq_len)])

        for _, part, loss in self._scored(
            len(todo), part_of, autocast, lambda number: before_batch(number, len(todo)), count=1
        ):
            nats += loss.double()
            num_targets += part.num_targets
            num_bytes += part.num_bytes
        num_targets, num_bytes = self.counts(num_targets, num_bytes)
        return evaluation_of(self.sum(nats).item(), num_targets, num_bytes)

    def score(
        self,
        parts: Sequence[PackedWindows],
        *,
        autocast: torch.dtype | None,
        before_part: Callable[[int], None],
    ) -> list[Tensor]:
        """`training.evaluation.score` over all ranks, each of which gets the nats of all parts."""
        found = [torch.zeros(len(part.inputs), dtype=torch.float64) for part in parts]
        for number, part, nats in self._scored(
            len(parts), parts.__getitem__, autocast, before_part, count=None
        ):
            found[number][self._positions(len(part.inputs))] = nats.double().cpu()
        nats = self.sum(torch.cat(found))
        return list(torch.split(nats, [len(part.inputs) for part in parts]))

    def _scored(
        self,
        num_parts: int,
        part_of: Callable[[int], PackedWindows],
        autocast: torch.dtype | None,
        before_part: Callable[[int], None],
        *,
        count: int | None,
    ) -> Iterator[tuple[int, PackedWindows, Tensor]]:
        """Number, part and loss for each part that this rank computes, perhaps with its peers."""
        assert self._parallel is not None
        with evaluating(self._parallel), torch.no_grad():
            for first in range(0, num_parts, self.dp):
                before_part(first)
                mine = first + self.dp_rank
                # A rank without a part computes another one's: all call the model equally often.
                part = part_of(min(mine, num_parts - 1))
                with autocast_to(autocast, self.ranks.device):
                    loss = self.loss(part, count=count)
                if self.fsdp:  # checkpoints need shards, which come back after a backward pass
                    cast("Any", self._parallel).reshard()
                if mine < num_parts:
                    yield mine, part, loss

    def _positions(self, seq_len: int) -> Tensor | slice:
        """The positions of a row that this rank holds."""
        if self.cp == 1:
            return slice(None)
        from dilated_ring import local_positions

        return local_positions("contiguous", seq_len, self._cp_group)

    @contextmanager
    def generating(self) -> Generator[None]:
        """In the block, each rank can call the model in parts, as generation does.

        FSDP then has the weights together that stand outside of blocks. All ranks call the model
        equally often.
        """
        root = cast("Any", self._parallel) if self.fsdp else None
        if root is not None:
            root.unshard()
        try:
            yield
        finally:
            if root is not None:
                root.reshard()

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict of the model with whole tensors on the CPU; empty but on rank 0."""
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            found = whole(tensor)
            if self.ranks.is_first:
                state[name] = found.detach().cpu()
        return state


def whole(x: Tensor) -> Tensor:
    """A tensor that FSDP may have spread over ranks, which all call this, as a plain one."""
    return cast("Any", x).full_tensor() if hasattr(x, "full_tensor") else x
