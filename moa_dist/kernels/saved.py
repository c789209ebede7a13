"""What kernels of routed experts keep between forward and backward. Shapes as in `trip`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moa_dist.kernels.activations import ACTIVATIONS


def weighs_results(weight: Tensor | None, down: Tensor) -> bool:
    """Whether weights multiply the results, and not the hidden rows.

    They go to the narrower side of `down`, where `<y_a, grad>`, their gradient, costs least too.
    """
    return weight is not None and down.shape[1] > down.shape[2]


def room_to_save(
    x: Tensor, weight: Tensor | None, down: Tensor, ups: Sequence[Tensor], num_rows: int
) -> tuple[Tensor, list[Tensor]]:
    """Room for what backward would else compute again.

    That is the results, [A, O], where weights multiply them, else nothing, [0, O]; and the products
    with `ups`, each [A, F].
    """
    kept = x.new_empty(num_rows if weighs_results(weight, down) else 0, down.shape[2])
    return kept, [x.new_empty(num_rows, up.shape[2]) for up in ups]


def hidden_gradient(
    grad: Tensor, products: tuple[Tensor, ...], activation: str
) -> tuple[Tensor, ...]:
    """Gradients of the products [a, F] from that of `trip.hidden_rows`."""
    act = ACTIVATIONS[activation]
    if len(products) == 1:
        return (act.gradient(grad, products[0]),)
    up, gate = products
    return act.gradient(grad * gate, up), grad * act.value(up)
