"""Backends are found by name, chosen by rank, and refused with all their reasons."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from dilated_core import (
    AttentionBackend,
    AttentionInputs,
    AttentionOutput,
    DilatedPattern,
    available_backends,
    dilated_attention,
    dilated_attention_with_lse,
    explain_backends,
    ops,
    reference_dilated_attention_with_lse,
    register_backend,
    unregister_backend,
)
from dilated_core.backends import registry
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.sdpa import SdpaBackend

PATTERN = DilatedPattern([4, 8], [1, 2])


class Picky(EagerBackend):
    """Runs heads of 3 only, and would be the first choice."""

    name = "picky"
    priority = 100

    def why_not(self, inputs):
        if inputs.head_dim != 3:
            return [f"head_dim is {inputs.head_dim}; it takes 3.", "The moon is not full."]
        return []


class WholePattern(Picky):
    """Does the whole pattern in one launch."""

    name = "whole"
    calls = ()

    def dilated_forward(self, q, k, v, pattern, options, *, cu_seqlens):
        self.calls += ("forward",)
        out, lse = reference_dilated_attention_with_lse(
            q, k, v, pattern, is_causal=options.is_causal, scale=options.scale,
            key_padding_mask=options.key_padding_mask,
        )  # fmt: skip
        return AttentionOutput(out.to(q.dtype), lse.float())

    def dilated_backward(
        self, dout, dlse, q, k, v, out, lse, pattern, options, *, cu_seqlens
    ):  # fmt: skip
        self.calls += ("backward",)
        text = ops.encode_options(
            pattern, is_causal=options.is_causal, backend="eager", max_workspace_bytes=None
        )
        tensors = (dout, dlse, q, k, v, out, lse)
        others = (None, options.key_padding_mask, None)
        return ops.attention_backward(*tensors, options.scale, 0.0, text, *others)


@pytest.fixture(autouse=True)
def only_core(monkeypatch):
    """Core's backends alone, whatever else is installed here."""
    own = {name: registry._registered[name] for name in ("eager", "sdpa")}
    monkeypatch.setattr(registry, "_registered", own)
    monkeypatch.setattr(registry, "_broken", {})
    monkeypatch.setattr(registry, "_entry_points_read", True)
    registry.forget_choices()
    yield
    registry.forget_choices()


@pytest.fixture
def picky():
    register_backend(Picky())
    yield
    unregister_backend("picky")


def test_own_backends_satisfy_the_protocol():
    assert isinstance(EagerBackend(), AttentionBackend)
    assert isinstance(SdpaBackend(), AttentionBackend)
    assert available_backends()[-2:] == ("sdpa", "eager")


def test_auto_takes_the_first_that_can_run(picky):
    x = torch.randn(1, 8, 2, 4)
    assert available_backends()[0] == "picky"
    # head_dim 4: picky cannot, and auto goes on without a word.
    dilated_attention(x, x, x, PATTERN)
    chosen = [
        registry.choose_backend("auto", AttentionInputs(x.device, x.dtype, 2, head_dim)).name
        for head_dim in (3, 4)
    ]
    assert chosen == ["picky", "sdpa"]


def test_a_named_backend_never_falls_back(picky):
    x = torch.randn(1, 8, 2, 4)
    with pytest.raises(
        ValueError,
        match=r"backend 'picky' cannot run float32 on cpu, 2 heads of 4: head_dim is 4; it takes "
        r"3. The moon is not full. Use backend='auto'",
    ):
        dilated_attention(x, x, x, PATTERN, backend="picky")


def test_explanation_lists_every_backend_and_its_reasons(picky):
    text = explain_backends(head_dim=64)
    assert "picky     cannot run: head_dim is 64; it takes 3. The moon is not full." in text
    assert "sdpa      can run, and is what 'auto' takes" in text
    assert "eager     can run" in text
    assert "triton    not installed: comes with the package dilated-kernels" in text
    assert "picky     can run, and is what 'auto' takes" in explain_backends(head_dim=3)


