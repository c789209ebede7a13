"""The loss and its gradient equal torch's, whatever the chunks, and hold no wide copy."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moa_dist.models import cross_entropy as module
from moa_dist.models.cross_entropy import NO_TARGET, cross_entropy, cross_entropy_and_z
from moa_dist.models.soft_cap import soft_capped

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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [4, T])
def test_z_loss_and_its_gradient(monkeypatch, rows, smoothing):
    """Alone, and added to the cross-entropy."""
    monkeypatch.setattr(module, "_CHUNK", rows * V)
    logits, targets = operands(torch.float64)
    expected = logits[targets != NO_TARGET].logsumexp(-1).square().sum()
    theirs = F.cross_entropy(
        logits, targets, ignore_index=NO_TARGET, reduction="sum", label_smoothing=smoothing
    )
    loss, z = cross_entropy_and_z(logits, targets, smoothing)
    torch.testing.assert_close(z, expected, rtol=1e-13, atol=1e-13)
    for ours, other in ((z, expected), (loss + 0.3 * z, theirs + 0.3 * expected)):
        gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, other)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_capped_logits_take_no_other_memory(dtype):
    """They overwrite what was there, and are all that the backward pass keeps."""
    leaf, _ = operands(dtype)
    logits, kept = leaf * 2, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        capped = soft_capped(logits, 1.5)
    assert capped.data_ptr() == logits.data_ptr()
    assert [x.data_ptr() for x in kept] == [logits.data_ptr()]
    exact = 1.5 * torch.tanh(leaf.double() * 2 / 1.5)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0, "atol": 0.05}
    torch.testing.assert_close(capped.double(), exact, **close)
    ours, theirs = (torch.autograd.grad(x.sum(), leaf)[0].double() for x in (capped, exact))
    torch.testing.assert_close(ours, theirs, **close)
