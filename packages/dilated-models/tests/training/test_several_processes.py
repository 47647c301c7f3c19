"""Training on several processes is training on one, also from a checkpoint of another number.

All numbers are float32, so sums of other orders differ in the last bits. A wrong factor, row or
target differs by far more than the tolerance.
"""

import dataclasses
import os
import shutil
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
from dilated_models.training.checkpoints import restore_checkpoint, save_checkpoint
from dilated_models.training.config import TrainingConfig
from dilated_models.training.grid import check_grid, parts_of_rank
from dilated_models.training.loop import TrainingState
from dilated_models.training.over_ranks import OverRanks
from dilated_models.training.ranks import Ranks

MODEL = LongNetConfig(
    num_tokens=256,
    d_model=16,
    nhead=4,
    num_decoder_layers=2,
    dim_feedforward=24,
    segment_lengths=(6, 16, 40),
    dilation_rates=(1, 3, 4),
    key_conv=3,
    tie_embeddings=True,
)
# 29 tokens in a row: no number of ranks divides them. The first two steps train on copies.
TRAINING: dict[str, Any] = {
    "steps": 8,
    "batch_size": 12,
    "accumulation": 2,
    "seq_len": 29,
    "first_seq_len": 8,
    "warmup_copies": 0.25,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "gradient_clip": 0.5,
    "validate_every": 100,
    "checkpoint_every": 100,
}
NUMBERS = {field.name for field in dataclasses.fields(TrainingConfig)}
TOLERANCE = 1e-5


def state_of(text: str, cp: int, fsdp: bool, **changes: Any) -> tuple[TrainingState, Any, Ranks]:
    stream = ByteStream(text_files([Path(text)])[0])
    numbers = {name: changes.pop(name) for name in {*changes} & NUMBERS}
    config = TrainingConfig(**TRAINING | numbers)
    ranks = Ranks(torch.device("cpu"), timeout_s=100.0)
    if dist.is_initialized():
        ranks = Ranks(ranks.device, rank=dist.get_rank(), size=dist.get_world_size())
    over = OverRanks(ranks, cp=cp, fsdp=fsdp) if ranks.size > 1 else None
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig(**MODEL.to_dict() | changes))
    state = TrainingState(model, config, over)
    state.try_longest_windows()
    order = RowOrder(num_tokens=len(stream), seq_len=config.seq_len, seed=config.seed)
    return state, (stream, order), ranks


def train(text: str, cp: int, fsdp: bool, stop: int, folder: str | None, **changes: Any) -> Any:
    """Losses and norms up to a step, and the validation there, from and to a folder."""
    state, data, ranks = state_of(text, cp, fsdp, **changes)
    if folder is not None and os.listdir(folder):
        restore_checkpoint(state, Path(folder), run_id="a", ranks=ranks)
    records = []
    while state.step < stop:
        record = next(state.steps(*data))
        records.append([record.step, record.loss, record.gradient_norm, record.num_tokens])
    result = state.evaluate(data[0], max_tokens=200, batch_size=2, before_batch=lambda: None)
    samples._SAMPLE_TOKENS = 4
    sample = samples.sample_now(
        state, ByteVocabulary(), data[0], max_tokens=400, check=lambda: None
    )
    if folder is not None:
        save_checkpoint(state, Path(folder), run_id="a", ranks=ranks)
    weights = state.whole_weights()
    scored = [result.bits_per_byte, result.num_tokens]
    scored += [x.bits_per_byte for x in sample.by_context]
    return records, [*scored, *sample.sample.encode()], weights


def train_grids(text: str, grids: list[tuple[int, bool]], stop: int) -> Any:
    return [train(text, cp, fsdp, stop, None)[:2] for cp, fsdp in grids]


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64),
        torch.tensor(wanted, dtype=torch.float64),
        rtol=TOLERANCE,
        atol=0,
    )


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        pytest.param(4, [(2, False), (4, True)], id="two grids"),
        *(
            pytest.param(
                size, [(cp, f) for cp in cps for f in (False, True)], marks=pytest.mark.exhaustive
            )
            for size, cps in ((2, (1, 2)), (3, (1, 3)), (4, (1, 2, 4)))
        ),
    ],
)
def test_any_grid_trains_as_one_process(text, size, grids):
    records, scored, _ = train(str(text), 1, False, 4, None)
    for found in run_processes(train_grids, size, str(text), grids, 4, timeout_s=500):
        for one in found:
            close(one[0], records)
            close(one[1], scored)


# Options of a model and of a run, each of which changes its numbers.
CHANGES: list[dict[str, Any]] = [
    {"nhead": 2},
    {"num_kv_heads": 2},
    {"num_encoder_layers": 1},
    {"dim_feedforward": 32},
    {"activation": "gelu"},
    {"layer_norm_eps": 1e-2},
    {"head_offsets": "blocked"},
    {"padding": "attended"},
    {"positions": "rotary"},
    {"positions": "alibi"},
    {"positions": "none"},
    {"xpos_scale_base": 16.0},
    {"key_conv": 0},
    {"tie_embeddings": False},
    {"scale_embedding": False},
    {"final_layer_norm": False},
    {"first_seq_len": None},
    {"growth": 0.9},
    {"warmup_copies": 0.0},
    {"learning_rate": 3e-3},
    {"warmup_steps": 1},
    {"schedule": "polynomial", "warmup_steps": 0},
    {"schedule": "polynomial", "schedule_power": 2.0, "warmup_steps": 0},
    {"final_share": 0.9, "warmup_steps": 0},
    {"weight_decay": 0.5},
    {"beta1": 0.5},
    {"beta2": 0.5},
    {"gradient_clip": 0.1},
    {"seed": 3},
]