def test_whole_pattern_backends_are_given_the_whole_pattern():
    backend = WholePattern()
    register_backend(backend)
    try:
        q, k, v = (torch.randn(1, 8, 2, 3, requires_grad=True) for _ in range(3))
        options = {"key_padding_mask": torch.arange(8).remainder(3).eq(1)[None]}
        out, lse = dilated_attention_with_lse(q, k, v, PATTERN, **options, backend="whole")
        expected = dilated_attention_with_lse(q, k, v, PATTERN, **options, backend="eager")
        torch.testing.assert_close((out, lse), tuple(expected))
        dout = torch.randn_like(out)
        got = torch.autograd.grad(out, (q, k, v), dout)
        torch.testing.assert_close(got, torch.autograd.grad(expected.out, (q, k, v), dout))
        assert backend.calls == ("forward", "backward")
    finally:
        unregister_backend("whole")


def test_choices_are_not_remembered_beyond_the_backends_they_were_made_from():
    inputs = AttentionInputs(torch.device("cpu"), torch.float32, 2, 3)
    assert registry.choose_backend("auto", inputs).name == "sdpa"
    register_backend(Picky())
    try:
        assert registry.choose_backend("auto", inputs).name == "picky"
        assert registry.choose_backend("picky", inputs).name == "picky"
    finally:
        unregister_backend("picky")
    assert registry.choose_backend("auto", inputs).name == "sdpa"
    with pytest.raises(ValueError, match="backend is 'picky'; it must be 'auto' or one of"):
        registry.choose_backend("picky", inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_accelerators_run_eager_with_every_option(device, dtype):
    """Devices for which PyTorch has no kernel that returns lse still have a backend."""
    inputs = AttentionInputs(
        torch.device(device), dtype, 8, 64, num_kv_heads=2, dropout_p=0.1,
        has_key_padding_mask=True, is_packed=True, max_workspace_bytes=2**20,
    )  # fmt: skip
    assert registry.choose_backend("auto", inputs).name == "eager"
    assert f"the device is {device}; PyTorch has kernels that return lse for" in explain_backends(
        device=device, dtype=dtype
    )


@pytest.mark.parametrize(
    ("error", "message", "inputs"),
    [
        (TypeError, "dtype is 'float32'; it must be a dtype of torch", {"dtype": "float32"}),
        (TypeError, "num_heads is 2.5; it must be an integer", {"num_heads": 2.5}),
        (ValueError, "head_dim is 0; it must be at least 1", {"head_dim": 0}),
        (TypeError, "unexpected keyword argument 'length'", {"length": 3}),
    ],
)
def test_mistakes_in_inputs_to_explain(error, message, inputs):
    with pytest.raises(error, match=message):
        explain_backends(**inputs)


def test_registration_mistakes(picky):
    with pytest.raises(ValueError, match="backend name 'picky' is taken"):
        register_backend(Picky())
    with pytest.raises(TypeError, match="is no attention backend; it needs name, priority"):
        register_backend(object())
    old = Picky()
    old.name, old.contract = "old", 0
    with pytest.raises(ValueError, match="contract 0, and this dilated-core has 2; update the old"):
        register_backend(old)
    with pytest.raises(ValueError, match="no backend 'old' is registered"):
        unregister_backend("old")


def test_sdpa_says_why_not():
    def reasons(**changes):
        settings = {"device": "cpu", "dtype": torch.float32, "num_heads": 4, "head_dim": 64}
        inputs = settings | changes
        return SdpaBackend().why_not(AttentionInputs(torch.device(inputs.pop("device")), **inputs))

    assert reasons() == []
    assert reasons(device="mps") == [
        "the device is mps; PyTorch has kernels that return lse for cpu and cuda."
    ]
    (reason,) = reasons(dtype=torch.float8_e4m3fn)
    assert reason.startswith("the dtype is float8_e4m3fn; it takes float64, float32")


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected"),
    [
        ((9, 0), torch.bfloat16, 64, []),
        ((7, 5), torch.float16, 64, []),
        ((7, 5), torch.bfloat16, 64, ["the dtype is bfloat16; this GPU is older than compute"]),
        ((6, 0), torch.float32, 12, []),
        ((9, 0), torch.float32, 6, ["head_dim is 6; PyTorch's CUDA kernels need a multiple of 4."]),
        ((9, 0), torch.float16, 12, ["head_dim is 12; PyTorch's CUDA kernels need a multiple of"]),
        ((9, 0), torch.float64, 64, ["the dtype is float64; it takes float32, bfloat16, float16."]),
    ],
)
def test_sdpa_on_other_gpus(monkeypatch, capability, dtype, head_dim, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reasons = SdpaBackend().why_not(AttentionInputs(torch.device("cuda"), dtype, 4, head_dim))
    assert len(reasons) == len(expected)
    assert all(r.startswith(e) for r, e in zip(reasons, expected, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_sdpa_without_a_gpu():
    reasons = SdpaBackend().why_not(AttentionInputs(torch.device("cuda"), torch.float32, 4, 64))
    assert reasons == ["the device is cuda; this PyTorch sees no CUDA device."]


class Choosy(Picky):
    """Ranks itself by the inputs: first for long sequences, by name alone on 13 heads."""

    name = "choosy"

    def why_not(self, inputs):
        return ["The moon is not full."] if inputs.head_dim == 5 else []

    def priority_for(self, inputs):
        if inputs.num_heads == 13:
            return -1, "13 is unlucky"
        if inputs.seq_len is not None and inputs.seq_len >= 1000:
            return 20, "timed on a long evening"
        return 5, "a guess"


class Reluctant(Picky):
    name, priority = "reluctant", -3

    def why_not(self, inputs):
        return []


@pytest.fixture
def choosy():
    register_backend(Choosy())


def chosen(**changes):
    inputs = AttentionInputs(torch.device("cpu"), torch.float32, 8, 64)._replace(**changes)
    return registry.choose_backend("auto", inputs).name


def test_a_backend_may_rank_itself_by_the_inputs(choosy):
    assert [chosen(seq_len=n) for n in (None, 999, 1000)] == ["sdpa", "sdpa", "choosy"]
    assert explain_backends(seq_len=1000).splitlines()[:4] == [
        "for float32 on cpu, 8 heads of 64, 1000 positions:",
        "  choosy    can run, and is what 'auto' takes (rank 20: timed on a long evening)",
        "  sdpa      can run",
        "  eager     can run",
    ]
    assert explain_backends().splitlines()[1:4] == [
        "  sdpa      can run, and is what 'auto' takes",
        "  choosy    can run (rank 5: a guess)",
        "  eager     can run",
    ]
    # The order is that of these inputs for what cannot run, too.
    assert explain_backends(head_dim=5, seq_len=1000).splitlines()[1] == (
        "  choosy    cannot run: The moon is not full."
    )
    assert available_backends() == ("choosy", "sdpa", "eager")  # by the number for all inputs


def test_a_call_tells_its_length(choosy):
    seen = []
    choosy_backend = registry.get_backend("choosy")
    choosy_backend.why_not = lambda inputs: seen.append(inputs.seq_len) or []
    x = torch.randn(2, 8, 2, 4)
    dilated_attention(x, x, x, PATTERN)
    assert seen == []  # sdpa comes first at this length
    x = torch.randn(1, 1200, 2, 4)
    dilated_attention(x, x, x, PATTERN)
    packed = torch.randn(1100, 2, 4)
    cu_seqlens = torch.tensor([0, 1000, 1100], dtype=torch.int32)
    dilated_attention(packed, packed, packed, PATTERN, cu_seqlens=cu_seqlens)
    assert seen == [1200, 1100]


def test_what_ranks_below_zero_is_had_by_name_alone(choosy, monkeypatch):
    assert chosen(num_heads=13, seq_len=1000) == "sdpa"
    explanation = explain_backends(num_heads=13).splitlines()
    assert explanation[1:4] == [
        "  sdpa      can run, and is what 'auto' takes",
        "  eager     can run",
        "  choosy    only by name: 13 is unlucky",
    ]
    inputs = AttentionInputs(torch.device("cpu"), torch.float32, 13, 64)
    assert registry.choose_backend("choosy", inputs).name == "choosy"
    # Not even when nothing else runs.
    for other in (EagerBackend, SdpaBackend):
        monkeypatch.setattr(other, "why_not", lambda self, inputs: ["The sea is rough."])
    with pytest.raises(ValueError, match=r"(?s)no backend can run.*only by name: 13 is unlucky"):
        registry.choose_backend("auto", inputs._replace(seq_len=7))
    # A constant priority below zero means the same.
    unregister_backend("choosy")
    register_backend(Reluctant())
    assert "reluctant only by name: its priority is -3" in explain_backends()


def test_a_ranking_overrules_all_backends_until_it_is_taken_back(choosy):
    def ranking(inputs):
        known = {"eager": (40, "timed here"), "choosy": (30, "timed here")}
        return known if inputs.num_heads == 8 else {}

    assert chosen(seq_len=1000) == "choosy"
    registry.use_ranking(ranking)
    try:
        assert chosen(seq_len=1000) == "eager"
        assert chosen(seq_len=1000, num_heads=4) == "choosy"  # about which it knows nothing
        assert explain_backends().splitlines()[1:4] == [
            "  eager     can run, and is what 'auto' takes (rank 40: timed here)",
            "  choosy    can run (rank 30: timed here)",
            "  sdpa      can run",
        ]
    finally:
        registry.use_ranking(None)
    assert chosen(seq_len=1000) == "choosy"


@pytest.fixture
def unread_registry(monkeypatch):
    """A registry that has not looked for installed packages yet."""
    monkeypatch.setattr(registry, "_entry_points_read", False)


class _Module:
    """Stands for an installed package: what entry points load from."""

    picky = Picky()
    no_backend = 3


def test_entry_points_are_loaded_once_and_may_be_broken(monkeypatch, unread_registry):
    monkeypatch.setitem(sys.modules, "installed_backends", _Module)
    points = [
        EntryPoint("picky", "installed_backends:picky", "dilated.backends"),
        EntryPoint("half", "installed_backends:no_backend", "dilated.backends"),
        EntryPoint("triton", "a_missing_module:backend", "dilated.backends"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert available_backends() == ("picky", "sdpa", "eager")
    text = explain_backends(head_dim=3)
    assert "triton    cannot be loaded: ModuleNotFoundError: No module named 'a_missing" in text
    assert "half      cannot be loaded: TypeError: 3 is no attention backend" in text
    with pytest.raises(ValueError, match="'triton' is installed but cannot be loaded: ModuleNot"):
        registry.get_backend("triton")


def test_one_package_may_bring_many_backends(monkeypatch, unread_registry):
    """Each entry stands for itself: those that load are there, whatever became of the others."""

    class Many:
        choosy = Choosy()
        picky = Picky()

    monkeypatch.setitem(sys.modules, "many_backends", Many)
    points = [
        EntryPoint(name, f"many_backends:{name}", "dilated.backends")
        for name in ("choosy", "cudnn", "picky", "efficient")
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert set(available_backends()) == {"choosy", "picky", "sdpa", "eager"}
    text = explain_backends()
    assert "cudnn     cannot be loaded: AttributeError" in text
    assert "efficient cannot be loaded: AttributeError" in text
    assert "flash4    not installed: comes with the package dilated-kernels" in text


@pytest.mark.parametrize(
    "name", ["triton", "flash4", "flash3", "flash2", "cudnn", "xformers", "efficient", "flex"]
)
def test_backends_of_the_family_say_what_to_install(name):
    with pytest.raises(ValueError, match=f"'{name}' is not installed; .* package dilated-kernels"):
        registry.get_backend(name)
