"""Streaming is right for any strides, numbers of any size and any default device."""

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    MappedTensor,
    dilated_attention_streamed,
    reference_dilated_attention,
    tensor_sink,
    tensor_source,
)
from dilated_core.streaming.stream import default_chunk_length
from dilated_core.testing import relative_error

UNEVEN = DilatedPattern([10, 24, 60], [1, 2, 3], head_offsets="blocked", padding="attended")
S, H, D = 100, 4, 6


class Index:
    """An integer of another library, as numpy's are."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def streamed(q, k, v, pattern=UNEVEN, **options):
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    dilated_attention_streamed(
        tensor_source(q, k, v), tensor_sink(out), pattern, seq_len=q.shape[1], **options
    )
    return out


def random_qkv():
    return torch.randn(3, 2, S, H, D, dtype=torch.float64).unbind()


@pytest.mark.parametrize("n", [2**63, 2**100])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "attended"])
@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
def test_huge_lengths_and_rates(n, is_causal, padding, head_offsets):
    q, k, v = random_qkv()
    options = {"padding": padding, "head_offsets": head_offsets}
    pattern, same = (
        DilatedPattern([m, 7, m, m, 30], [1, m, m, 3, m - 1], **options) for m in (n, S + 2)
    )
    for chunk_length in (33, None):
        out = streamed(q, k, v, pattern, is_causal=is_causal, chunk_length=chunk_length)
        exact = reference_dilated_attention(q, k, v, same, is_causal=is_causal)
        assert relative_error(out, exact) < 1e-12


LAYOUTS = {
    "heads first": lambda: torch.randn(2, H, S, D).double().transpose(1, 2),
    "reversed dimensions": lambda: torch.randn(D, H, S, 2).double().permute(3, 2, 1, 0),
    "every third position": lambda: torch.randn(2, 3 * S, H, D).double()[:, ::3],
    "one batch row for all": lambda: torch.randn(1, S, H, D).double().expand(2, S, H, D),
    "one head for all": lambda: torch.randn(2, S, 1, D).double().expand(2, S, H, D),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_length", [17, 120])
def test_a_source_of_any_strides(layout, chunk_length):
    q, k, v = (LAYOUTS[layout]() for _ in "qkv")
    out = streamed(q, k, v, chunk_length=chunk_length)
    assert relative_error(out, reference_dilated_attention(q, k, v, UNEVEN)) < 1e-12


def test_a_sink_of_any_strides():
    q, k, v = random_qkv()
    out = torch.full((D, H, S, 2), float("nan"), dtype=torch.float64).permute(3, 2, 1, 0)
    dilated_attention_streamed(
        tensor_source(q, k, v), tensor_sink(out), UNEVEN, seq_len=S, chunk_length=17
    )
    assert torch.equal(out, streamed(q, k, v, chunk_length=17))


@pytest.fixture
def meta_by_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_the_tensors_decide_on_the_device(meta_by_default, tmp_path):
    options = {"seq_len": S, "chunk_length": 17, "backend": "eager"}
    q, k, v = torch.randn(3, 2, S, H, D, dtype=torch.float64, device="cpu").unbind()
    out = torch.full_like(q, float("nan"))
    dilated_attention_streamed(tensor_source(q, k, v), tensor_sink(out), UNEVEN, **options)
    assert relative_error(out, reference_dilated_attention(q, k, v, UNEVEN)) < 1e-12
    file = MappedTensor(tmp_path / "out", q.shape, q.dtype, mode="w")
    dilated_attention_streamed(tensor_source(q, k, v), tensor_sink(file), UNEVEN, **options)
    assert torch.equal(file.rows(0, S), out)


def test_an_empty_batch_is_streamed():
    q = k = v = torch.ones(0, S, H, D)
    assert streamed(q, k, v).shape == q.shape
    assert default_chunk_length(UNEVEN, S, 0) >= S


def test_integers_of_other_libraries(tmp_path):
    q, k, v = random_qkv()
    out = torch.empty_like(q)
    options = {"seq_len": Index(S), "chunk_length": Index(17), "journal": tmp_path / "journal"}
    dilated_attention_streamed(tensor_source(q, k, v), tensor_sink(out), UNEVEN, **options)
    assert torch.equal(out, streamed(q, k, v, chunk_length=17))
    file = MappedTensor(tmp_path / "x", [Index(n) for n in q.shape], q.dtype, mode="w")
    assert file.rows(Index(1), Index(3)).shape == (2, 2, H, D)


@pytest.mark.parametrize("value", ["False", None, 0, 1])
def test_a_bool_is_a_bool(value):
    with pytest.raises(TypeError, match=f"is_causal is {value!r}; it must be True or False"):
        streamed(*random_qkv(), is_causal=value)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "q is a list; it must be a tensor or a dilated_core.MappedTensor",
         lambda path: tensor_source([1], torch.ones(1), torch.ones(1))),
        (TypeError, "out is a str; it must be a tensor or a", lambda path: tensor_sink("out")),
        (TypeError, r"shape\[2\] is 2.0; it must be an integer",
         lambda path: MappedTensor(path / "x", (1, 2, 2.0, 4), torch.float32)),
        (ValueError, r"shape\[0\] is 0; it must be at least 1",
         lambda path: MappedTensor(path / "x", (0, 2, 2, 4), torch.float32)),
        (TypeError, "dtype is 'float32'; it must be a dtype of torch, such as torch.float32",
         lambda path: MappedTensor(path / "x", (1, 2, 2, 4), "float32")),
        (ValueError, "is a folder; give the path of a file",
         lambda path: MappedTensor(path, (1, 2, 2, 4), torch.float32, mode="w")),
        (TypeError, "start is 0.0; it must be an integer",
         lambda path: MappedTensor(path / "y", (1, 2, 2, 4), torch.float32, mode="w").rows(0.0, 1)),
    ],
)  # fmt: skip
def test_mistakes(error, message, call, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)
