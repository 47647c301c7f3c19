"""Each option is declared once: constructors take config objects or the options of these."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from dilated_core import (
    DilatedAttention,
    DilatedAttentionConfig,
    DynamicDilatedAttention,
    DynamicDilatedAttentionConfig,
    MultiheadConfig,
    MultiheadDilatedAttention,
    create_dilated_attention,
    create_multihead_dilated_attention,
)
from dilated_core.modules.options import from_options

BRANCHES = {"segment_lengths": (8, 32), "dilation_rates": (1, 4)}
# Of every option, a value other than the default.
ATTENTION = {
    "head_offsets": "blocked",
    "padding": "attended",
    "scale": 0.3,
    "dropout": 0.1,
    "head_range": (2, 8),
    "max_workspace_bytes": 10**9,
    "backend": "eager",
}
DYNAMIC = {
    "first_segment_length": 16,
    "growth": 3,
    "keep_every_position": True,
    "memory_budget": 10**9,
}
MULTIHEAD = {
    "embed_dim": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "bias": False,
    "layer_norm": False,
    "layer_norm_eps": 1e-3,
    "gamma_init": 2.0,
    "device": "cpu",
    "dtype": torch.float64,
}


def test_modules_have_the_options_of_their_configs():
    attention = DilatedAttentionConfig(**BRANCHES, **ATTENTION)
    dynamic = DynamicDilatedAttentionConfig(**DYNAMIC, **ATTENTION)
    multihead = MultiheadConfig(**MULTIHEAD)
    for config in (attention, dynamic, multihead):
        for field in dataclasses.fields(config):
            assert getattr(config, field.name) != field.default, field.name
    assert DilatedAttention(**BRANCHES, **ATTENTION).config == attention
    assert DilatedAttention((8, 32), (1, 4), **ATTENTION).config == attention
    assert DynamicDilatedAttention(**DYNAMIC, **ATTENTION).config == dynamic
    for mha in (
        MultiheadDilatedAttention(**MULTIHEAD, **BRANCHES, **ATTENTION),
        create_multihead_dilated_attention(**MULTIHEAD, **BRANCHES, **ATTENTION),
        MultiheadDilatedAttention(
            24, 4, **{n: x for n, x in MULTIHEAD.items() if n[-4:] not in ("_dim", "eads")},
            num_kv_heads=2, **BRANCHES, **ATTENTION,
        ),
    ):  # fmt: skip
        assert (mha.config, mha.attention.config) == (multihead, attention)


def test_constructors_take_config_objects():
    attention = DilatedAttentionConfig(**BRANCHES, **ATTENTION)
    multihead = MultiheadConfig(**MULTIHEAD)
    assert DilatedAttention(attention).config is attention
    assert DilatedAttention(config=attention).config is attention
    dynamic = DynamicDilatedAttentionConfig(**DYNAMIC)
    assert DynamicDilatedAttention(dynamic).config is dynamic
    for mha in (
        MultiheadDilatedAttention(multihead, attention),
        MultiheadDilatedAttention(multihead, attention_config=attention),
        MultiheadDilatedAttention(attention_config=attention, multihead_config=multihead),
    ):
        assert mha.config is multihead
        assert mha.attention.config is attention


def test_subclasses_inherit_both_forms():
    class Wider(MultiheadDilatedAttention):
        pass

    class Narrower(DilatedAttention):
        def __init__(self, *, width, **options):
            super().__init__(**options)
            self.width = width

    assert Wider(24, 4, **BRANCHES).attention.config == Narrower(width=1, **BRANCHES).config
    assert Wider(MultiheadConfig(**MULTIHEAD), DilatedAttentionConfig()).embed_dim == 24
    with pytest.raises(TypeError, match=r"^Wider has no argument 'heads'; it is called num_heads"):
        Wider(24, heads=4, **BRANCHES)


def test_keyword_only_parameters_go_with_either_form():
    class Placed:
        @from_options(_PlacedArguments, elsewhere={}, config=DilatedAttentionConfig)
        def __init__(self, config, *, device="here"):
            self.config, self.device = config, device

    config = DilatedAttentionConfig(**BRANCHES)
    for placed in (Placed(config, device="there"), Placed(**BRANCHES, device="there")):
        assert (placed.config, placed.device) == (config, "there")
    assert Placed(config).device == Placed(**BRANCHES).device == "here"
    with pytest.raises(TypeError, match=r"no argument 'scale'; it belongs in config: .*replace"):
        Placed(config, device="there", scale=1.0)
    with pytest.raises(TypeError, match="no argument 'devise'; its arguments are device,"):
        Placed(**BRANCHES, devise="there")


@dataclasses.dataclass(frozen=True)
class _PlacedArguments(DilatedAttentionConfig):
    device: str = "here"


def test_signatures_show_every_option():
    """What help() and docs/api print."""
    for module, configs, required in (
        (DilatedAttention, [DilatedAttentionConfig], ["segment_lengths", "dilation_rates"]),
        (DynamicDilatedAttention, [DynamicDilatedAttentionConfig], []),
        (
            MultiheadDilatedAttention,
            [MultiheadConfig, DilatedAttentionConfig],
            ["embed_dim", "num_heads", "segment_lengths", "dilation_rates"],
        ),
    ):
        shown = inspect.signature(module).parameters
        fields = {field.name: field for config in configs for field in dataclasses.fields(config)}
        assert shown.keys() == fields.keys()
        for name, parameter in shown.items():
            assert parameter.annotation == fields[name].type
            if name in required:
                assert parameter.default is inspect.Parameter.empty
            else:
                assert parameter.default == fields[name].default


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: DilatedAttention([8], [1], causal=True),
            "DilatedAttention has no argument 'causal'; it is called is_causal, and is passed to f",
        ),
        (
            lambda: DilatedAttentionConfig(is_causal=True),
            "DilatedAttentionConfig has no argument 'is_causal'; it is passed to forward.",
        ),
        (
            lambda: create_dilated_attention("auto", softmax_scale=1.0),
            "DilatedAttention has no argument 'softmax_scale'; it is called scale.",
        ),
        (
            lambda: create_multihead_dilated_attention("improved", attn_dropout=0.1),
            "MultiheadDilatedAttention has no argument 'attn_dropout'; it is called dropout.",
        ),
        (
            lambda: MultiheadDilatedAttention(24, 4, segment_length=[8], dilation_rate=[1]),
            "MultiheadDilatedAttention has no argument 'segment_length'; it is called segment_len",
        ),
        (
            lambda: MultiheadDilatedAttention(dim=24, heads=4, **BRANCHES),
            "MultiheadDilatedAttention has no argument 'dim'; it is called embed_dim.",
        ),
        (
            lambda: MultiheadConfig(heads=4),
            "MultiheadConfig has no argument 'heads'; it is called num_heads.",
        ),
        (
            lambda: MultiheadDilatedAttention(24, 4, batch_first=True, **BRANCHES),
            "MultiheadDilatedAttention has no argument 'batch_first'; it is always true, since",
        ),
        (
            lambda: DynamicDilatedAttention(segment_lengths=[8]),
            "DynamicDilatedAttention has no argument 'segment_lengths'; it follows the length of",
        ),
        (
            lambda: create_dilated_attention("auto", lengths=[4]),
            "DilatedAttention has no argument 'lengths'; its arguments are segment_lengths, dilat",
        ),
        (
            lambda: DilatedAttention(DilatedAttentionConfig(), sm_scale=1.0),
            "DilatedAttention has no argument 'sm_scale'; it is called scale, and belongs in confi",
        ),
        (
            lambda: DilatedAttention([8], [1])(1, 2, 3, causal=True),
            "DilatedAttention.forward has no argument 'causal'; it is called is_causal.",
        ),
        (
            lambda: DynamicDilatedAttention()(1, 2, 3, dropout_p=0.1),
            "DynamicDilatedAttention.forward has no argument 'dropout_p'; it is called dropout, an",
        ),
        (
            lambda: MultiheadDilatedAttention(24, 4, **BRANCHES)(1, 2, 3, causal=True),
            "MultiheadDilatedAttention.forward has no argument 'causal'; it is called is_causal.",
        ),
        (
            lambda: MultiheadDilatedAttention(24, 4, **BRANCHES)(
                1, 2, 3, average_attn_weights=True
            ),
            "MultiheadDilatedAttention.forward has no argument 'average_attn_weights'; its argum",
        ),
        (lambda: DilatedAttention([8]), "DilatedAttention: missing a required argument: 'dilation"),
        (
            lambda: DilatedAttention([8], [1], 0.5),
            "too many positional arguments; its arguments ar",
        ),
        (
            lambda: MultiheadDilatedAttention(MultiheadConfig()),
            "missing a required argument: 'attention_config'; its arguments are (multihead_config,",
        ),
        (
            lambda: MultiheadDilatedAttention(DilatedAttentionConfig(), MultiheadConfig()),
            "multihead_config is a DilatedAttentionConfig; it must be a MultiheadConfig.",
        ),
        (lambda: DilatedAttention(config={"scale": 1}), "config is a dict; it must be a DilatedAt"),
    ],
)
def test_names_that_are_not_arguments(build, message):
    with pytest.raises(TypeError) as caught:
        build()
    assert message in str(caught.value)


def test_configs_are_immutable_values():
    config = DilatedAttentionConfig(segment_lengths=[4], dilation_rates=[1])
    with pytest.raises(AttributeError):
        config.scale = 1.0
    assert config == DilatedAttentionConfig(segment_lengths=(4,), dilation_rates=(1,))
    assert hash(config) == hash(copy.deepcopy(config))
    with pytest.raises(ValueError, match=r"segment_lengths\[0\] is 0"):
        DilatedAttentionConfig(segment_lengths=[0], dilation_rates=[1])


def test_configs_hold_plain_numbers():
    """Numbers of numpy become Python's, which pickle, JSON and `repr` show as they are."""
    numpy = pytest.importorskip("numpy")
    config = MultiheadConfig(
        embed_dim=numpy.int64(24), num_heads=numpy.int32(4), num_kv_heads=numpy.int8(2)
    )
    assert {type(x) for x in (config.embed_dim, config.num_heads, config.num_kv_heads)} == {int}
    attention = DilatedAttentionConfig(segment_lengths=numpy.array([8]), dilation_rates=[1])
    assert pickle.loads(pickle.dumps(attention)) == attention
    assert type(attention.segment_lengths[0]) is int
    assert dataclasses.replace(attention, dropout=0.5).segment_lengths == (8,)
