"""Products with rows of tokens against float64, in every form that callers use."""

import pytest
import torch

from fedsim.core import gemm

TOKENS, OUT, IN = 37, 24, 16


def operands(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((TOKENS, IN), (OUT, IN), (OUT,), (TOKENS, OUT))]


@pytest.fixture(params=["the library of this machine", "PyTorch's own"])
def library(request, monkeypatch):
    if request.param == "PyTorch's own":
        monkeypatch.setattr(gemm, "has_onednn", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("given", ["nothing", "bias", "onto"])
@pytest.mark.parametrize("layout", ["whole", "transposed matrix", "every second row", "transposed tokens"])
def test_a_product_equals_that_in_float64(library, dtype, given, layout):
    x, matrix, bias, onto = operands(dtype)
    x = {"every second row": x.repeat_interleave(2, 0)[::2], "transposed tokens": x.T.contiguous().T}.get(layout, x)
    matrix = matrix.T.contiguous().T if layout == "transposed matrix" else matrix
    expected = x.double() @ matrix.double().T + {"nothing": 0, "bias": bias.double(), "onto": onto.double()}[given]

    found = gemm.linear(x, matrix, bias if given == "bias" else None, onto if given == "onto" else None)

    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-1 if dtype is torch.bfloat16 else 1e-5
    )


def test_equal_inputs_give_equal_bits(library):
    x, matrix, bias, _ = operands(torch.float32)
    assert torch.equal(gemm.linear(x, matrix, bias), gemm.linear(x.clone(), matrix.clone(), bias.clone()))


def test_onednn_is_used_only_for_float32_and_only_where_it_has_wide_kernels(monkeypatch):
    monkeypatch.setattr(gemm, "has_onednn", lambda: True)
    assert gemm.is_for_onednn(torch.float32, torch.device("cpu"))
    assert not gemm.is_for_onednn(torch.float64, torch.device("cpu"))
    monkeypatch.undo()
    gemm.has_onednn.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not gemm.has_onednn()
    gemm.has_onednn.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_float32_and_matches_float64_for_any_input_type(dtype):
    x, _, _, deltas = operands(dtype)

    found = gemm.weight_gradient(deltas, x)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), deltas.double().T @ x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_sums_products_of_bfloat16_in_float32():
    x, _, _, deltas = (each.cuda() for each in operands(torch.bfloat16))
    torch.testing.assert_close(gemm.weight_gradient(deltas, x).double(), deltas.double().T @ x.double(), rtol=1e-5, atol=1e-4)
