"""The loop and its state: learning, schedule, accumulation, checkpoints, exact continuation."""

import dataclasses
import errno
import io
import itertools
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.text.copies import copied_row
from dilated_models.text.files import text_files
from dilated_models.text.order import RowOrder
from dilated_models.text.streams import ByteStream
from dilated_models.training.config import TrainingConfig
from dilated_models.training.loop import StepRecord, TrainingState
from torch import nn

TRAINING: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "seq_len": 24,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "validate_every": 100,
    "checkpoint_every": 100,
}


@pytest.fixture
def stream(text: Path) -> ByteStream:
    return ByteStream(text_files([text])[0])


@pytest.fixture
def start(config: LongNetConfig, stream: ByteStream):
    """A function that makes a fresh state, and one that runs it to a step."""

    def fresh(**changes: Any) -> TrainingState:
        dropout = changes.pop("dropout", 0.1)
        tied = changes.pop("tied", True)
        training = TrainingConfig(**TRAINING | changes)
        torch.manual_seed(training.seed)
        model = dataclasses.replace(config, num_tokens=256, dropout=dropout, tie_embeddings=tied)
        return TrainingState(LongNetLM(model), training)

    return fresh


def run(state: TrainingState, stream: ByteStream, count: int | None = None) -> list[StepRecord]:
    order = RowOrder(num_tokens=len(stream), seq_len=24, seed=state.config.seed)
    return list(itertools.islice(state.steps(stream, order), count))


def losses(records: list[StepRecord]) -> list[float]:
    return [record.loss for record in records]


def test_it_learns(start, stream):
    records = run(start(steps=60, dropout=0.0, learning_rate=1e-2), stream)
    assert records[0].bits_per_byte > 7
    assert records[-1].bits_per_byte < 3.5
    assert [r.step for r in records] == list(range(1, 61))
    assert records[3].bits_per_byte == pytest.approx(records[3].loss / math.log(2))


