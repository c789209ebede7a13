"""One product per expert, in value and in gradient, also of empty experts."""

import pytest
import torch

from moa_dist.kernels.grouped_matmul import grouped_matmul, grouped_matmul_fits

COUNTS = [
    [3, 1, 4],
    [0, 3, 2],  # first empty
    [2, 0, 0, 3],  # middle empty
    [1, 4, 0],  # last empty
    [0, 0, 5, 0],  # all rows to one
    [0, 0],  # no rows at all
    [6],
]


def inputs(counts: list[int], d_in: int = 3, d_out: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return draw(sum(counts), d_in), draw(len(counts), d_in, d_out)


def product(rows: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return grouped_matmul(rows, weight, torch.tensor(counts))


def row_by_row(rows: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    products = [row @ weight[e] for row, e in zip(rows, experts, strict=True)]
    return torch.stack(products) if products else rows.new_zeros(0, weight.shape[-1])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_one_product_per_row(counts):
    rows, weight = inputs(counts)
    out, expected = (
        product(rows, weight, counts),
        row_by_row(rows, weight, counts),
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    ours = torch.autograd.grad(out, (rows, weight), upstream)
    if not sum(counts):
        assert not ours[1].any()
        return
    theirs = torch.autograd.grad(expected, (rows, weight), upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", COUNTS[:5], ids=str)
def test_gradcheck(counts):
    rows, weight = inputs(counts)
    assert torch.autograd.gradcheck(lambda r, w: product(r, w, counts), (rows, weight))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_empty_expert_has_zero_gradient_not_none(counts):
    """None would skip weight decay, or hang a rank that waits for the reduction."""
    rows, weight = inputs(counts)
    product(rows, weight, counts).sum().backward()
    for e, count in enumerate(counts):
        assert weight.grad[e].any() == (count > 0)


@pytest.mark.parametrize("frozen", [0, 1], ids=["rows", "weight"])
def test_computes_only_the_gradient_that_is_needed(frozen):
    tensors = inputs([2, 3])
    both = torch.autograd.grad(product(*tensors, [2, 3]).square().sum(), tensors)
    tensors[frozen].requires_grad_(False)
    product(*tensors, [2, 3]).square().sum().backward()
    assert tensors[frozen].grad is None
    assert torch.equal(tensors[1 - frozen].grad, both[1 - frozen])


def test_inputs_and_upstream_need_not_be_contiguous():
    rows, weight = inputs([2, 3])
    plain = product(rows, weight, [2, 3])
    strided = product(rows.T.clone().T, weight.mT.clone().mT, [2, 3])
    assert torch.equal(strided, plain)
    broadcast = torch.autograd.grad(plain.sum(), rows, retain_graph=True)[0]
    explicit = torch.autograd.grad(plain, rows, torch.ones_like(plain).contiguous())[0]
    assert torch.equal(broadcast, explicit)


@pytest.mark.parametrize("counts", [[2, 4], [5]], ids=str)
def test_counts_that_do_not_fit_raise(counts):
    rows, weight = inputs([2, 3])
    with pytest.raises(ValueError, match="5 rows and 2 matrices, but counts"):
        product(rows, weight, counts)


@pytest.mark.parametrize(
    ("groups", "width", "fits"), [(1023, 16, True), (1024, 16, False), (3, 12, False)]
)
def test_what_torch_refuses_is_known_before(groups, width, fits):
    """On a GPU, that is; the meta device stands in for one."""
    rows = torch.empty(4, 16, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(groups, 16, width, dtype=torch.bfloat16, device="meta")
    assert grouped_matmul_fits(rows, weight) is fits
    out = grouped_matmul(rows, weight, torch.empty(groups, dtype=torch.int64, device="meta"))
    assert out.shape == (4, width)
