"""Conformance tests with tensors of any strides, and with NaN and infinity."""

from __future__ import annotations

import torch

from dilated_core.pattern.branches import DilatedPattern
from dilated_core.testing.cases import Case
from dilated_core.testing.error_budget import relative_error
from dilated_core.testing.suite import BackendSuite


class HostileInputs(BackendSuite):
    """Part of `BackendConformance`."""

    def test_any_strides(self) -> None:
        """Transposed, sliced, expanded and reversed-layout inputs give the contiguous result."""
        dtype, bound = self._sharpest()
        case = Case(seq_len=40, batch_size=2, pattern=DilatedPattern([8, 40], [1, 4]))
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        packed = torch.stack([q, k, v], 2).detach().requires_grad_()
        layouts = [
            [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
            list(packed.unbind(2)),
            [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)],
            [x.repeat_interleave(2, 0)[::2] for x in (q, k, v)],
        ]
        expected, _ = self._attend(case, q, k, v)
        for tensors in layouts:
            out, _ = self._attend(case, *tensors)
            assert relative_error(out, expected) <= bound
            got = torch.autograd.grad(out, tensors, dout.expand_as(out))
            want = torch.autograd.grad(expected, (q, k, v), dout, retain_graph=True)
            for a, e in zip(got, want, strict=True):
                assert relative_error(a, e) <= bound
        one = q[:1, :1].expand(2, 40, -1, -1)
        a, _ = self._attend(case, one, one, one)
        b, _ = self._attend(case, *(one.contiguous() for _ in range(3)))
        assert torch.equal(a, b)

    def test_masks_of_any_strides(self) -> None:
        """Reversed, sliced and expanded masks give the contiguous result."""
        dtype, _ = self._sharpest()
        case = Case(seq_len=40, batch_size=3, masked=0.5, pattern=DilatedPattern([8, 40], [1, 4]))
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        mask = case.options(device=self.device)["key_padding_mask"]
        for arrange in (_reversed, _sliced, _expanded):
            strided = arrange(mask)
            results: list[list[torch.Tensor]] = []
            for key_padding_mask in (strided, strided.clone(memory_format=torch.contiguous_format)):
                out, _ = self._attend(case, q, k, v, key_padding_mask=key_padding_mask)
                results.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_nan_propagates(self) -> None:
        """A NaN in one key makes NaN of the rows that see it, and of no other."""
        dtype, _ = self._sharpest()
        case = Case(seq_len=32, num_heads=2, pattern=DilatedPattern([8, 16], [1, 2]))
        q, k, v, _ = (x.detach() for x in case.tensors(dtype=dtype, device=self.device))
        k[0, 3, 0] = torch.nan
        out, lse = self._attend(case, q, k, v)
        sees = case.pattern.materialize(32, 2)[:, :, 3].T > 0
        sees[:, 1] = False
        assert torch.equal(out.isnan().all(-1)[0].cpu(), sees)
        assert torch.equal(lse.isnan()[0].cpu(), sees)


def _reversed(x: torch.Tensor) -> torch.Tensor:
    """With the dimensions in the opposite order in memory."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def _sliced(x: torch.Tensor) -> torch.Tensor:
    """Every other element of memory."""
    return torch.stack([x, x.logical_not() if x.dtype == torch.bool else -x], -1)[..., 0]


def _expanded(x: torch.Tensor) -> torch.Tensor:
    """With strides of 0 along batch and sequence."""
    return x[:1, :1].expand_as(x)
