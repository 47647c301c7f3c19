"""Streaming gives what the whole sequence at once gives, in little memory, and survives kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention, journal, reference_dilated_attention
from dilated_core import stream_window as window_module
from dilated_core.memory_profile import memory_profile
from dilated_core.stream_io import MappedTensor, tensor_sink, tensor_source
from dilated_core.streaming import default_chunk_length, dilated_attention_streamed
from dilated_core.testing import AWKWARD_CASES, random_cases, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

NESTED = DilatedPattern([16, 32, 64], [1, 2, 4])
UNEVEN = DilatedPattern([10, 24, 60], [1, 2, 3], head_offsets="blocked", padding="attended")


def _qkv(seq_len, *, heads=2, kv_heads=None, batch=1, dtype=torch.float64, head_dim=4):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, seq_len, h, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads, kv_heads or heads, kv_heads or heads)
    ]


def _streamed(q, k, v, pattern, **options):
    out = torch.full_like(q, float("nan"))
    dilated_attention_streamed(
        tensor_source(q, k, v), tensor_sink(out), pattern, seq_len=q.shape[1], **options
    )
    return out


def _check(case, chunk_length):
    q, k, v = (x.detach() for x in case.tensors(dtype=torch.float64)[:3])
    options = {"is_causal": case.is_causal, "scale": case.scale}
    out = _streamed(q, k, v, case.pattern, chunk_length=chunk_length, **options)
    exact = reference_dilated_attention(q, k, v, case.pattern, **options)
    assert relative_error(out, exact) < 1e-12


@pytest.mark.parametrize("chunk_length", [1, 7, 16, 48, None])
@pytest.mark.parametrize(
    "case",
    [case for case in AWKWARD_CASES if case.masked is None and not case.documents],
    ids=lambda case: case.name,
)
def test_awkward_cases_match_the_oracle(case, chunk_length):
    _check(case, chunk_length)


@given(case=random_cases(), chunk_length=st.integers(1, 90))
@settings(max_examples=150, deadline=None)
def test_random_cases_match_the_oracle(case, chunk_length):
    _check(case, chunk_length)


@pytest.mark.parametrize("pattern", [NESTED, UNEVEN], ids=["nested", "uneven"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_bfloat16_and_grouped_queries_within_the_error_budget(pattern, is_causal):
    q, k, v = _qkv(300, heads=4, kv_heads=2, dtype=torch.bfloat16, head_dim=16)
    out = _streamed(q, k, v, pattern, is_causal=is_causal, chunk_length=64)
    exact = reference_dilated_attention(q, k, v, pattern, is_causal=is_causal)
    whole = dilated_attention(q, k, v, pattern, is_causal=is_causal)
    assert out.dtype == torch.bfloat16
    # A branch that completes its segments apart from the others is rounded once more.
    assert relative_error(out, exact) <= 2 * relative_error(whole, exact)


def test_causal_results_ignore_what_comes_later():
    q, k, v = _qkv(200)
    before = _streamed(q, k, v, UNEVEN, is_causal=True, chunk_length=30)
    for x in (q, k, v):
        x[:, 100:] = 9.0
    after = _streamed(q, k, v, UNEVEN, is_causal=True, chunk_length=30)
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


@given(
    case=random_cases(max_seq_len=200),
    chunk_length=st.integers(1, 90),
)
@settings(max_examples=50, deadline=None)
def test_rows_are_asked_for_and_handed_on_once_and_in_order(case, chunk_length):
    q, k, v = (x.detach() for x in case.tensors(dtype=torch.float32)[:3])
    asked, given_, reports = [], [], []

    def source(start, stop):
        asked.append((start, stop))
        return q[:, start:stop], k[:, start:stop], v[:, start:stop]

    def sink(start, stop, out):
        # No row waits for more than its longest segment and the chunk that completes it.
        assert asked[-1][1] - start <= longest + chunk_length
        assert out.shape[1] == stop - start
        given_.append((start, stop))

    S = case.seq_len
    longest = min(S, max(case.pattern.segment_lengths))
    dilated_attention_streamed(
        source,
        sink,
        case.pattern,
        seq_len=S,
        chunk_length=chunk_length,
        progress=lambda *done_and_total: reports.append(done_and_total),
    )
    assert asked.pop(0) == (0, 1)  # for the shapes
    for ranges in (asked, given_):
        assert ranges[0][0] == 0
        assert ranges[-1][1] == S
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
    assert max(stop - start for start, stop in asked) <= chunk_length
    assert reports == [(stop, S) for _, stop in given_]


@pytest.mark.parametrize("pattern", [NESTED, UNEVEN], ids=["nested", "uneven"])
def test_memory_does_not_grow_with_the_sequence(pattern):
    def source(start, stop):
        x = torch.arange(start, stop, dtype=torch.float32).sin()[None, :, None, None]
        return (x.expand(1, -1, 2, 8).contiguous(),) * 3

    def peak(seq_len):
        with memory_profile() as profile:
            dilated_attention_streamed(
                source, lambda *_: None, pattern, seq_len=seq_len, chunk_length=128
            )
        return profile.peak_bytes

    row = 2 * 8 * 4
    short, long = peak(4000), peak(8000)  # 4000: all that chunks and segments can be apart
    assert long <= short
    assert long < 16 * (128 + 64) * row


def test_nested_segments_are_attended_to_where_they_were_read(monkeypatch):
    monkeypatch.setattr(window_module, "_moved", lambda *_: pytest.fail("rows were copied"))
    monkeypatch.setattr(window_module.Window, "_fold", lambda *_: pytest.fail("results folded"))
    q, k, v = _qkv(1000)
    out = _streamed(q, k, v, NESTED, chunk_length=192)
    assert relative_error(out, reference_dilated_attention(q, k, v, NESTED)) < 1e-12


def test_a_source_may_reuse_its_memory():
    q, k, v = _qkv(300)
    memory = [torch.empty_like(x[:, :32]) for x in (q, k, v)]

    def source(start, stop):
        for buffer, x in zip(memory, (q, k, v), strict=True):
            buffer[:, : stop - start] = x[:, start:stop]
        return tuple(buffer[:, : stop - start] for buffer in memory)

    out = torch.empty_like(q)
    dilated_attention_streamed(source, tensor_sink(out), UNEVEN, seq_len=300, chunk_length=32)
    assert torch.equal(out, _streamed(q, k, v, UNEVEN, chunk_length=32))


def test_default_chunks_hold_whole_segments():
    assert default_chunk_length(NESTED, 10**9, 256) == 2**15
    assert default_chunk_length(UNEVEN, 10**9, 2**22) == 120
    assert default_chunk_length(NESTED, 10, 2**30) == 10
    # No common multiple of a reasonable length: the longest segments end with the chunk.
    assert default_chunk_length(DilatedPattern([1009, 1013], [1, 1]), 10**9, 2**22) == 1013


def test_no_gradients_are_computed():
    q, k, v = _qkv(50)
    q.requires_grad_()
    with pytest.raises(ValueError, match=r"q requires a gradient, .* pass q.detach"):
        tensor_source(q, k, v)
    with pytest.raises(ValueError, match="out requires a gradient"):
        tensor_sink(q)
    results = []
    dilated_attention_streamed(
        lambda a, b: (q[:, a:b], k[:, a:b], v[:, a:b]),
        lambda *result: results.append(result[2]),
        NESTED,
        seq_len=50,
    )
    assert not results[0].requires_grad


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

    monkeypatch.setattr(journal.os, "replace", killing(replace))
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
from dilated_core.stream_io import MappedTensor, tensor_sink, tensor_source
from dilated_core.streaming import dilated_attention_streamed
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


class OneSidedSink:
    def __call__(self, *_): ...

    def state_dict(self): ...


class UnwritableSink(ChecksumSink):
    def state_dict(self):
        return torch.ones(1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, "seq_len is 0; it must be at least 1"),
        ({"seq_len": 2.0}, TypeError, "seq_len is 2.0; it must be an integer"),
        ({"chunk_length": 0}, ValueError, "chunk_length is 0; it must be at least 1"),
        ({"chunk_length": True}, TypeError, "chunk_length is True; it must be an integer"),
        ({"source": None}, TypeError, "source is a NoneType; it must be callable"),
        ({"sink": torch.ones(1)}, TypeError, "sink is a Tensor; it must be callable"),
        ({"progress": 1}, TypeError, "progress is a int; it must be callable"),
        ({"sink": OneSidedSink()}, TypeError, "only one of state_dict and load_state_dict"),
        ({"sink": UnwritableSink(), "journal": True}, TypeError, "returned Tensor that JSON"),
        ({"pattern": [4]}, TypeError, "pattern is a list; it must be a DilatedPattern"),
        ({"scale": float("nan")}, ValueError, "scale is nan; it must be finite"),
        ({"backend": "cudnn"}, ValueError, "backend is 'cudnn'"),
        ({"source": lambda a, b: torch.ones(3, 1, b - a, 2, 4)}, TypeError,
         r"source\(0, 1\) returned a Tensor; it must return a tuple of three tensors"),
        ({"source": lambda a, b: (torch.ones(b - a, 2, 4),) * 3}, ValueError, "four dimensions"),
        ({"source": lambda a, b: (torch.ones(1, b - a, 2, 4).int(),) * 3}, TypeError, "floating"),
        ({"source": lambda a, b: (torch.ones(1, 1, 2, 4),) * 3}, ValueError,
         r"source\(0, 20\) returned 1 positions of q; it must return the 20 positions"),
        ({"source": lambda a, b: (torch.ones(1, 5, 2, 4),) * 3}, ValueError,
         r"source\(0, 1\) returned 5 positions of q; it must return the 1 positions"),
        ({"source": lambda a, b: (torch.ones(1, b - a, 2, 3 + b),) * 3}, ValueError,
         r"source\(0, 20\) returned q of shape \(1, 20, 2, 23\), torch.float32 on cpu, and "
         r"source\(0, 1\) something else"),
        ({"source": lambda a, b: tuple(torch.ones(1, b - a, 2, 4).to(torch.float16 if b > 1 and
          i == 2 else torch.float32) for i in range(3))}, ValueError, "returned v of shape"),
    ],
)  # fmt: skip
def test_mistakes(change, error, message, tmp_path):
    arguments = {
        "source": lambda a, b: (torch.ones(1, b - a, 2, 4),) * 3,
        "sink": lambda *_: None,
        "pattern": NESTED,
        "seq_len": 20,
    } | change
    if "journal" in change:
        arguments["journal"] = tmp_path / "journal"
    with pytest.raises(error, match=message):
        dilated_attention_streamed(
            arguments.pop("source"), arguments.pop("sink"), arguments.pop("pattern"), **arguments
        )


def test_files_are_read_and_written_in_place(tmp_path):
    q, k, v = _qkv(700, batch=2, heads=3, dtype=torch.bfloat16)
    for name, x in zip("qkv", (q, k, v), strict=True):
        (tmp_path / name).write_bytes(x.contiguous().view(torch.uint8).numpy().tobytes())
    files = [MappedTensor(tmp_path / name, q.shape, q.dtype) for name in "qkv"]
    out = MappedTensor(tmp_path / "out", q.shape, q.dtype, mode="w")
    options = {"seq_len": 700, "chunk_length": 100}
    dilated_attention_streamed(tensor_source(*files), tensor_sink(out), UNEVEN, **options)
    expected = _streamed(q, k, v, UNEVEN, chunk_length=100)
    assert torch.equal(out.rows(0, 700), expected)
    for first, last in ((0, 1), (123, 457), (699, 700)):
        assert torch.equal(files[2].rows(first, last), v[:, first:last])
    assert torch.equal(MappedTensor(tmp_path / "out", q.shape, q.dtype, mode="w").rows(5, 9),
                       expected[:, 5:9])  # fmt: skip


def test_files_that_are_read_stay_as_they_are(tmp_path):
    torch.arange(24.0).numpy().tofile(tmp_path / "x")
    x = MappedTensor(tmp_path / "x", (1, 3, 2, 4), torch.float32)
    x.rows(0, 3).fill_(1)
    assert x.rows(1, 2)[0, 0, 0, 0] == 8


def test_mistakes_with_files(tmp_path):
    path = tmp_path / "x"
    torch.arange(24.0).numpy().tofile(path)
    shape = (1, 3, 2, 4)
    with pytest.raises(ValueError, match=r"x has 96 bytes and a torch.float64 .* has 192; give"):
        MappedTensor(path, shape, torch.float64)
    with pytest.raises(ValueError, match="mode is 'a'; it must be 'r', 'r\\+' or 'w'"):
        MappedTensor(path, shape, torch.float32, mode="a")
    with pytest.raises(ValueError, match=r"shape is \(3, 8\); it must be four numbers above 0"):
        MappedTensor(path, (3, 8), torch.float32)
    with pytest.raises(FileNotFoundError):
        MappedTensor(tmp_path / "missing", shape, torch.float32, mode="r+")
    x = MappedTensor(path, shape, torch.float32)
    with pytest.raises(ValueError, match="rows 2 to 4 are not within the 3 of"):
        x.rows(2, 4)
    with pytest.raises(ValueError, match=r"is open for reading; give mode='r\+' or mode='w'"):
        tensor_sink(x)
    with pytest.raises(ValueError, match=r"out has shape \(1, 2, 2, 4\) and torch.float32 at .* 0 "
                       r"to 2, and the results have \(1, 2, 2, 4\) and torch.float64"):  # fmt: skip
        tensor_sink(torch.ones(1, 3, 2, 4))(0, 2, torch.ones(1, 2, 2, 4).double())
