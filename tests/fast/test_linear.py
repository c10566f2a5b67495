"""Linear layers by oneDNN: the same numbers up to rounding, and everything as it was afterwards."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfpg.fast import product
from hfpg.fast.linear import onednn_linears
from tests import tiny
from tests.generation.test_loop import RAGGED, assert_same, draw, prompts


@pytest.fixture(autouse=True)
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """As on a processor where oneDNN is faster."""
    if "narrow" not in request.node.name:
        monkeypatch.setattr(product, "gains", lambda: True)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.without = nn.Linear(256, 300), nn.Linear(300, 256, bias=False)
        self.transposed, self.small = Conv1D(280, 256), nn.Linear(8, 8)
        nn.init.normal_(self.transposed.bias)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 1), (2, 1), (600,)], ids=str)
@pytest.mark.parametrize("name", ["plain", "without", "transposed"])
@torch.no_grad()
def test_the_product_is_the_same_up_to_rounding(name: str, shape: tuple[int, ...]):
    layers = Layers()
    layer = getattr(layers, name)
    width = layer.weight.shape[0] if name == "transposed" else layer.weight.shape[1]
    x = torch.randn(*shape, width)
    expected = layer(x)
    with onednn_linears(layers):
        torch.testing.assert_close(layer(x), expected, atol=2e-5, rtol=0)
        # a view with gaps between its rows, as heads are
        apart = torch.randn(*shape, 2 * width)[..., :width]
        torch.testing.assert_close(layer(apart), type(layer).forward(layer, apart), atol=2e-5, rtol=0)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (600,)], ids=str)
@pytest.mark.parametrize("name", ["plain", "without", "transposed"])
def test_gradients_are_the_same_up_to_rounding(name: str, shape: tuple[int, ...]):
    layers = Layers()
    layer = getattr(layers, name)
    width = layer.weight.shape[0] if name == "transposed" else layer.weight.shape[1]
    x = torch.randn(*shape, width, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((layer(x) * torch.linspace(-1, 1, layer(x).shape[-1])).sum(), leaves)

    expected = gradients()
    with onednn_linears(layers):
        found = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-5)
        assert a.stride() == b.stride(), "another layout would be copied when it is added up"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_long_sum_in_parts_is_the_whole(dtype):
    made = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2500, n, generator=made, dtype=dtype) for n in (7, 64))
    torch.testing.assert_close(product.inner_product(a, b), a.T @ b, atol=1e-3, rtol=1e-5)


def test_rungs_are_few_and_close():
    sizes = {product.rung(n) for n in range(1, 4097)}
    assert all(n <= product.rung(n) <= max(n + 3, 1.125 * n) and product.rung(n) % 4 == 0 for n in range(1, 4097))
    assert len(sizes) < 80


def test_what_needs_no_gradient_gets_none():
    layers = Layers()
    layers.plain.weight.requires_grad_(False)
    with onednn_linears(layers):
        layers.plain(torch.randn(9, 256)).sum().backward()
    assert layers.plain.weight.grad is None and layers.plain.bias.grad is not None


def test_layers_are_given_back_also_after_an_error():
    layers = Layers()
    with pytest.raises(RuntimeError, match="inside"), onednn_linears(layers):
        assert "forward" in vars(layers.plain) and "forward" in vars(layers.transposed)
        assert "forward" not in vars(layers.small), "the call would cost more than the product"
        raise RuntimeError("inside")
    assert not any("forward" in vars(module) for module in layers.modules())


@pytest.mark.parametrize("shape", [(9, 256), (3, 5, 256), (3, 4, 256)])
@torch.no_grad()
def test_rows_are_made_up_to_a_size(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    layers, x, seen, plain = Layers(), torch.randn(shape), [], product.product
    expected = layers.plain(x), layers.transposed(x)
    monkeypatch.setattr(product, "product", lambda a, *rest: seen.append(len(a)) or plain(a, *rest))
    with onednn_linears(layers, lambda rows: -(-rows // 12) * 12):
        found = layers.plain(x), layers.transposed(x)
    torch.testing.assert_close(found, expected)
    assert set(seen) == {12 if x.numel() <= 12 * 256 else 24}


@torch.no_grad()
def test_what_others_have_replaced_stays_theirs():
    layers = Layers()
    layers.plain.forward = lambda x: x + 1
    with onednn_linears(layers):
        assert torch.equal(layers.plain(torch.zeros(9, 256)), torch.ones(9, 256))
    assert torch.equal(layers.plain(torch.zeros(9, 256)), torch.ones(9, 256))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_precisions_are_left_alone(dtype: torch.dtype):
    layers = Layers().to(dtype)
    with onednn_linears(layers):
        assert "forward" not in vars(layers.plain)
    layers, x = Layers(), torch.randn(9, 256)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layers.plain(x)
        with onednn_linears(layers):
            assert layers.plain(x).dtype == torch.bfloat16 and torch.equal(layers.plain(x), expected)


@pytest.mark.parametrize(("units", "used"), [("AVX2", False), ("AVX512", True), ("SVE256", True)])
def test_where_narrow_units_gain_nothing_torch_multiplies(units: str, used: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: units)
    layers = Layers()
    assert product.suits(layers.plain.weight) == used
    with onednn_linears(layers):
        assert ("forward" in vars(layers.plain)) == used


def test_without_onednn_nothing_is_touched(monkeypatch: pytest.MonkeyPatch):
    layers = Layers()
    with monkeypatch.context() as patch, onednn_linears(layers):
        assert "forward" in vars(layers.plain)
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert torch.equal(layers.plain(torch.ones(9, 256)), nn.Linear.forward(layers.plain, torch.ones(9, 256)))
    with torch.backends.mkldnn.flags(enabled=False), onednn_linears(layers):
        assert "forward" not in vars(layers.plain), "a user has switched it off"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lstm"])
def test_completions_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch):
    """By far fewer than one draw in 100,000 turns on a rounding difference; here none."""
    monkeypatch.setattr(product, "SMALLEST", 1)
    model, rows = tiny.model(kind), prompts(RAGGED, 8)
    ours, plain = (draw(model, rows, own_loop)[0] for own_loop in (True, False))
    assert_same(ours, plain)


def test_tf32_is_for_the_block_alone():
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    with product.tf32(False):
        assert getattr(matmul, name) == before
    with pytest.raises(ZeroDivisionError), product.tf32(True):
        assert getattr(matmul, name) in ("tf32", True)
        raise ZeroDivisionError
    assert getattr(matmul, name) == before
