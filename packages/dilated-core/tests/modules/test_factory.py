"""Factory names build the documented modules, and other packages can add names."""

import copy
import re
import sys
from importlib.metadata import EntryPoints, entry_points

import pytest
import torch
from dilated_core import (
    DilatedAttention,
    DilatedAttentionConfig,
    DilatedPattern,
    MultiheadConfig,
    MultiheadDilatedAttention,
    create_dilated_attention,
    create_multihead_dilated_attention,
    reference_dilated_attention,
)
from dilated_core.modules import factory
from dilated_core.testing import relative_error

PLUGIN = """
from dilated_core import AttentionVariant, DilatedAttention, MultiheadDilatedAttention


class Backwards(DilatedAttention):
    def forward(self, q, k, v, is_causal=False):
        return super().forward(q.flip(1), k.flip(1), v.flip(1), is_causal).flip(1)


def multihead(*, ring_size=1, **options):
    module = MultiheadDilatedAttention(**options)
    module.ring_size = ring_size
    return module


variant = AttentionVariant(attention=Backwards, multihead=multihead)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed distribution that adds names to the group `dilated.attention`."""
    (tmp_path / "factory_plugin.py").write_text(PLUGIN)
    info = tmp_path / "factory_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: factory-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dilated.attention]\n"
        "plugin = factory_plugin:variant\n"
        "standard = factory_plugin:variant\n"
        "no_module = factory_plugin_that_is_missing:variant\n"
        "no_attribute = factory_plugin:nothing\n"
        "no_variant = factory_plugin:multihead\n"
        "no_library = factory_plugin_that_fails:variant\n"
    )
    (tmp_path / "factory_plugin_that_fails.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("factory_plugin", None)


def test_names_of_other_packages(plugin):
    q, k, v = torch.randn(3, 1, 20, 2, 4).unbind()
    attention = create_dilated_attention("plugin", segment_lengths=[8], dilation_rates=[2])
    expected = DilatedAttention([8], [2])(*(x.flip(1) for x in (q, k, v))).flip(1)
    assert torch.equal(attention(q, k, v), expected)
    mha = create_multihead_dilated_attention(
        "plugin", embed_dim=8, num_heads=2, segment_lengths=[8], dilation_rates=[1], ring_size=8
    )
    assert (mha.ring_size, mha.num_heads) == (8, 2)
    # No package can change what the names of this one mean.
    assert type(create_dilated_attention("standard")) is DilatedAttention


def test_packages_that_cannot_be_used_say_why(plugin):
    for name, message in (
        (
            "no_module",
            "'no_module' is installed but cannot be loaded: ModuleNotFoundError: No modu",
        ),
        (
            "no_attribute",
            "'no_attribute' is installed but cannot be loaded: AttributeError: .*noth",
        ),
        (
            "no_variant",
            "'no_variant' is .* factory_plugin:multihead is a function; it must be a di",
        ),
        ("no_library", "'no_library' is .* cannot be loaded: OSError: undefined symbol"),
        (
            "best",
            "'best' is unknown; it must be one of 'auto', .*'no_module'.*'plugin', .*'standard'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            create_multihead_dilated_attention(name)


def test_documented_multihead_call():
    """With every argument of the call that the earlier library documents, on the CPU."""
    mha = create_multihead_dilated_attention(
        "auto",
        embed_dim=48,
        num_heads=12,
        segment_lengths=[16, 32, 64],
        dilation_rates=[1, 2, 4],
        dropout=0.1,
        device="cpu",
        dtype=torch.bfloat16,
    )
    assert isinstance(mha, MultiheadDilatedAttention)
    assert mha.attention.config.dropout == 0.1
    x = torch.randn(1, 100, 48, dtype=torch.bfloat16)
    y = mha(x, x, x, is_causal=True)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("kind", ["auto", "standard", "improved"])
def test_documented_attention_call(kind):
    attention = create_dilated_attention(
        kind, segment_lengths=[16, 32, 64], dilation_rates=[1, 2, 4], dropout=0.0
    )
    q, k, v = torch.randn(3, 1, 64, 8, 8).unbind()
    expected = reference_dilated_attention(q, k, v, DilatedPattern([16, 32, 64], [1, 2, 4]))
    assert relative_error(attention(q, k, v, is_causal=False), expected) < 1e-6


def test_configs_stay_as_they_are_and_keywords_win():
    attention = DilatedAttentionConfig(segment_lengths=[8], dilation_rates=[1], dropout=0.1)
    multihead = MultiheadConfig(embed_dim=48, num_heads=12, layer_norm=False, gamma_init=2.0)
    before = copy.deepcopy((attention, multihead))
    mha = create_multihead_dilated_attention(
        "improved",
        multihead_config=multihead,
        attention_config=attention,
        dropout=0.0,
        layer_norm=True,
        bias=False,
    )
    # Keywords win even where they say what the default says.
    assert (mha.attention.config.dropout, mha.config.layer_norm, mha.config.bias) == (
        0,
        True,
        False,
    )
    assert (mha.embed_dim, mha.config.gamma_init) == (48, 2.0)
    assert mha.attention.pattern == DilatedPattern([8], [1])
    assert (attention, multihead) == before


def test_configs_of_another_class_are_refused():
    with pytest.raises(
        TypeError, match="attention_config is a dict; it must be a DilatedAttention"
    ):
        create_dilated_attention(attention_config={"dropout": 0.1})
    with pytest.raises(
        TypeError, match="multihead_config is a DilatedAttentionConfig; it must be "
    ):
        create_multihead_dilated_attention(multihead_config=DilatedAttentionConfig())
    with pytest.raises(TypeError, match="attention_config is a list"):
        create_dilated_attention(attention_config=[])


def test_lengths_and_rates_are_named():
    # Published code has both orders, so neither may be meant by position.
    with pytest.raises(TypeError, match="positional"):
        MultiheadDilatedAttention(8, 2, [1], [8])


def create_optimal_attention(seq_len, num_gpus=1):
    """What users of the earlier library were told to write: a name by length."""
    if seq_len > 100_000:
        kind = "ring"
    elif seq_len > 50_000 and num_gpus > 1:
        kind = "distributed"
    else:
        kind = "auto"
    return create_multihead_dilated_attention(
        kind,
        embed_dim=768,
        num_heads=12,
        segment_lengths=[2048, 4096, 8192],
        dilation_rates=[1, 2, 4],
    )


def test_a_users_own_choice_by_length():
    assert isinstance(create_optimal_attention(8192), MultiheadDilatedAttention)
    assert isinstance(create_optimal_attention(60_000), MultiheadDilatedAttention)
    for seq_len, num_gpus, name in ((60_000, 8, "distributed"), (200_000, 1, "ring")):
        if entry_points(group="dilated.attention", name=name):
            continue  # the package is here, and tests its name itself
        message = f"attention '{name}' is not installed; it comes with the package dilated-ring."
        with pytest.raises(ValueError, match=message):
            create_optimal_attention(seq_len, num_gpus)


def test_a_name_that_the_installed_package_does_not_have(monkeypatch):
    monkeypatch.setattr(factory, "version", lambda package: "0.1.0")
    monkeypatch.setattr(factory, "entry_points", lambda **_: EntryPoints())
    message = "attention 'ring_block_sparse' is not part of the installed dilated-ring 0.1.0."
    with pytest.raises(ValueError, match=re.escape(message)):
        create_dilated_attention("ring_block_sparse")
