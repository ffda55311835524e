"""A model's head in chunks: the loss and every gradient are those of the whole logits, for any kind of head."""

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from llmforge.models import head as head_module
from llmforge.models.adapter import add_lora
from llmforge.models.head import find_head
from small_models import KINDS, SMALL, VOCABULARY, small_model

ADAPTERS: dict[str, dict[str, Any]] = {
    "a frozen head": {"target_modules": "all-linear"},
    "an adapted head": {"target_modules": ["q_proj", "lm_head"]},
    "a head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "some rows trained": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


def with_adapter(model: Any, **options: Any) -> Any:
    adapted = add_lora(model, {"r": 3, **options}).double().eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return adapted


def check_equal(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the logits of the whole model, in chunks of 5 places, of which the last has fewer."""
    monkeypatch.setattr(head_module, "_SMALLEST_CHUNK", 5)
    monkeypatch.setattr(head_module, "_CHUNK_BYTES", {"cpu": 1})
    head = find_head(model)
    assert head is not None
    torch.manual_seed(1)
    rows_BT = torch.randint(VOCABULARY, (3, 9))
    places_S = (torch.rand(27) < 0.6).nonzero().squeeze(1)
    places_S = torch.cat([places_S, places_S[:3]])  # with shared beginnings, one place has several targets
    targets_S = torch.randint(VOCABULARY, places_S.shape)
    weights_S = torch.rand(len(places_S)).double()

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (3 * loss).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits_SV = model(input_ids=rows_BT, use_cache=False).logits.flatten(0, 1)[places_S]
    expected = (cross_entropy(logits_SV, targets_S, reduction="none") * weights_S).sum()
    wanted = gradients(expected)
    widest: list[int] = []
    hook = head.module.register_forward_hook(lambda _, __, output: widest.append(output.numel() // VOCABULARY))

    def chunked() -> torch.Tensor:
        with head.selecting(places_S):
            model(input_ids=rows_BT, use_cache=False)
        return head.loss(targets_S, weights_S)

    loss = chunked()
    hook.remove()
    assert max(widest) <= 5  # never all logits at once
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found = gradients(loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-9, msg=name)
    with torch.no_grad():
        assert chunked().item() == pytest.approx(expected.item(), rel=1e-12)
    assert model(input_ids=rows_BT).logits.shape == (3, 9, VOCABULARY)  # elsewhere the model is as it was


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sinks"])
def test_in_full_training_loss_and_gradients_are_those_of_all_logits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_equal(small_model(kind).double(), monkeypatch)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["llama", "a factor of the logits"])
def test_with_an_adapter_they_are_too(kind: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(with_adapter(small_model(kind), **ADAPTERS[adapter]), monkeypatch)


def test_with_an_adapter_on_a_capped_head(monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(with_adapter(small_model("soft-capping").double(), **ADAPTERS["an adapted head"]), monkeypatch)


@pytest.mark.parametrize(
    ("kind", "tail"),
    [("llama", (1.0, 0.0)), ("soft-capping", (1.0, 5.0)), ("a divisor of the logits", (1 / 7, 0.0))],
)
def test_what_a_model_does_with_its_heads_output_is_found(kind: str, tail: tuple[float, float]) -> None:
    head = find_head(small_model(kind))
    assert head is not None
    assert head.tail == pytest.approx(tail)


def test_a_head_that_computes_otherwise_is_not_used() -> None:
    """A forward that looks at more than the last hidden states."""

    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            output = super().forward(input_ids=input_ids, **options)
            output.logits = output.logits + input_ids[..., None].float()
            return output

    assert find_head(Odd(transformers.LlamaConfig(**SMALL))) is None
    assert find_head(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))) is not None


def test_modes_and_random_state_stay_as_they_were() -> None:
    model = small_model("llama").train()
    model.model.layers[0].eval()
    modes, state = {module: module.training for module in model.modules()}, torch.get_rng_state()
    assert find_head(model) is not None
    assert {module: module.training for module in model.modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