@pytest.mark.parametrize("numbers", [{}, {"warmup_copies": 0.67, "first_seq_len": 6, "growth": 1}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_restored_run_continues_bit_for_bit(start, stream, tmp_path, tied, numbers):
    whole = run(start(tied=tied, **numbers), stream)
    first = start(tied=tied, **numbers)
    begun = run(first, stream, 3)
    first.save(tmp_path)
    torch.manual_seed(123)  # whatever happened to the global generator meanwhile
    second = start(tied=tied, **numbers, seed=0)
    torch.rand(7)
    second.restore(tmp_path)
    assert second.step == 3
    assert losses(begun + run(second, stream)) == losses(whole)
    assert len(set(losses(whole))) == 6


def test_the_random_state_is_part_of_it(start, stream, tmp_path):
    """With dropout, restoring all but the generator gives other losses: the test above can fail."""
    state = start()
    run(state, stream, 3)
    state.save(tmp_path)
    rest = losses(run(state, stream))
    again = start()
    again.restore(tmp_path)
    torch.manual_seed(5)
    assert losses(run(again, stream)) != rest


def test_a_checkpoint_holds_plain_values(start, stream, tmp_path):
    state = start()
    run(state, stream, 2)
    state.save(tmp_path)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["step"] == 2
    assert set(content) == {
        "format_version",
        "run_id",
        "checksum",
        "step",
        "seconds",
        "model",
        "optimizer",
        "cpu_rng",
        "cuda_rng",
    }


@pytest.mark.parametrize("fails_in", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_last_checkpoint(
    start, stream, tmp_path, monkeypatch, fails_in
):
    folder = tmp_path / "run"
    folder.mkdir()
    state = start()
    run(state, stream, 2)
    state.save(folder)
    run(state, stream, 2)

    def crash(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, fails_in, crash)
    with pytest.raises(OSError, match="no space left"):
        state.save(folder)
    monkeypatch.undo()
    assert os.listdir(folder) == ["checkpoint.pt"]
    again = start()
    again.restore(folder)
    assert again.step == 2


def test_a_full_disk_is_an_os_error(start, tmp_path, monkeypatch):
    """PyTorch raises a RuntimeError about a position in the file instead."""
    real, state, folder = Path.open, start(), tmp_path / "run"
    folder.mkdir()

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(path: Path, mode: str = "r") -> object:
        return Full() if mode == "wb" else real(path, mode)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoint\.pt'"):
        state.save(folder)
    assert os.listdir(folder) == []


def test_restore_refuses(start, stream, tmp_path):
    state = start()
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint\.pt; --resume must have one"):
        state.restore(tmp_path)
    path = tmp_path / "checkpoint.pt"
    state.save(tmp_path)
    whole = path.read_bytes()
    for content in (b"not a checkpoint", b"", *(whole[: len(whole) * i // 6] for i in range(1, 6))):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"pt' cannot be resumed from: it is damaged, or .*\w\)"
        ):
            state.restore(tmp_path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt' cannot be resumed from"):
        state.restore(tmp_path)
    start(tied=False).save(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be resumed from: .*output\.weight"):
        start(tied=True).restore(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format_version": 9}, path)
    with pytest.raises(ValueError, match="its format is 9; it must be 2"):
        state.restore(tmp_path)


def test_restore_refuses_fewer_steps_than_are_done(start, stream, tmp_path):
    state = start()
    run(state, stream, 3)
    state.save(tmp_path)
    with pytest.raises(ValueError, match="steps is 2 and the run has done 3; it must be at least"):
        start(steps=2).restore(tmp_path)
    start(steps=3).restore(tmp_path)


def test_restore_refuses_another_runs_checkpoint(start, tmp_path):
    start().save(tmp_path, run_id="ours")
    with pytest.raises(ValueError, match="belongs to another run than its folder; put back"):
        start().restore(tmp_path, run_id="another")
    start().restore(tmp_path, run_id="ours")


def test_a_flipped_bit_anywhere_is_found(start, stream, tmp_path):
    state = start()
    run(state, stream, 1)
    state.save(tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    weights = state.model.state_dict()
    messages: list[str] = []
    for position in range(0, len(whole), len(whole) // 50):
        flipped = bytearray(whole)
        flipped[position] ^= 16
        path.write_bytes(flipped)
        again = start()
        try:
            again.restore(tmp_path)
        except ValueError as error:
            messages.append(str(error))
        else:  # padding between the tensors of the file
            assert all(torch.equal(again.model.state_dict()[k], v) for k, v in weights.items())
    assert all("is damaged" in m or "cannot be resumed from" in m for m in messages)
    assert len(messages) > 40


def test_accumulation_is_the_whole_batch(start, stream):
    whole = run(start(dropout=0.0), stream, 3)
    parts = run(start(dropout=0.0, accumulation=4), stream, 3)
    for a, b in zip(whole, parts, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)


def test_accumulated_parts_of_unequal_targets_are_the_whole_batch(start, tmp_path):
    """Rows lose a target at each border, so a mean of the means of the parts would be wrong."""
    (tmp_path / "short").mkdir()
    for i in range(40):
        (tmp_path / "short" / f"{i}").write_text("a line of text\n" * (1 + i % 5))
    short = ByteStream(text_files([tmp_path / "short"])[0])
    whole = run(start(dropout=0.0), short, 3)
    parts = run(start(dropout=0.0, accumulation=4), short, 3)
    assert min(record.num_tokens for record in whole) < 96
    for a, b in zip(whole, parts, strict=True):
        assert a.num_tokens == b.num_tokens
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)


def test_what_each_step_trains_on(start, stream, monkeypatch):
    """Copies first, then every row of the text from the first on; windows grow in both."""
    state = start(steps=6, warmup_copies=0.5, first_seq_len=12, growth=0.67)
    seen = []
    real = LongNetLM.hidden_states

    def hidden_states(self, tokens, *, cu_seqlens, **options):
        seen.append((tokens.clone(), cu_seqlens.tolist()))
        return real(self, tokens, cu_seqlens=cu_seqlens, **options)

    monkeypatch.setattr(LongNetLM, "hidden_states", hidden_states)
    run(state, stream)
    assert len(seen) == 6
    assert all(len(tokens) == 96 for tokens, _ in seen)
    order = RowOrder(num_tokens=len(stream), seq_len=24, seed=0)
    for step, (tokens, bounds) in enumerate(seen):
        window = 12 if step < 4 else 24
        assert max(b - a for a, b in itertools.pairwise(bounds)) <= window
        assert set(range(0, 97, window)) <= set(bounds)
        if step < 3:
            rows = [
                copied_row(
                    stream, seq_len=24, window=window, seed=0, sample=sample, plain_share=0.25
                ).inputs
                for sample in range(4 * step, 4 * step + 4)
            ]
        else:
            starts = [order.start(sample) for sample in range(4 * (step - 3), 4 * (step - 2))]
            rows = [stream.read(start, start + 24) for start in starts]
        assert tokens.tolist() == np.concatenate(rows).tolist()


def test_gradients_are_clipped(start, stream):
    state = start(gradient_clip=1e-3, dropout=0.0)
    (record,) = run(state, stream, 1)
    assert record.gradient_norm > 0.1
    norm = torch.stack([p.grad.norm() for p in state.model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(start, stream):
    state = start(accumulation=2)
    run(state, stream, 1)
    starts = [RowOrder(num_tokens=len(stream), seq_len=24, seed=0).start(i) for i in range(4, 8)]
    rows = [set(stream.read(first, first + 24).tolist()) for first in starts]
    only_in_the_last = min((rows[2] | rows[3]) - (rows[0] | rows[1]))
    with torch.no_grad():
        state.model.embedding.weight[only_in_the_last] = float("nan")
        state.model.output.weight = nn.Parameter(state.model.output.weight.nan_to_num(1.0))
    before = {k: v.clone() for k, v in state.optimizer.state_dict()["state"][0].items()}
    (third, third_byte), (last, last_byte) = map(stream.place_of, starts[2:])
    message = (
        f"the loss is not finite in step 2, on {str(third)!r} from byte {third_byte}, "
        f"{str(last)!r} from byte {last_byte}; try a lower --lr than 0.003"
    )
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        run(state, stream, 1)
    assert state.step == 1
    assert torch.equal(state.optimizer.state_dict()["state"][0]["exp_avg"], before["exp_avg"])


def test_a_gradient_that_is_not_finite_stops_the_run(start, stream):
    state = start(batch_size=8, warmup_copies=0.5)
    state.model.final_norm.weight.register_hook(lambda grad: grad * math.inf)
    copies = "the gradient is not finite in step 1, on edited copies, rows 0 to 7 of the run; try"
    with pytest.raises(FloatingPointError, match=copies):
        run(state, stream, 1)
    state = start(batch_size=8)
    state.model.final_norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        FloatingPointError, match=r"step 1, on '.*' from .*, '.*' from .* and 5 more"
    ):
        run(state, stream, 1)


def test_clipping_may_be_off(start, stream):
    (record,) = run(state := start(gradient_clip=0, dropout=0.0), stream, 1)
    norm = torch.stack([p.grad.norm() for p in state.model.parameters()]).norm()
    assert norm.item() == pytest.approx(record.gradient_norm, rel=1e-6)


def test_bfloat16_is_autocast(start, stream):
    single, low = start(dropout=0.0), start(dropout=0.0, dtype="bfloat16")
    a, b = run(single, stream, 3), run(low, stream, 3)
    assert all(p.dtype == torch.float32 for p in low.model.parameters())
    assert a[2].loss != b[2].loss
    assert a[2].loss == pytest.approx(b[2].loss, rel=2e-2)


def test_only_linear_weights_decay(start):
    state = start(tied=True)
    decayed, kept = state.optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0.0)
    names = {id(p): n for n, p in state.model.named_parameters()}
    assert all(names[id(p)].endswith(".weight") and p.ndim == 2 for p in decayed["params"])
    assert "embedding.weight" in {names[id(p)] for p in kept["params"]}
    assert len(decayed["params"]) == 2 * 6
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    untied = start(tied=False).optimizer.param_groups[0]["params"]
    assert len(untied) == 2 * 6 + 1  # an output layer of its own is a linear layer
