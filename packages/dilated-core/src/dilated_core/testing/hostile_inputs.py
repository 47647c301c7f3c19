"""Conformance tests with tensors of any strides, and with NaN and infinity."""

from __future__ import annotations

import pytest
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
        case = Case(seq_len=16, batch_size=2, pattern=DilatedPattern([8, 16], [1, 4]))
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
        one = q[:1, :1].expand(2, 16, -1, -1)
        a, _ = self._attend(case, one, one, one)
        b, _ = self._attend(case, *(one.contiguous() for _ in range(3)))
        assert torch.equal(a, b)

    def test_inputs_that_overlap_themselves(self) -> None:
        """Windows of one signal share memory, and each element still counts for itself."""
        dtype, bound = self._sharpest()
        case = Case(seq_len=23, num_heads=1, batch_size=2, pattern=DilatedPattern([8, 23], [1, 3]))
        _, _, _, dout = case.tensors(dtype=dtype, device=self.device)
        generator = torch.Generator().manual_seed(0)
        signal = torch.randn(2, 30, generator=generator, dtype=torch.float64)
        signal = signal.to(self.device, dtype).requires_grad_()
        windows = signal.unfold(-1, 8, 1).unsqueeze(2)
        copies = [windows.contiguous() for _ in range(3)]
        expected, expected_lse = self._attend(case, copies[0], copies[1], copies[2])
        want = torch.autograd.grad(expected, signal, dout, retain_graph=True)[0]
        for overlapping in ((0,), (1,), (2,)):
            q, k, v = (windows if i in overlapping else x for i, x in enumerate(copies))
            out, lse = self._attend(case, q, k, v)
            assert relative_error(out, expected) <= bound
            assert relative_error(lse, expected_lse) <= bound
            got = torch.autograd.grad(out, signal, dout, retain_graph=True)[0]
            assert relative_error(got, want) <= bound

    def test_upstream_gradients_of_any_strides(self) -> None:
        """Gradients of out and lse, alone and together, that are no contiguous tensors."""
        dtype, bound = self._sharpest()
        # Without a tail, strips run on from one batch row to the next.
        case = Case(seq_len=16, batch_size=2, pattern=DilatedPattern([4, 8], [1, 2]))
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        out, lse = self._attend(case, q, k, v)
        arrangements = (
            *((_reversed, (0, 1)), (_reversed, (1,)), (_sliced, (0, 1))),
            *((_expanded, (0, 1)), (_scalar, (0,)), (_scalar, (1,))),
        )
        for arrange, given in self._sample(arrangements, 3):
            strided = arrange(dout), arrange(dout.sum(-1).to(lse.dtype))
            got = torch.autograd.grad(
                [(out, lse)[i] for i in given],
                (q, k, v),
                [strided[i] for i in given],
                retain_graph=True,
            )
            plain = [
                x.contiguous() if i in given else x.new_zeros(x.shape)
                for i, x in enumerate(strided)
            ]
            want = torch.autograd.grad((out, lse), (q, k, v), plain, retain_graph=True)
            for a, e in zip(got, want, strict=True):
                assert relative_error(a, e) <= bound

    def test_masks_of_any_strides(self) -> None:
        """Reversed, sliced and expanded masks give the contiguous result."""
        dtype, _ = self._sharpest()
        case = Case(seq_len=16, batch_size=2, masked=0.5, pattern=DilatedPattern([8, 16], [1, 4]))
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        mask = case.options(device=self.device)["key_padding_mask"]
        for arrange in (_reversed, _sliced, _expanded):
            strided = arrange(mask)
            results: list[list[torch.Tensor]] = []
            for key_padding_mask in (strided, strided.clone(memory_format=torch.contiguous_format)):
                out, _ = self._attend(case, q, k, v, key_padding_mask=key_padding_mask)
                results.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_masked_rows_may_hold_anything(self, is_causal: bool) -> None:
        """NaN, infinities and huge numbers in masked keys and values count as zeros do."""
        for dtype in {self._sharpest()[0], self.dtypes[-1]}:
            case = Case(
                seq_len=24,
                batch_size=2,
                num_kv_heads=2 if is_causal else 4,
                masked=0.5,
                is_causal=is_causal,
                pattern=DilatedPattern([8, 24], [1, 3]),
            )
            hidden = case.options(device=self.device)["key_padding_mask"]
            held = torch.tensor(
                [torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max],
                dtype=dtype,
                device=self.device,
            ).repeat(12)
            results: list[list[torch.Tensor]] = []
            for anything in (torch.zeros_like(held), held):
                q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
                k, v = (
                    torch.where(
                        hidden[..., None, None], anything.view(2, 24, 1, 1), x.detach()
                    ).requires_grad_()
                    for x in (k, v)
                )
                out, lse = self._attend(case, q, k, v)
                sees = lse.detach() > -torch.inf
                upstream = dout, dout.sum(-1).to(lse.dtype) * sees
                grads = torch.autograd.grad((out, lse), (q, k, v), upstream)
                assert all((grad[hidden] == 0).all() for grad in grads[1:])
                assert all(x.isfinite().all() for x in (out, *grads))
                results.append([out, lse, *grads])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_masked_keys_have_no_gradient_beside_nan(self) -> None:
        """The row of a masked key is a query all the same: its NaN is in its own out, not in dk."""
        dtype, _ = self._sharpest()
        pattern = DilatedPattern([8, 24], [1, 2])
        case = Case(seq_len=24, masked=0.4, pattern=pattern)
        hidden = case.options(device=self.device)["key_padding_mask"]
        q, k, v, dout = case.tensors(dtype=dtype, device=self.device)
        q = q.detach().masked_fill(hidden[..., None, None], torch.nan).requires_grad_()
        out, lse = self._attend(case, q, k, v)
        sees = lse > -torch.inf
        expected = hidden.unsqueeze(-1) & (sees | lse.isnan())
        assert torch.equal(out.isnan().all(-1), expected)
        grads = torch.autograd.grad(out, (k, v), dout)
        assert all((grad[hidden] == 0).all() for grad in grads)

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


def _scalar(x: torch.Tensor) -> torch.Tensor:
    """As the gradient of a sum is."""
    return x.new_tensor(0.7).expand_as(x)
