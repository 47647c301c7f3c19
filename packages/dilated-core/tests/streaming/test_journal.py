"""After a kill at any moment a call with a journal ends bit for bit as an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_core.streaming.stream import dilated_attention_streamed
from dilated_core.streaming.tensors import tensor_sink, tensor_source

NESTED = DilatedPattern([16, 32, 64], [1, 2, 4])
UNEVEN = DilatedPattern([10, 24, 60], [1, 2, 3], head_offsets="blocked", padding="attended")


def _qkv(seq_len, *, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, seq_len, 2, 4)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in "qkv"]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class ChecksumSink:
    """Adds what it is given to a sum that the order and number of additions change."""

    def __init__(self):
        self.value = 0

    def __call__(self, start, stop, out):
        for number in out.double().view(torch.int64).flatten().tolist():
            self.value = (self.value * 31 + number) % (2**61 - 1)

    def state_dict(self):
        return self.value

    def load_state_dict(self, state):
        self.value = state


@pytest.mark.parametrize("pattern", [NESTED, UNEVEN], ids=["nested", "uneven"])
def test_killed_at_each_step_it_goes_on_bit_for_bit(pattern, tmp_path, monkeypatch):
    """Kills before and after each call of the source, of the sink and of the file replacement."""
    q, k, v = _qkv(170, dtype=torch.float32)
    expected, options = torch.empty_like(q), {"seq_len": 170, "chunk_length": 50}
    source, whole = tensor_source(q, k, v), ChecksumSink()
    dilated_attention_streamed(source, tensor_sink(expected), pattern, **options)
    dilated_attention_streamed(source, whole, pattern, **options)
    left = 0
    replace = os.replace

    def killing(function):
        def killed(*arguments):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            result = function(*arguments)
            left -= 1
            if left == 0:
                raise Killed
            return result

        return killed

    class KilledChecksumSink(ChecksumSink):
        def __call__(self, *arguments):
            killing(super().__call__)(*arguments)

    monkeypatch.setattr("os.replace", killing(replace))
    for step in range(1, 100):
        path = tmp_path / f"{step}.journal"
        out, kills = torch.full_like(q, float("nan")), 0
        for sink in (killing(tensor_sink(out)), KilledChecksumSink()):
            left = step
            try:
                dilated_attention_streamed(killing(source), sink, pattern, journal=path, **options)
            except Killed:
                kills += 1
            left = -1
            if not isinstance(sink, ChecksumSink):
                sink = tensor_sink(out)
            else:
                sink = ChecksumSink()
                sink.value = 12345  # what a new process has before the journal is read
                if not path.exists():
                    sink.value = 0
            dilated_attention_streamed(source, sink, pattern, journal=path, **options)
            path.unlink()
        assert torch.equal(out, expected)
        assert sink.value == whole.value
        if kills == 0:
            break
    assert step > 10


@pytest.mark.parametrize("chunk_length", [7, 25, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", [NESTED, UNEVEN], ids=["nested", "uneven"])
def test_a_call_goes_on_from_every_boundary(pattern, is_causal, dtype, chunk_length, tmp_path):
    """Each run is killed after `step` more ranges; a first chunk read elsewhere changes bits."""
    q, k, v = _qkv(170, dtype=dtype)
    options = {"seq_len": 170, "chunk_length": chunk_length, "is_causal": is_causal}
    source, expected = tensor_source(q, k, v), torch.empty_like(q)
    dilated_attention_streamed(source, tensor_sink(expected), pattern, **options)
    out, kills = torch.empty_like(q), 0
    write = tensor_sink(out)
    for step in (1, 2, 3):
        out.fill_(float("nan"))
        journal = tmp_path / f"{step}.journal"
        while not journal.exists() or json.loads(journal.read_text())["done"] < 170:
            left = step

            def sink(*arguments):
                nonlocal left
                if left == 0:
                    raise Killed
                write(*arguments)
                left -= 1

            try:
                dilated_attention_streamed(source, sink, pattern, journal=journal, **options)
            except Killed:
                kills += 1
        assert torch.equal(out, expected)
    assert kills > 0


def test_a_finished_journal_leaves_nothing_to_do(tmp_path):
    q, k, v = _qkv(170)
    path, sink, reports = tmp_path / "journal", ChecksumSink(), []
    options = {"seq_len": 170, "chunk_length": 50, "journal": path}
    dilated_attention_streamed(tensor_source(q, k, v), sink, UNEVEN, **options)
    again = ChecksumSink()
    dilated_attention_streamed(
        tensor_source(q, k, v), again, UNEVEN, progress=lambda *x: reports.append(x), **options
    )
    assert again.value == sink.value != 0
    assert reports == [(170, 170)]


def test_a_journal_keeps_its_chunk_length(tmp_path, monkeypatch):
    q, k, v = _qkv(170)
    path = tmp_path / "journal"
    run = {"seq_len": 170, "journal": path}
    dilated_attention_streamed(tensor_source(q, k, v), print, NESTED, chunk_length=64, **run)
    dilated_attention_streamed(tensor_source(q, k, v), print, NESTED, **run)
    assert json.loads(path.read_text())["call"]["chunk_length"] == 64


def test_a_journal_of_another_call_is_refused(tmp_path):
    q, k, v = _qkv(170)
    path = tmp_path / "journal"
    source, sink = tensor_source(q, k, v), tensor_sink(torch.empty_like(q))
    dilated_attention_streamed(source, sink, NESTED, seq_len=170, journal=path)
    with pytest.raises(ValueError, match=r"another call: is_causal was False and is True, seq_len "
                       r"was 170 and is 160; repeat that call, or delete"):  # fmt: skip
        dilated_attention_streamed(source, sink, NESTED, seq_len=160, is_causal=True, journal=path)
    for pattern, what in (
        (UNEVEN, "head_offsets was 'interleaved' and is 'blocked'"),
        (DilatedPattern([16, 32, 64], [1, 2, 2]), r"dilation_rates was \[1, 2, 4\]"),
    ):
        with pytest.raises(ValueError, match=what):
            dilated_attention_streamed(source, sink, pattern, seq_len=170, journal=path)
    with pytest.raises(ValueError, match=r"dtype was 'torch.float64' and is 'torch.float32'"):
        dilated_attention_streamed(
            tensor_source(q.float(), k.float(), v.float()), sink, NESTED, seq_len=170, journal=path
        )
    for text, message in (
        ("[]", "is not a journal"),
        ("{", "is not a journal"),
        ('{"format": 9, "call": {}, "done": 0, "sink_state": null}', "has format 9 and this"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            dilated_attention_streamed(source, sink, NESTED, seq_len=170, journal=path)


KILLED_SCRIPT = """
import random, sys, time, torch
from dilated_core import DilatedPattern
from dilated_core.streaming.tensors import MappedTensor, tensor_sink, tensor_source
from dilated_core.streaming.stream import dilated_attention_streamed
torch.set_num_threads(1)
folder, pause_s = sys.argv[1], float(sys.argv[2])
shape = (2, 3000, 2, 4)
q, k, v = (MappedTensor(f"{folder}/{name}", shape, torch.float32) for name in "qkv")
out = MappedTensor(f"{folder}/out", shape, torch.float32, mode="w")
write = tensor_sink(out)
class Sink:
    total = 0.0
    def __call__(self, start, stop, rows):
        time.sleep(random.random() * pause_s)
        write(start, stop, rows)
        self.total += rows.double().sum().item()
        time.sleep(random.random() * pause_s)
    def state_dict(self): return self.total
    def load_state_dict(self, state): self.total = state
sink = Sink()
pattern = DilatedPattern([10, 24, 60], [1, 2, 3], padding="attended")
dilated_attention_streamed(tensor_source(q, k, v), sink, pattern, seq_len=3000, chunk_length=36,
                           journal=f"{folder}/journal")
print(sink.total)
"""


@pytest.mark.slow
def test_killed_processes_leave_a_file_that_is_bit_for_bit_that_of_one_run(tmp_path):
    folders = tmp_path / "killed", tmp_path / "whole"
    for folder in folders:
        folder.mkdir()
        for name, x in zip("qkv", _qkv(3000, batch=2, dtype=torch.float32), strict=True):
            x.numpy().tofile(folder / name)

    def start(folder, pause_s):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED_SCRIPT, str(folder), str(pause_s)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def done():
        path = folders[0] / "journal"
        return json.loads(path.read_text())["done"] if path.exists() else 0

    for _ in range(3):
        process, before = start(folders[0], 0.02), done()
        while done() == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(random.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert 0 < done() < 3000
    totals = [run.communicate()[0] for run in [start(folder, 0) for folder in folders]]
    assert totals[0] == totals[1] != ""
    killed, whole = ((folder / "out").read_bytes() for folder in folders)
    assert killed == whole
    assert any(whole)
