"""`--compile`: the losses of a run without it, and no graph for what training does not do again.

Everyday with Dynamo alone, which decides what is a graph. `nox -s exhaustive` uses several
processes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing.processes import run_processes
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.text.files import text_files
from dilated_models.text.order import RowOrder
from dilated_models.text.streams import ByteStream
from dilated_models.text.vocabulary import ByteVocabulary
from dilated_models.training import samples
from dilated_models.training.compiled import compile_blocks
from dilated_models.training.config import TrainingConfig
from dilated_models.training.loop import TrainingState
from dilated_models.training.over_ranks import OverRanks
from dilated_models.training.ranks import Ranks

# torch.compile reads .grad of every tensor that it takes up.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def num_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


MODEL = LongNetConfig(
    num_tokens=256,
    d_model=16,
    nhead=4,
    num_decoder_layers=2,
    dim_feedforward=24,
    segment_lengths=(6, 16),
    dilation_rates=(1, 3),
    key_conv=3,
)
TRAINING: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "seq_len": 29,
    "first_seq_len": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "validate_every": 100,
    "checkpoint_every": 100,
}


def train_on_ranks(text: str, cp: int, fsdp: bool, compiler: str | None) -> Any:
    """Losses, scores and numbers of graphs after each."""
    stream, config = ByteStream(text_files([Path(text)])[0]), TrainingConfig(**TRAINING)
    ranks, over = Ranks(torch.device("cpu")), None
    if dist.is_initialized():
        ranks = Ranks(ranks.device, rank=dist.get_rank(), size=dist.get_world_size())
        over = OverRanks(ranks, cp=cp, fsdp=fsdp)
    samples._SAMPLE_TOKENS = 2
    torch.manual_seed(0)
    model = LongNetLM(MODEL)
    if compiler is not None:
        compile_blocks(model, compiler)
    state = TrainingState(model, config, over)
    state.try_longest_windows()
    order = RowOrder(num_tokens=len(stream), seq_len=config.seq_len, seed=config.seed)
    found, counts = [], []
    for record in state.steps(stream, order):
        scored = state.evaluate(stream, max_tokens=200, batch_size=2, before_batch=lambda: None)
        sample = samples.sample_now(
            state, ByteVocabulary(), stream, max_tokens=200, check=lambda: None
        )
        found += [record.loss, scored.bits_per_byte, *(x.bits_per_byte for x in sample.by_context)]
        counts.append(num_graphs() if compiler is not None else 0)
    return found, counts


def test_a_compiled_model_is_the_model_with_one_graph_for_each_use(text):
    """Training and validation; not samples and losses with growing context."""
    before = num_graphs()
    found, counts = train_on_ranks(str(text), 1, False, "eager")
    wanted, _ = train_on_ranks(str(text), 1, False, None)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)
    assert set(counts) == {before + 2}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("cp", "fsdp"), [(1, False), (1, True), (2, False), (2, True)])
def test_several_compiled_processes_are_one_that_is_not(text, cp, fsdp):
    wanted, _ = train_on_ranks(str(text), 1, False, None)
    for found, counts in run_processes(
        train_on_ranks, 2, str(text), cp, fsdp, "aot_eager", timeout_s=900
    ):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=0)
        assert counts[0] == counts[-1] > 0


@pytest.mark.exhaustive
def test_deep_models_have_one_graph_for_all_blocks():
    """Each block has a probability of drop-path of its own, and PyTorch stops after 8 graphs."""
    torch._dynamo.reset()
    model = LongNetLM(
        LongNetConfig(**MODEL.to_dict() | {"num_decoder_layers": 12, "drop_path_rate": 0.3})
    )
    compile_blocks(model, "eager")
    before = num_graphs()
    for num_tokens in (20, 30):
        model.loss(torch.zeros(1, num_tokens, dtype=torch.int64)).backward()
    assert num_graphs() - before <= 2  # the first block drops nothing
