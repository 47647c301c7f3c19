"""Files, plots and FlexAttention masks of patterns."""

import sys
from pathlib import Path

import pytest
import torch
from dilated_sparse import BlockPattern, dilated_sparse, global_local, local_window
from torch.nn.attention.flex_attention import flex_attention

PATTERN = BlockPattern.per_head(
    [global_local(6, window=1, num_global=1), dilated_sparse(6, sparsity_ratio=0.5)]
)


def test_files_hold_the_pattern(tmp_path: Path) -> None:
    PATTERN.save(tmp_path / "pattern.safetensors")
    assert BlockPattern.load(tmp_path / "pattern.safetensors") == PATTERN


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"holds \['weight'\]"):
        BlockPattern.load(tmp_path / "a.safetensors")
    lists = {"row_offsets": torch.tensor([0, 1]), "block_indices": torch.tensor([5])}
    save_file(lists, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="block_indices holds 5"):
        BlockPattern.load(tmp_path / "b.safetensors")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"safetensors is needed .*dilated-sparse\[files\]"):
        PATTERN.save(tmp_path / "x")
    with pytest.raises(ImportError, match=r"matplotlib is needed .*dilated-sparse\[plot\]"):
        PATTERN.plot()


def test_plots_show_the_blocks_of_a_head() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = PATTERN.plot(head=1)
    assert torch.equal(torch.from_numpy(ax.images[0].get_array().data), PATTERN.materialize()[1])
    assert PATTERN.plot(ax=ax) is ax
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("S", [24, 22])
def test_flex_masks_keep_the_same_positions(S: int, is_causal: bool) -> None:
    mask = PATTERN.to_block_mask(S, block_size=4, num_heads=4, is_causal=is_causal)
    wide = PATTERN.materialize(num_heads=4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    wide = wide[:, :S, :S].tril() if is_causal else wide[:, :S, :S]
    heads, positions = torch.arange(4)[:, None, None], torch.arange(S)
    assert torch.equal(mask.mask_mod(0, heads, positions[:, None], positions), wide)
    blocks = PATTERN.materialize(num_heads=4)
    assert torch.equal(mask.to_dense()[0].bool(), blocks.tril() if is_causal else blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_runs_the_mask() -> None:
    q, k, v = torch.randn(3, 1, 2, 24, 16).unbind()
    mask = PATTERN.to_block_mask(24, block_size=4, is_causal=True)
    out = flex_attention(q, k, v, block_mask=mask)
    wide = PATTERN.materialize().repeat_interleave(4, 1).repeat_interleave(4, 2).tril()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=wide)
    torch.testing.assert_close(out, dense)


def test_a_mask_for_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 6 blocks; 30 positions in blocks of 4 are 8"):
        PATTERN.to_block_mask(30, block_size=4)
    assert local_window(2, window=0).to_block_mask(5, block_size=4).shape == (1, 1, 5, 5)
