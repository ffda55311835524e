"""RMSNorm as one function: recognised by what it computes, and equal in its result and its gradients."""

import copy

import pytest
import torch
from torch import nn

from conftest import build_model
from llmforge.models.adapter import add_lora
from llmforge.models.fused_lora import fuse_lora
from llmforge.models.fused_norm import _RmsNorm, fuse_norms

IDS = torch.arange(20, 60).view(2, 20)


def plain(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class Norm(nn.Module):
    """A norm that differs from RMSNorm in one point of `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.eps = kind, 1e-6
        self.weight = nn.Parameter(torch.zeros(16) if kind == "one more" else torch.ones(16))

    def forward(self, x):
        if self.kind == "one more":
            return plain(x, 1 + self.weight, self.eps)
        if self.kind == "centred":
            return plain(x - x.mean(-1, keepdim=True), self.weight, self.eps)
        if self.kind == "epsilon outside":
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)
        if self.kind == "tuple":
            return (plain(x, self.weight, self.eps),)
        return plain(x, self.weight, self.eps)


@pytest.mark.parametrize(
    ("kind", "count"), [("plain", 1), ("one more", 0), ("centred", 0), ("epsilon outside", 0), ("tuple", 0)]
)
def test_found_by_what_it_computes(kind, count):
    norm = Norm(kind)
    before = norm.weight.detach().clone()
    assert fuse_norms(norm) == count
    assert torch.equal(norm.weight, before)
    assert list(norm.state_dict()) == ["weight"]


def test_others_are_not_touched():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Embedding(4, 8), nn.Conv1d(8, 8, 1), nn.PReLU(8))
    assert fuse_norms(model) == 0


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_value_and_derivatives(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_RmsNorm.apply(x, weight, 1e-6), plain(x, weight, 1e-6), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, weight: _RmsNorm.apply(x, weight, 1e-6), (x, weight))
    dy = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(plain(x, weight, 1e-6), (x, weight), dy)
    torch.testing.assert_close(
        torch.autograd.grad(_RmsNorm.apply(x, weight, 1e-6), (x, weight), dy), expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("adapted", [False, True])
def test_a_whole_model(adapted):
    model = build_model(80)
    if adapted:
        model = add_lora(model, {"r": 4, "target_modules": "all-linear", "init_lora_weights": False})
    fused = copy.deepcopy(model)
    assert fuse_norms(fused) == 5
    assert fuse_lora(fused) == (14 if adapted else 0)
    assert list(fused.state_dict()) == list(model.state_dict())
    for each in (model, copied := copy.deepcopy(fused)):
        each(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    double, plain_double = copied.double(), model.double()  # computed by the module itself
    assert adapted or torch.equal(double(input_ids=IDS).logits, plain_double(input_ids=IDS).logits)


def test_bf16_is_as_exact():
    norm = build_model(80).to(torch.bfloat16).model.norm
    nn.init.normal_(norm.weight)
    fused = copy.deepcopy(norm)
    assert fuse_norms(fused) == 1
    x = torch.randn(7, 32).to(torch.bfloat16)
    dy = torch.randn(7, 32).to(torch.bfloat16)

    def results(call, x, weight, dy):
        x = x.clone().requires_grad_()
        y = call(x)
        return torch.cat([part.double().flatten() for part in (y.detach(), *torch.autograd.grad(y, (x, weight), dy))])

    exact_weight = norm.weight.detach().double().requires_grad_()
    exact = results(lambda x: plain(x, exact_weight, norm.variance_epsilon), x.double(), exact_weight, dy.double())
    theirs, ours = results(norm, x, norm.weight, dy), results(fused, x, fused.weight, dy)
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()
    assert fused(x.float()).dtype == norm(x.float()).dtype  # formats that differ are the module's to know


class Gated(torch.nn.Module):
    """A norm that may be given a gate, as Mamba 2 has it, and holds a buffer or not."""

    def __init__(self, *, buffer: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(16) + 0.5)
        self.eps = 1e-6
        if buffer:
            self.register_buffer("table", torch.ones(3))

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        if gate is not None:
            x = x * torch.nn.functional.silu(gate)
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def test_with_a_gate_the_module_computes_itself():
    model = torch.nn.ModuleDict({"norm": Gated(), "other": Gated(buffer=True)})
    x, gate = torch.randn(3, 16), torch.randn(3, 16)
    expected, gated = model["norm"](x), model["norm"](x, gate)
    assert fuse_norms(model) == 1  # a buffer could be used for anything
    torch.testing.assert_close(model["norm"](x), expected)
    torch.testing.assert_close(model["norm"](x, gate), gated, rtol=0, atol=0)
