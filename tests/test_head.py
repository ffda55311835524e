"""A model's head, taken apart: the loss and every gradient are those of the whole model, for any kind of head."""

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from llmforge.models import head as head_module
from llmforge.models.adapter import add_lora
from llmforge.models.head import find_head

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GEMMA = {**SMALL, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 48}
KINDS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "tied embeddings": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "soft-capping": lambda: transformers.Gemma2Config(**GEMMA, final_logit_softcapping=0.5),
    "a divisor of the logits": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=7.0),
    "a factor of the logits": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.1),
    "a bias": lambda: transformers.PhiConfig(**SMALL),
    "GPT-2": lambda: transformers.GPT2Config(**OLD),
    "a decoder inside the backbone": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    ),
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]()).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def with_adapter(model: Any, **options: Any) -> Any:
    adapted = add_lora(model, {"r": 3, "target_modules": "all-linear", **options}).double().eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return adapted


def check_equal(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the logits of the whole model, in chunks of 5 places, of which the last has fewer."""
    monkeypatch.setattr(head_module, "_SMALLEST_CHUNK", 5)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": 1})
    head = find_head(model)
    assert head is not None
    rows_BT = torch.randint(VOCABULARY, (3, 9))
    mask_BT = torch.ones_like(rows_BT)
    mask_BT[1, 6:] = 0
    chosen_BT = (torch.rand(rows_BT.shape) < 0.6) & (mask_BT > 0)
    targets_N, weights_N = torch.randint(VOCABULARY, (int(chosen_BT.sum()),)), torch.rand(int(chosen_BT.sum())).double()

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (3 * loss).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits_NV = model(input_ids=rows_BT, attention_mask=mask_BT, use_cache=False).logits[chosen_BT]
    expected = (cross_entropy(logits_NV, targets_N, reduction="none") * weights_N).sum()
    wanted = gradients(expected)
    widest = 0

    def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal widest
        widest = max(widest, output.numel() // VOCABULARY)

    hook = head._model.get_output_embeddings().register_forward_hook(watch)
    loss = head.loss(head.hidden(rows_BT, mask_BT)[chosen_BT], targets_N, weights_N)
    hook.remove()
    assert widest == 5  # never all logits at once
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found = gradients(loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-9), name
    with torch.no_grad():
        evaluated = head.loss(head.hidden(rows_BT, mask_BT)[chosen_BT], targets_N, weights_N)
    assert evaluated.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_whole_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(with_adapter(build(kind)), monkeypatch)


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_that_is_trained_is_left_whole(options: dict[str, Any]) -> None:
    assert find_head(build("llama")) is None
    assert find_head(with_adapter(build("llama"), **options)) is None


def test_a_model_that_cannot_be_taken_apart_is_left_whole() -> None:
    """Llama 4's decoder gives logits itself."""
    config = transformers.Llama4TextConfig(**SMALL, head_dim=16, intermediate_size_mlp=48, num_local_experts=2)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    before = dict(model.named_modules())
    assert find_head(model) is None
    assert dict(model.named_modules()) == before


def test_a_head_that_computes_otherwise_is_not_used() -> None:
    """A forward that looks at more than the last hidden states."""

    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            output = super().forward(input_ids=input_ids, **options)
            output.logits = output.logits + input_ids[..., None].float()
            return output

    assert find_head(Odd(KINDS["llama"]()).requires_grad_(False)) is None
    plain = transformers.LlamaForCausalLM(KINDS["llama"]()).requires_grad_(False)
    assert isinstance(find_head(plain), head_module.Head)


def test_modes_and_random_state_stay_as_they_were() -> None:
    model = build("llama").train().requires_grad_(False)
    model.model.layers[0].eval()
    modes, state = {module: module.training for module in model.modules()}, torch.get_rng_state()
    assert find_head(model) is not None
    assert {module: module.training for module in model.modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
