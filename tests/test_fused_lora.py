"""LoRA layers as one function: PEFT's numbers and names, and PEFT's own code wherever it is not plain LoRA."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from conftest import build_model
from llmforge.models.adapter import add_lora, merge
from llmforge.models.fused_lora import FusedLinear, fuse_lora
from llmforge.models.load import enable_activation_checkpointing

IDS = torch.arange(20, 60).view(2, 20)
LORA = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Build a tiny model with an adapter that changes something; the weights of `options` alone decide it."""
    model = build_model(80)
    for layer in model.model.layers:  # biases, as Qwen has them
        layer.self_attn.q_proj.bias = nn.Parameter(torch.linspace(-1, 1, 32))
    model = add_lora(model.to(dtype), {**LORA, **options})
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    if dtype == torch.float64:
        model.double()  # what is trained is fp32 otherwise
    return model.train()


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any, int]:
    """Give a model as PEFT computes it, the same one fused, and how many layers that changed."""
    plain = adapted(dtype, **options)
    fused = copy.deepcopy(plain)
    return plain, fused, fuse_lora(fused)


def loss_and_gradients(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"modules_to_save": ["embed_tokens"]}],
    ids=str,
)
def test_loss_and_every_gradient_are_peft_s(options):
    plain, fused, layers = pair(**options)
    assert layers == (4 if options.get("target_modules") else 14)
    (loss, gradients), (fused_loss, fused_gradients) = loss_and_gradients(plain), loss_and_gradients(fused)
    torch.testing.assert_close(fused_loss, loss, **EXACT)
    assert {name for name, p in fused.named_parameters() if p.requires_grad} == fused_gradients.keys()
    torch.testing.assert_close(fused_gradients, gradients, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits, **EXACT)


def test_gradients_add_up_over_micro_batches():
    plain, fused, _ = pair()
    for ids in (IDS[:1], IDS[1:, :7]):
        (_, gradients), (_, fused_gradients) = loss_and_gradients(plain, ids), loss_and_gradients(fused, ids)
    torch.testing.assert_close(fused_gradients, gradients, **EXACT)


def test_gradients_with_recomputed_activations():
    plain, fused, _ = pair()
    assert enable_activation_checkpointing(fused.get_base_model()) is None
    (loss, gradients), (fused_loss, fused_gradients) = loss_and_gradients(plain), loss_and_gradients(fused)
    torch.testing.assert_close(fused_loss, loss, **EXACT)
    torch.testing.assert_close(fused_gradients, gradients, **EXACT)


def test_derivatives_of_one_layer():
    layer = adapted().get_base_model().model.layers[0].self_attn.q_proj
    assert fuse_lora(layer) == 1
    x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    weights = [parameter.detach().requires_grad_() for parameter in layer.parameters() if parameter.requires_grad]

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *weights))
    assert torch.autograd.gradcheck(call, (x.transpose(0, 1), *weights))  # not contiguous


def test_bf16_is_no_further_from_the_truth_than_peft_s():
    """Number formats as in training: frozen weights in bf16, the adapter in fp32, autocast around the forward pass."""
    plain, fused, layers = pair(torch.bfloat16)
    assert layers == 14
    exact = copy.deepcopy(plain).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, fused_logits = plain(input_ids=IDS).logits, fused(input_ids=IDS).logits
    logits.float().square().mean().backward()
    fused_logits.float().square().mean().backward()
    truth = exact(input_ids=IDS).logits
    truth.square().mean().backward()
    assert fused_logits.dtype == logits.dtype
    assert distance(fused_logits, truth) < 1.1 * distance(logits, truth)

    def gradient(model: Any) -> torch.Tensor:
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert {g.dtype for g in found} <= {torch.float32, torch.float64}
        return torch.cat([g.flatten().double() for g in found])

    assert distance(gradient(fused), gradient(exact)) < 1.1 * distance(gradient(plain), gradient(exact))


def distance(tensor: torch.Tensor, truth: torch.Tensor) -> float:
    return float(((tensor.double() - truth).norm() / truth.norm()).detach())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dora": True}, 0),
        ({"lora_bias": True, "target_modules": ["q_proj", "up_proj"]}, 0),
        ({"bias": "all"}, 12),  # q_proj has one, which is trained
    ],
    ids=str,
)
def test_what_is_more_than_plain_lora_stays_peft_s(options, expected):
    plain, fused, layers = pair(**options)
    assert layers == expected
    (loss, gradients), (fused_loss, fused_gradients) = loss_and_gradients(plain), loss_and_gradients(fused)
    torch.testing.assert_close(fused_loss, loss, **EXACT)
    torch.testing.assert_close(fused_gradients, gradients, **EXACT)


def test_dropout_is_peft_s():
    plain, fused, layers = pair(lora_dropout=0.5)
    assert layers == 14
    torch.manual_seed(2)
    logits = plain(input_ids=IDS).logits
    torch.manual_seed(2)
    assert torch.equal(fused(input_ids=IDS).logits, logits)
    torch.testing.assert_close(fused.eval()(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits, **EXACT)


def test_a_layer_that_is_watched_is_called():
    model = adapted()
    seen = []
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.base_layer.register_forward_hook(lambda *call: seen.append(call))
    assert fuse_lora(model) == 13
    assert type(layer) is not FusedLinear
    model(input_ids=IDS)
    assert len(seen) == 1


def test_disabled_merged_and_other_adapters():
    plain, fused, _ = pair()
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
        model.set_adapter("second")
        model.double()
    torch.testing.assert_close(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits, **EXACT)
    for model in (plain, fused):
        model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits, **EXACT)
    for model in (plain, fused):
        model.set_adapter("default")
        model.merge_adapter()
    torch.testing.assert_close(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits, **EXACT)


def test_names_files_and_merging_stay(tmp_path):
    plain, fused, _ = pair()
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build_like(plain), tmp_path).double()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    merged, fused_merged = merge(plain), merge(fused)
    assert {type(module) for module in fused_merged.modules()} == {type(module) for module in merged.modules()}
    torch.testing.assert_close(fused_merged.state_dict(), merged.state_dict(), rtol=0, atol=0)


def build_like(model: Any) -> Any:
    """Give the base model of `adapted`, without its adapter."""
    return copy.deepcopy(model).unload()


def test_models_may_change_the_output_in_place():
    _, model, _ = pair()
    layer = next(module for module in model.modules() if isinstance(module, FusedLinear))
    x = torch.randn(2, 3, layer.in_features, dtype=layer.base_layer.weight.dtype, requires_grad=True)
    layer(x).mul_(2).sum().backward()
    (expected,) = torch.autograd.grad((layer(x) * 2).sum(), [x])
    torch.testing.assert_close(x.grad, expected)
