"""A journal that no call can go on from is refused in one sentence, before any work."""

import json
import os

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention_streamed

PATTERN = DilatedPattern([16, 32], [1, 2])
SEQ_LEN = 170


class CountingSink:
    """Its effects add up: the number of positions."""

    def __init__(self):
        self.value = 0

    def __call__(self, start, stop, out):
        self.value += stop - start

    def state_dict(self):
        return self.value

    def load_state_dict(self, state):
        self.value = state


def stream(path, sink=None, **options):
    """A call whose journal is at `path`; a refused one reads position 0 at most."""
    reads = []

    def source(start, stop):
        reads.append((start, stop))
        return (torch.ones(1, stop - start, 2, 4),) * 3

    try:
        dilated_attention_streamed(
            source, sink or CountingSink(), PATTERN, seq_len=SEQ_LEN, journal=path, **options
        )
    except (TypeError, ValueError):
        assert reads in ([], [(0, 1)])
        raise


@pytest.fixture
def path(tmp_path):
    stream(tmp_path / "journal", chunk_length=64)
    return tmp_path / "journal"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"done": 1e9}, "done is 1000000000.0; it must be an integer"),
        ({"done": 10**9}, "done is 1000000000; it must be at most 170"),
        ({"done": 171}, "done is 171; it must be at most 170"),
        ({"done": -1}, "done is -1; it must be at least 0"),
        ({"done": 64.0}, "done is 64.0; it must be an integer"),
        ({"done": True}, "done is True; it must be an integer"),
        ({"done": None}, "done is None; it must be an integer"),
        ({"done": "64"}, "done is '64'; it must be an integer"),
        ({"done": [64]}, r"done is \[64\]; it must be an integer"),
        ({"done": float("nan")}, "done is nan; it must be an integer"),
        ({"call": None}, "call is None; it must be an object"),
        ({"call": [1]}, r"call is \[1\]; it must be an object"),
        ({"call": {}}, "seq_len is None; it must be an integer"),
    ],
)
def test_a_damaged_field(change, message, path):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"journal .* is damaged: {message}.*; delete it to start"):
        stream(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_length": "64"}, "is damaged: chunk_length is '64'; it must be an integer"),
        ({"chunk_length": 0}, "is damaged: chunk_length is 0; it must be at least 1"),
        ({"seq_len": True}, "is damaged: seq_len is True; it must be an integer"),
        ({"seq_len": 171}, "another call: seq_len was 171 and is 170"),
        ({"is_causal": 0}, "another call: is_causal was 0 and is False"),
        ({"batch_size": 1.0}, "another call: batch_size was 1.0 and is 1"),
        ({"padding": None}, "another call: padding was None and is 'masked'"),
        ({"extra": 1}, "another call: extra was 1 and is None"),
    ],
)
def test_a_damaged_call(change, message, path):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"call": record["call"] | change}))
    with pytest.raises(ValueError, match=message):
        stream(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe{}", b"{", b"[]", b"null", b"3", b'{"done": 1}', b"[" * 100_000, b"\0" * 99],
    ids=["empty", "not UTF-8", "half", "list", "null", "number", "fields", "deep", "zeros"],
)
def test_a_file_that_is_no_record(content, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a journal; give the path of one, or of no file"):
        stream(path)


@pytest.mark.parametrize("number", [2, 0, True, 1.0, "1", None])
def test_another_format(number, path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))
    with pytest.raises(ValueError, match=f"has format {number!r} and this version reads 1; finish"):
        stream(path)


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"journal .* cannot be read \(Is a directory\); give the"):
        stream(tmp_path)
    with pytest.raises(ValueError, match=r"journal .* lies in no folder; create .*missing or give"):
        stream(tmp_path / "missing" / "journal")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="lies in no folder"):
        stream(tmp_path / "file" / "journal")
    with pytest.raises(TypeError, match="journal is 3; it must be the path of a file"):
        stream(3)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_a_file_of_another_user(path):
    path.chmod(0)
    with pytest.raises(ValueError, match=r"journal .* cannot be read \(Permission denied\); give"):
        stream(path)


def test_a_sink_with_state_and_one_without_are_two_calls(path, tmp_path):
    with pytest.raises(ValueError, match="another call: sink_has_state was True and is False"):
        stream(path, lambda *_: None)
    stream(tmp_path / "other", lambda *_: None)
    with pytest.raises(ValueError, match="another call: sink_has_state was False and is True"):
        stream(tmp_path / "other")


def deep():
    state = []
    for _ in range(100_000):
        state = [state]
    return state


def circular():
    state = {}
    state["itself"] = state
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: torch.ones(1), "returned Tensor that JSON cannot hold .*; return numbers"),
        (lambda: {1: 2}, r"dict that JSON cannot hold \(the key 1 of a dict is no string\)"),
        (lambda: {"a": [{None: 2}]}, r"\(the key None of a dict is no string\)"),
        (lambda: {"a": {1, 2}}, "returned dict that JSON cannot hold"),
        (circular, "returned dict that JSON cannot hold"),
        (deep, "returned list that JSON cannot hold"),
    ],
    ids=["tensor", "integer key", "None as key", "set", "circular", "deep"],
)
def test_a_state_that_would_come_back_as_another_one(state, message, tmp_path):
    class Sink(CountingSink):
        def state_dict(self):
            return state()

    def source(start, stop):
        return (torch.ones(1, stop - start, 2, 4),) * 3

    with pytest.raises(TypeError, match=message):
        dilated_attention_streamed(
            source, Sink(), PATTERN, seq_len=SEQ_LEN, journal=tmp_path / "journal"
        )
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("state", [None, True, 0, -1.5, "é\n", [1, [2.5]], {"a": {"b": []}}])
def test_any_state_of_json_comes_back(state, tmp_path):
    class Sink(CountingSink):
        loaded = ()

        def state_dict(self):
            return state

        def load_state_dict(self, state):
            self.loaded += (state,)

    for _ in range(2):
        sink = Sink()
        stream(tmp_path / "journal", sink)
    assert sink.loaded == (state,)
    assert type(sink.loaded[0]) is type(state)
