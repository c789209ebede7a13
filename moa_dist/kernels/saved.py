"""What kernels of routed experts keep between forward and backward. Shapes as in `row_map`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moa_dist.kernels.activations import ACTIVATIONS


def weights_results(weight: Tensor | None, down: Tensor) -> bool:
    """Whether weights multiply the results, and not the hidden rows.

    They go to the narrower side of `down`, where `<y_a, grad>`, their gradient, costs least too.
    """
    return weight is not None and down.shape[1] > down.shape[2]


def alloc_saved(
    x: Tensor, weight: Tensor | None, down: Tensor, ups: Sequence[Tensor], num_rows: int
) -> tuple[Tensor, list[Tensor]]:
    """Room for what backward would else compute again.

    That is the results, [A, O], where weights multiply them, else nothing, [0, O]; and the products
    with `ups`, each [A, F].
    """
    saved_output = x.new_empty(num_rows if weights_results(weight, down) else 0, down.shape[2])
    return saved_output, [x.new_empty(num_rows, up.shape[2]) for up in ups]


def hidden_gradient(
    grad: Tensor, products: tuple[Tensor, ...], activation: str
) -> tuple[Tensor, ...]:
    """Gradients of the products [a, F] from that of `row_map.hidden_rows`."""
    act = ACTIVATIONS[activation]
    if len(products) == 1:
        return (act.gradient(grad, products[0]),)
    up, gate = products
    return act.gradient(grad * gate, up), grad * act.value(up)
