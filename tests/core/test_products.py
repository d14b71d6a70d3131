"""Products by groups and by rows against dense products and autograd, row by row."""

import pytest
import torch

from fedsim.core.products import add_product, multiply


def test_multiply_gives_each_contiguous_group_of_rows_its_own_factor():
    x, stack = torch.randn(6, 5, 4), torch.randn(3, 7, 4)
    expected = torch.stack([x[row] @ stack[row // 2].T for row in range(6)])
    torch.testing.assert_close(multiply(x, stack), expected)
    torch.testing.assert_close(multiply(x, stack[0]), x @ stack[0].T)


@pytest.mark.parametrize("shape", [(7, 4), (3, 7, 4), (3, 2, 7, 4)])
def test_multiply_computes_in_the_type_of_its_input(shape):
    assert multiply(torch.randn(6, 3, 4).bfloat16(), torch.randn(shape)).dtype == torch.bfloat16


@pytest.mark.parametrize("expanded", [True, False])
@pytest.mark.parametrize("scaling", [1.0, 0.3])
@pytest.mark.parametrize("positions", [(5,), ()])  # a head sees one vector per row
def test_a_factor_for_each_row_has_a_gradient_for_each_row(expanded, scaling, positions):
    x, y, stack = torch.randn(6, *positions, 4), torch.randn(6, *positions, 7), torch.randn(3, 7, 4)
    factor = stack.unsqueeze(1).expand(3, 2, 7, 4)
    leaves = [x.requires_grad_(True), y.requires_grad_(True), (factor if expanded else factor.clone()).requires_grad_(True)]
    rows = [stack[row // 2].clone().requires_grad_(True) for row in range(6)]
    for total, expected in (
        (add_product(y, x, leaves[2], scaling), torch.stack([y[i] + scaling * (x[i] @ row.T) for i, row in enumerate(rows)])),
        (multiply(x, leaves[2]), torch.stack([x[i] @ row.T for i, row in enumerate(rows)])),
    ):
        torch.testing.assert_close(total, expected)
        weights = torch.randn_like(total)
        found = torch.autograd.grad((total * weights).sum(), leaves, allow_unused=True)
        wanted = torch.autograd.grad((expected * weights).sum(), [x, y, *rows], allow_unused=True)
        torch.testing.assert_close(found[0], wanted[0])
        assert (found[1] is None) == (wanted[1] is None)
        torch.testing.assert_close(found[2].flatten(0, 1), torch.stack(wanted[2:]))


def test_gradients_row_by_row_agree_with_finite_differences():
    x, y = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    stack = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, x, stack: add_product(y, x, stack.unsqueeze(1).expand(2, 2, 5, 2), 0.7), (y, x, stack))
