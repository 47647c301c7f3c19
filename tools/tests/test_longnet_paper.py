"""The experiments on the LongNet paper measure what they say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention
from torch import nn
from torch.nn.functional import one_hot, scaled_dot_product_attention

from tools.packages import ROOT


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The scripts of benchmarks/ import each other by their plain names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def tensors(*shape, count=4):
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("seq_len", [64, 96, 256])
def test_masked_attention_is_attention_with_the_mask(seq_len):
    from longnet_paper.attention import MaskedAttention, blockwise_causal, fixed_sparse

    def mask(length):
        return blockwise_causal(length, 128) & fixed_sparse(length, 32, 5)

    q, k, v, dout = tensors(2, seq_len, 3, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = MaskedAttention(mask)(*leaves)
    heads_first = [x.transpose(1, 2) for x in leaves]
    expected = scaled_dot_product_attention(*heads_first, attn_mask=mask(seq_len)).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout)
    )


def test_fixed_sparse_has_the_own_block_and_the_ends_of_the_blocks_before():
    from longnet_paper.attention import columns_for, fixed_sparse

    mask = fixed_sparse(12, 4, 1)
    assert [i for i in range(12) if mask[9, i]] == [3, 7, 8, 9]
    assert [i for i in range(12) if mask[3, i]] == [0, 1, 2, 3]
    columns = columns_for(60.0, 512, 64)
    means = [float(fixed_sparse(512, 64, c).sum() / 512) for c in range(1, 65)]
    assert abs(means[columns - 1] - 60) == min(abs(mean - 60) for mean in means)


def test_blockwise_attention_has_no_distance_of_the_window_or_more():
    from longnet_paper.attention import blockwise_causal

    mask = blockwise_causal(96, 32)
    query, key = torch.nonzero(mask).T
    assert int((query - key).max()) == 31
    assert int((query - key).min()) == 0
    assert int(mask[32:].sum(1).min()) == 17  # at the start of a block, the block before
    assert torch.equal(blockwise_causal(32, 32), torch.ones(32, 32).tril().bool())


def test_detached_mixing_has_the_same_forward_and_the_gradient_at_constant_weights():
    from longnet_paper.attention import DetachedMixing

    pattern = DilatedPattern([8, 16, 32], [1, 2, 4])
    q, k, v, dout = tensors(2, 32, 4, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = DetachedMixing(pattern)(*leaves, is_causal=True)
    exact = dilated_attention(*leaves, pattern, is_causal=True)
    torch.testing.assert_close(out, exact)
    detached, true = (torch.autograd.grad(x, leaves, dout) for x in (out, exact))
    torch.testing.assert_close(detached[2], true[2])  # out is linear in v at any fixed weights
    for i in (0, 1):
        assert float((detached[i] - true[i]).norm() / true[i].norm()) > 0.05
    single = DilatedPattern([8], [1])
    one = DetachedMixing(single)(*leaves, is_causal=True)
    torch.testing.assert_close(
        torch.autograd.grad(one, leaves, dout),
        torch.autograd.grad(dilated_attention(*leaves, single, is_causal=True), leaves, dout),
    )


@pytest.mark.parametrize("scale", [1, 2, 16])
def test_sizes_are_a_share_of_the_papers(scale):
    from longnet_paper.sizes import Size

    size = Size(scale)
    assert size.long[-1] == 32768 * scale // 16
    assert size.scored == (128 * scale, 512 * scale, 2048 * scale)
    pattern = size.pattern(size.long[-1])
    assert len(pattern.branches) == 5
    assert max(pattern.dilation_rates) <= size.num_heads  # no position without a head
    assert size.pattern(size.long[0]).segment_lengths[-1] == size.long[0]
    assert all(size.tokens_per_step % length == 0 for length in (size.short, *size.long))


def test_a_scale_out_of_range_is_refused():
    from longnet_paper.sizes import Size

    with pytest.raises(ValueError, match="scale is 17; it must be from 1 to 16"):
        Size(17)


def test_batches_hold_the_same_number_of_bytes_from_one_file_each():
    from longnet_paper.sizes import Size
    from longnet_paper.text import Text

    text = Text(Size())
    for seq_len in (128, 2048):
        for step in (0, 149):  # copies, plain
            inputs, targets = text.batch(seq_len, step, seed=0)
            assert inputs.shape == targets.shape == (2048 // seq_len, seq_len)
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
    again, _ = text.batch(2048, 149, seed=0)
    assert torch.equal(again, inputs)
    window = bytes(inputs[0].tolist())
    starts = text.training.document_starts(0, len(text.training))
    place = text.training.text_of(0, len(text.training)).find(window)
    assert place >= 0
    assert not [s for s in starts if place < s < place + len(window)]


class Copier(nn.Module):
    """Predicts the token one distance back, for distances of some residues only."""

    def __init__(self, residues):
        super().__init__()
        self.residues = residues
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        distance = next(
            d for d in range(1, tokens.shape[1]) if torch.equal(tokens[:, d:], tokens[:, :-d])
        )
        guess = tokens.roll(distance - 1, 1)
        if (distance - 1) % 4 not in self.residues:
            guess = torch.full_like(guess, -1).clamp_min(0)
        return one_hot(guess, int(tokens.max()) + 1).float()


def test_copy_accuracy_is_counted_by_the_residue_of_the_distance():
    from longnet_paper import strided

    rows = strided.copy_accuracy(Copier({0}))
    assert {row["residue"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        assert row["total"] > 0
        share = row["right"] / row["total"]
        assert share == 1 if row["residue"] == 0 else share < 0.3


@pytest.mark.parametrize("name", ["shifted layers", "local window", "LongNet, far copies only"])
def test_strided_contenders_train(name, monkeypatch):
    from longnet_paper import strided
    from longnet_paper.sizes import Size

    monkeypatch.setattr(strided, "STEPS", 2)
    monkeypatch.setattr(strided, "BATCH_SIZE", 1)
    monkeypatch.setattr(strided, "DISTANCES", ((8, 11),))
    row = strided.measure(name, 0, Size())
    assert row["steps"] == 2
    assert row["tokens"] == 2 * strided.SEQ_LEN


def test_far_copies_repeat_behind_every_segment_of_rate_one():
    from longnet_paper import strided

    tokens, _ = strided.copies(0, 0, strided.FAR)
    assert strided.FAR[0] >= strided.SEGMENT
    for row in tokens:
        distances = range(1, strided.FAR[1] + 1)  # twice the distance matches, too
        matches = {d: float((row[d:] == row[:-d]).float().mean()) for d in distances}
        best = max(distances, key=matches.__getitem__)
        assert best >= strided.FAR[0]
        assert matches[best] > 0.6


@pytest.mark.parametrize("name", ["dense, 32", "fixed-sparse, 256", "detached, 256"])
def test_quality_of_every_kind_is_measured(name, monkeypatch):
    from longnet_paper import quality, sizes

    monkeypatch.setattr(sizes, "PAPER_SEGMENTS", (512, 1024, 2048, 3072, 4096))
    monkeypatch.setattr(sizes.Size, "steps", 2)
    monkeypatch.setattr(quality, "TARGETS", 512)
    row = quality.measure(name, 0, sizes.Size())
    assert [part["window"] for part in row["by_window"]] == [32, 128, 256]
    assert all(1 < part["bits_per_byte"] < 20 for part in row["by_window"])
    assert [part["context"] for part in row["by_context"]][-1] == 256
    assert ("gradient_error" in row) == (row["kind"] == "detached")
    if row["kind"] == "detached":
        assert row["gradient_error"]["before"]["queries"] > 0.01


def test_fixed_sparse_has_about_as_many_keys_as_longnet():
    from longnet_paper import quality
    from longnet_paper.sizes import Size

    size = Size()
    for seq_len in size.long:
        keys = [
            quality.build(kind, seq_len, size, seed=0)[1]["mean_keys"]
            for kind in ("fixed-sparse", "LongNet")
        ]
        assert keys[0] == pytest.approx(keys[1], rel=0.05)


def test_the_loss_of_windows_is_that_of_their_targets():
    from longnet_paper import quality

    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 256)

    tokens = torch.zeros(3, 257, dtype=torch.int64)
    assert quality.score(Uniform(), tokens, 64) == pytest.approx(8)


def test_a_stopped_command_goes_on_with_what_has_no_row(monkeypatch, tmp_path):
    import reproduce_longnet
    from longnet_paper import strided
    from longnet_paper.sizes import Size

    done = []

    def measure(name, seed, size, device):
        done.append((name, seed))
        return {"contender": name, "seed": seed}

    def run(command, check):
        seed, folder = (command[command.index(option) + 1] for option in ("--seeds", "--rows"))
        reproduce_longnet.run_seed("strided", int(seed), Size(), "cpu", Path(folder))

    state = {"commit": "abc", "uncommitted_changes": False}
    monkeypatch.setattr(strided, "measure", measure)
    monkeypatch.setattr(reproduce_longnet, "environment", lambda: state)
    monkeypatch.setattr(reproduce_longnet, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(reproduce_longnet, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce_longnet, "RESULTS", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    reproduce_longnet.run_part("strided", Size(), "cpu", [0, 1])
    expected = [(name, seed) for seed in (0, 1) for name in strided.CONTENDERS]
    assert done == expected
    rows = json.loads((tmp_path / "longnet_paper_strided.json").read_text())["rows"]
    assert [(row["contender"], row["seed"]) for row in rows] == expected
    (tmp_path / "runs" / "longnet_paper" / "abc-scale-1" / "strided" / "dense-1.json").unlink()
    done.clear()
    reproduce_longnet.run_part("strided", Size(), "cpu", [0, 1])
    assert done == [("dense", 1)]
    state["uncommitted_changes"] = True
    with pytest.raises(SystemExit, match="uncommitted changes"):
        reproduce_longnet.run_part("strided", Size(), "cpu", [0, 1])


def test_latency_has_a_row_for_each_length(monkeypatch):
    from longnet_paper import latency
    from longnet_paper.sizes import Size

    monkeypatch.setattr(latency, "total_tokens", lambda size: 2048)
    monkeypatch.setattr(latency, "SHORTEST", 512)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "LONGEST_DENSE_S", 0.0)
    threads = torch.get_num_threads()
    rows = latency.measure_all(Size())
    torch.set_num_threads(threads)
    assert [(row["batch_size"], row["seq_len"]) for row in rows] == [(4, 512), (1, 2048)]
    first, second = (row["dense"] for row in rows)
    assert second["extrapolated"]
    assert not first["extrapolated"]
    assert second["best_cpu_s"] == pytest.approx(4 * first["best_cpu_s"])
