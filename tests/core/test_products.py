"""The product of an adapted layer against dense products and autograd, row by row."""

from itertools import product as combinations

import pytest
import torch

from fedsim.core.products import affine

OUT, INNER, IN, GROUPS, ROWS = 7, 3, 4, 3, 2


def by_hand(x, weight, bias, chain, scaling):
    """W x + b + s P x, row by row, with factors that are shared, of the row's group, or of the row."""
    results = []
    for row, own in enumerate(x):
        y = 0 if weight is None else own @ weight.T + (0 if bias is None else bias)
        z = own
        for factor in reversed(chain):
            z = z @ (factor if factor.dim() == 2 else factor[row // ROWS] if factor.dim() == 3 else factor[row // ROWS, row % ROWS]).T
        results.append(y + scaling * z if chain else y)
    return torch.stack(results)


def leading(shape, axes):
    """A random factor of this shape with leading axes: none, one per group, one per row, or an expanded view of the groups'."""
    many = {"shared": (), "groups": (GROUPS,), "rows": (GROUPS, ROWS), "expanded": (GROUPS,)}[axes]
    factor = torch.randn(*many, *shape)
    return factor.unsqueeze(1).expand(GROUPS, ROWS, *shape) if axes == "expanded" else factor


KINDS = ("shared", "groups", "rows", "expanded")
CHAINS = [(), *((kind,) for kind in KINDS), *combinations(KINDS, repeat=2), *((first, kind, "shared") for first in KINDS for kind in KINDS)]


@pytest.mark.parametrize("positions", [(5,), (2, 3), ()])  # a head sees one vector per row
@pytest.mark.parametrize(
    ("kinds", "scaling", "weight", "bias"),
    [(kinds, *layer) for kinds in CHAINS for layer in [(1.0, True, False), (0.3, True, True), (0.3, False, False)] if kinds or layer[1]],
)
def test_a_layer_and_all_its_gradients_equal_dense_products_row_by_row(kinds, scaling, weight, bias, positions):
    sizes = [OUT, *[INNER] * (len(kinds) - 1), IN]
    chain = [leading((sizes[i], sizes[i + 1]), kind).requires_grad_(True) for i, kind in enumerate(kinds)]
    x = torch.randn(GROUPS * ROWS, *positions, IN, requires_grad=True)
    w = torch.randn(OUT, IN, requires_grad=True) if weight else None
    b = torch.randn(OUT) if bias else None
    leaves = [x, *([] if w is None else [w]), *chain]

    found, expected = affine(x, w, b, chain, scaling), by_hand(x, w, b, chain, scaling)

    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    for mine, wanted in zip(
        torch.autograd.grad((found * weights).sum(), leaves), torch.autograd.grad((expected * weights).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", [{"x"}, {"left"}, {"middle"}, {"right"}, {"x", "middle"}])
def test_gradients_equal_those_of_dense_products_whichever_tensors_are_trained(trained):
    tensors = {"x": torch.randn(6, 5, IN), "left": torch.randn(OUT, INNER), "middle": torch.randn(GROUPS, INNER, INNER)}
    tensors["right"] = torch.randn(INNER, IN)
    weight, chain = torch.randn(OUT, IN), ("left", "middle", "right")

    def gradients(names, layer):
        leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in tensors.items()}
        total = layer(leaves["x"], weight, None, [leaves[name] for name in chain], 0.5).square().sum()
        return torch.autograd.grad(total, [leaves[name] for name in sorted(names)])

    for mine, wanted in zip(gradients(trained, affine), gradients(trained, by_hand), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", KINDS)
def test_a_layer_computes_in_the_type_of_its_input_and_its_factors_keep_theirs(axes):
    x, factor = torch.randn(6, 3, IN).bfloat16().requires_grad_(True), leading((OUT, IN), axes).requires_grad_(True)
    weight, upstream = torch.randn(OUT, IN).bfloat16(), torch.randn(6, 3, OUT).bfloat16()
    y = affine(x, weight, None, [factor])
    found = [y, *torch.autograd.grad(y, [x, factor], upstream)]
    assert [each.dtype for each in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    exact = [x.detach().double().requires_grad_(True), factor.detach().bfloat16().double().requires_grad_(True)]
    wanted = by_hand(exact[0], weight.double(), None, [exact[1]], 1.0)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, upstream.double())]
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine.detach().double() - theirs.detach()).norm()) < 0.01 * float(theirs.detach().norm())


def test_a_layer_accepts_zero_tokens():
    x, weight = torch.randn(GROUPS * ROWS, 0, IN, requires_grad=True), torch.randn(OUT, IN)
    chain = [torch.randn(OUT, INNER), torch.randn(GROUPS, INNER, INNER, requires_grad=True), torch.randn(INNER, IN)]
    y = affine(x, weight, None, chain)
    assert y.shape == (GROUPS * ROWS, 0, OUT)
    of_x, of_factor = torch.autograd.grad(y.sum(), [x, chain[1]])
    assert (of_x.shape, of_factor.shape) == (x.shape, chain[1].shape)
    assert not of_factor.any()


def test_a_transposed_weight_as_in_gpt2_gives_the_same_product():
    x, kept = torch.randn(6, 5, IN), torch.randn(IN, OUT)
    torch.testing.assert_close(affine(x, kept.T), x @ kept)


@pytest.mark.parametrize("axes", ["shared", "groups", "expanded"])
def test_gradients_agree_with_finite_differences(axes):
    x = torch.randn(GROUPS * ROWS, 2, IN, dtype=torch.float64, requires_grad=True)
    weight, right = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(INNER, IN, dtype=torch.float64)
    left = torch.randn(OUT, INNER, dtype=torch.float64, requires_grad=True)
    middle = torch.randn(*(() if axes == "shared" else (GROUPS,)), INNER, INNER, dtype=torch.float64, requires_grad=True)

    def layer(x, left, middle):
        spread = middle.unsqueeze(1).expand(GROUPS, ROWS, INNER, INNER) if axes == "expanded" else middle
        return affine(x, weight, None, [left, spread, right], 0.7)

    assert torch.autograd.gradcheck(layer, (x, left, middle))
