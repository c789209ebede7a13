"""The loss and its gradient equal torch's, whatever the chunks, and hold no wide copy."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moa_dist.models import cross_entropy as module
from moa_dist.models.cross_entropy import NO_TARGET, cross_entropy

T, V = 23, 11


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(T, V, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(V, (T,), generator=generator)
    targets[::5] = NO_TARGET
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 4, T, 100])
def test_loss_and_gradient_in_fp64(monkeypatch, rows, smoothing):
    monkeypatch.setattr(module, "_CHUNK", rows * V)
    logits, targets = operands(torch.float64)
    ours = cross_entropy(logits, targets, smoothing)
    theirs = F.cross_entropy(
        logits, targets, ignore_index=NO_TARGET, reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    upstream = torch.tensor(0.7, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_narrow_logits_are_summed_in_fp32():
    logits, targets = operands(torch.bfloat16)
    loss = cross_entropy(logits, targets)
    exact = F.cross_entropy(logits.double(), targets, ignore_index=NO_TARGET, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (loss, exact))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=1e-4)


def test_no_target_at_all_costs_nothing():
    logits, targets = operands(torch.float32)
    loss = cross_entropy(logits, torch.full_like(targets, NO_TARGET))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_logits_are_widened_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 4 * V)
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                largest.append(result.numel())
            return result

    logits, targets = operands(torch.bfloat16)
    with Largest():
        cross_entropy(logits, targets).backward()
    assert max(largest) == 4 * V
