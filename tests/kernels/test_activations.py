"""Derivatives of activations, which fused kernels apply by hand, are those of autograd."""

from typing import get_args

import pytest
import torch

from moa_dist.config.feed_forward import ActivationName
from moa_dist.kernels.activations import ACTIVATIONS


def test_every_name_of_a_configuration_is_an_activation():
    assert set(get_args(ActivationName)) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_autograd(name):
    x = torch.linspace(-3, 3, 41, dtype=torch.float64).requires_grad_()
    upstream = torch.linspace(1, -2, 41, dtype=torch.float64)
    (expected,) = torch.autograd.grad(ACTIVATIONS[name].value(x), x, upstream)
    torch.testing.assert_close(ACTIVATIONS[name].gradient(upstream, x.detach()), expected)
