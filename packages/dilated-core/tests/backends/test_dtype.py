"""The recommended dtype follows what the device reports, and never probes at import."""

import types

import pytest
import torch
from dilated_core import recommended_dtype


def pretend_cuda(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0]
    )


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),  # Pascal
        ((7, 0), torch.float32),  # Volta
        ((7, 5), torch.float32),  # Turing
        ((8, 0), torch.bfloat16),  # Ampere
        ((8, 9), torch.bfloat16),  # Ada
        ((9, 0), torch.bfloat16),  # Hopper
        ((12, 0), torch.bfloat16),  # Blackwell
    ],
)
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0)], ids=str)
def test_cuda_by_capability(monkeypatch, device, capability, dtype):
    pretend_cuda(monkeypatch, [capability])
    assert recommended_dtype(device) == dtype


def test_each_cuda_device_is_asked_itself(monkeypatch):
    pretend_cuda(monkeypatch, [(9, 0), (6, 1)])
    assert [recommended_dtype(f"cuda:{i}") for i in (0, 1)] == [torch.bfloat16, torch.float32]
    with pytest.raises(ValueError, match="device is 'cuda:2', and there are 2 CUDA devices"):
        recommended_dtype("cuda:2")


@pytest.mark.parametrize("has", [False, True])
def test_xpu_says_itself(monkeypatch, has):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    properties = types.SimpleNamespace(has_bfloat16_conversions=has)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    assert recommended_dtype("xpu") == (torch.bfloat16 if has else torch.float32)


@pytest.mark.parametrize("device", ["cpu", "mps", "meta", "hpu"])
def test_float32_elsewhere(device):
    assert recommended_dtype(device) == torch.float32


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_an_absent_device_is_an_error(monkeypatch, kind):
    monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    message = f"device is '{kind}:1', and PyTorch finds no {kind.upper()}"
    with pytest.raises(ValueError, match=message):
        recommended_dtype(f"{kind}:1")


def test_mistakes():
    with pytest.raises(ValueError, match="device is 'gpu', which PyTorch does not know"):
        recommended_dtype("gpu")
    with pytest.raises(TypeError, match=r"device is 0; it must be a torch.device or a string"):
        recommended_dtype(0)
