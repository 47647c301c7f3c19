"""Streaming gives the result of the whole sequence at once, in the memory of a few segments.

Journals and kills are in test_journal.py.
"""

from itertools import pairwise

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention, reference_dilated_attention
from dilated_core.inspection.memory_profile import memory_profile
from dilated_core.streaming import window as window_module
from dilated_core.streaming.stream import default_chunk_length, dilated_attention_streamed
from dilated_core.streaming.tensors import MappedTensor, tensor_sink, tensor_source
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


class OneSidedSink:
    def __call__(self, *_): ...

    def state_dict(self): ...


class UnwritableSink:
    def __call__(self, *_): ...

    def load_state_dict(self, state): ...

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
        ({"backend": "nonesuch"}, ValueError, "backend is 'nonesuch'"),
        ({"source": lambda a, b: torch.ones(3, 1, b - a, 2, 4)}, TypeError,
         r"source\(0, 1\) returned a Tensor; it must return a tuple of three tensors"),
        ({"source": lambda a, b: (torch.ones(b - a, 2, 4),) * 3}, ValueError, "four dimensions"),
        ({"source": lambda a, b: (torch.ones(1, b - a, 2, 4).int(),) * 3}, TypeError, "floating"),
        ({"source": lambda a, b: (torch.ones(1, 1, 2, 4),) * 3}, ValueError,
         r"source\(0, 20\) returned 1 positions of q; it must return 20 positions"),
        ({"source": lambda a, b: (torch.ones(1, 5, 2, 4),) * 3}, ValueError,
         r"source\(0, 1\) returned 5 positions of q; it must return 1 positions"),
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
    with pytest.raises(ValueError, match=r"mode is 'a'; it must be one of 'r', 'r\+', 'w'"):
        MappedTensor(path, shape, torch.float32, mode="a")
    with pytest.raises(ValueError, match=r"shape is \(3, 8\); it must be the four numbers"):
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