def train_each(text: str, cp: int, fsdp: bool) -> Any:
    return [train(text, cp, fsdp, 4, None, **change)[:2] for change in CHANGES]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("cp", "fsdp"), [(1, False), (1, True), (2, False), (2, True)])
def test_no_option_is_ignored_on_several_processes(text, cp, fsdp):
    """Each gives the numbers that it gives on one process, and others than its default."""
    wanted = train_each(str(text), 1, False)
    found, _ = run_processes(train_each, 2, str(text), cp, fsdp, timeout_s=900)
    for one, other in zip(found, wanted, strict=True):
        close(one[0], other[0])
        close(one[1], other[1])
    losses = [str(records) for records, _ in wanted]
    assert len({str(train(str(text), 1, False, 4, None)[0]), *losses}) == 1 + len(CHANGES)


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param([(2, 2, True), (1, 1, False)], id="2-1"),
        pytest.param(
            [(4, 2, False), (2, 1, True), (1, 1, False), (3, 3, True), (4, 1, False)],
            marks=pytest.mark.exhaustive,
            id="4-2-1-3-4",
        ),
    ],
)
def test_a_checkpoint_continues_on_any_number_of_processes(text, tmp_path, chain):
    folder, records = tmp_path / "run", []
    folder.mkdir()
    for number, (size, cp, fsdp) in enumerate(chain, 1):
        arguments = (str(text), cp, fsdp, 2 * number, str(folder))
        if size == 1:
            found = train(*arguments)
        else:
            found, *_ = run_processes(train, size, *arguments, timeout_s=500)
        records += found[0]
    wanted, scored, weights = train(str(text), 1, False, 2 * len(chain), None)
    close(records, wanted)
    close(found[1], scored)
    # One checkpoint stays, of the last kind.
    last = "checkpoint.pt" if chain[-1][0] == 1 else f"checkpoint-{2 * len(chain):09}"
    assert [path.name for path in folder.iterdir()] == [last]
    assert weights.keys() == found[2].keys()


@pytest.mark.parametrize(
    ("cp", "fsdp"),
    [
        (1, False),
        pytest.param(1, True, marks=pytest.mark.exhaustive),
        pytest.param(3, False, marks=pytest.mark.exhaustive),
    ],
)
def test_as_many_processes_continue_bit_for_bit(text, tmp_path, cp, fsdp):
    """With dropout, and three ranks, whose sums round by their order."""
    folder = tmp_path / "run"
    folder.mkdir()
    found = run_processes(continue_and_not, 3, str(text), cp, fsdp, str(folder), timeout_s=500)
    (parts, whole), *_ = found
    assert parts[0] == whole[0]
    assert len({record[1] for record in parts[0]}) == 6
    for name, weight in whole[1].items():
        assert torch.equal(parts[1][name], weight), name


def continue_and_not(text: str, cp: int, fsdp: bool, folder: str) -> Any:
    records, _, _ = train(text, cp, fsdp, 3, folder, dropout=0.2)
    more, _, last = train(text, cp, fsdp, 6, folder, dropout=0.2)
    whole, _, wanted = train(text, cp, fsdp, 6, None, dropout=0.2)
    return (records + more, last), (whole, wanted)


def test_a_damaged_or_foreign_checkpoint_is_refused(text, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    run_processes(train, 2, str(text), 1, False, 1, str(folder), timeout_s=500)
    (checkpoint,) = folder.glob("checkpoint-*")
    state, _, ranks = state_of(str(text), 1, False)

    def refused(run_id: str = "a") -> str:
        with pytest.raises(ValueError) as caught:
            restore_checkpoint(state, folder, run_id=run_id, ranks=ranks)
        return str(caught.value)

    assert "belongs to another run than its folder" in refused("b")
    good = tmp_path / "good"
    shutil.copytree(checkpoint, good)
    for name in ("__0_0.distcp", ".metadata"):
        path = checkpoint / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert f"{name}' is damaged: its checksum is wrong" in refused()
        shutil.copy(good / name, path)
    other, _, _ = state_of(str(text), 1, False, dim_feedforward=32)
    with pytest.raises(ValueError, match="its weights are not those of the model"):
        restore_checkpoint(other, folder, run_id="a", ranks=ranks)
    restore_checkpoint(state, folder, run_id="a", ranks=ranks)
    assert state.step == 1


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="cp is 4 and there is 1 process; cp must divide"):
        check_grid(1, cp=4, fsdp=False)
    with pytest.raises(ValueError, match="fsdp is given and there is 1 process"):
        check_grid(1, cp=1, fsdp=True)
    with pytest.raises(ValueError, match="batch_size is 6 and its rows are spread over 4 ranks"):
        parts_of_rank(6, 1, 4)
    for batch in range(1, 25):
        for parts in (n for n in range(1, batch + 1) if batch % n == 0):
            assert parts_of_rank(batch, parts, 1) == parts
            for dp in (n for n in range(1, batch + 1) if batch % n == 0):
                found = parts_of_rank(batch, parts, dp)
                assert (batch // dp) % found == 0
                assert batch // dp // found <= batch // parts
