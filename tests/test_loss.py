"""The loss of a step and its gradient, against plain implementations on the same batch, in float64."""

import random
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from conftest import build_model
from llmforge.data.samples import Sample
from llmforge.models.adapter import add_lora
from llmforge.models.head import find_head
from llmforge.tasks import Batch, CausalLM, InstructionTuning

VOCAB, PAD = 97, 2
CLOSE = {"rtol": 0.0, "atol": 1e-9}


def build(kind: str) -> Any:
    """Build a float64 model, all of whose parameters matter: LoRA's second matrix starts at 0 otherwise."""
    model = build_model(VOCAB).double()
    if kind == "lora":
        model = add_lora(model, {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"]}).double()
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)
    return model


def samples(count: int = 5, *, weights: tuple[float, ...] = (0.0, 1.0)) -> list[Sample]:
    rng = random.Random(0)
    made = []
    for length in rng.sample(range(3, 20), count):
        made.append(
            Sample(
                [rng.randrange(3, VOCAB) for _ in range(length)],
                [0.0, *(rng.choice(weights) for _ in range(length - 1))],
            )
        )
    return made


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def loss_and_gradients(model: Any, batch: Batch, *, head: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = InstructionTuning(PAD, None).loss(model, batch, find_head(model) if head else None)
    (loss.sum / loss.weight).backward()
    return float(loss.sum.detach()) / loss.weight, gradients(model)


def plain_loss(model: Any, chosen: list[Sample]) -> torch.Tensor:
    """Write the weighted mean down token by token, one sample at a time, with no padding anywhere."""
    total: Any = 0.0
    for sample in chosen:
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([sample.input_ids])).logits[0], dim=-1)
        for place in range(1, len(sample.input_ids)):
            total = total - sample.loss_weights[place] * log_probs[place - 1, sample.input_ids[place]]
    return total / sum(weight for sample in chosen for weight in sample.loss_weights)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_loss_and_gradients_are_those_of_transformers_labels(kind: str, head: bool) -> None:
    model = build(kind)
    batch = InstructionTuning(PAD, None).collate(samples())
    assert not batch.attention_mask_BT.all()  # there is padding
    loss, ours = loss_and_gradients(model, batch, head=head)

    model.zero_grad()
    labels = batch.input_ids_BT.masked_fill(batch.loss_weights_BT == 0, -100)
    # transformers' own loss_function computes in fp32; its definition is the mean over the labels that are not -100.
    logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    theirs = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    theirs.backward()
    assert loss == pytest.approx(float(theirs.detach()), abs=1e-9)
    expected = gradients(model)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)

    by_transformers = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=labels).loss
    assert loss == pytest.approx(float(by_transformers.detach()), abs=1e-6)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.0, 0.25, 1 / 3, 1.0, 3.5)])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_padding_and_weights_change_nothing_but_what_they_should(kind: str, weights: tuple[float, ...]) -> None:
    chosen = samples(weights=weights)
    # A batch holds weights in fp32; the oracle gets the same numbers.
    rounded = [Sample(s.input_ids, torch.tensor(s.loss_weights, dtype=torch.float32).tolist()) for s in chosen]
    model = build(kind)
    plain = plain_loss(model, rounded)
    plain.backward()
    expected = gradients(model)
    for pad_to in (None, 31):
        batch = InstructionTuning(PAD, pad_to).collate(chosen)
        assert batch.weight == pytest.approx(sum(sum(s.loss_weights) for s in rounded), abs=1e-12)
        assert batch.tokens == sum(len(s.input_ids) for s in chosen)
        assert batch.trained_tokens == sum(weight > 0 for s in chosen for weight in s.loss_weights)
        loss, ours = loss_and_gradients(model, batch, head=True)
        assert loss == pytest.approx(float(plain.detach()), abs=1e-9)
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, expected[name], **CLOSE)


def test_a_micro_batch_without_weight_costs_nothing_and_adds_no_gradient() -> None:
    model = build("full")
    task = CausalLM(PAD, None)
    loss = task.loss(model, task.collate([Sample([5, 6, 7], [0.0, 0.0, 0.0])]))
    loss.sum.backward()
    assert (float(loss.sum.detach()), loss.weight, gradients(model)) == (0.0, 0.0, {})


@pytest.mark.parametrize("place", [1, 8])
def test_one_trained_token_anywhere_is_enough(place: int) -> None:
    ids = list(range(10, 19))
    sample = Sample(ids, [float(index == place) for index in range(9)])
    model = build("full")
    for head in (True, False):
        loss, _ = loss_and_gradients(model, InstructionTuning(PAD, 12).collate([sample]), head=head)
        assert loss == pytest.approx(float(plain_loss(model, [sample]).detach()), abs=1e-9)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_in_bf16_the_loss_is_close_and_summed_in_fp32(kind: str) -> None:
    from llmforge.models.device import autocast

    model = build(kind).float()
    task = InstructionTuning(PAD, None)
    batch = task.collate(samples())
    head = find_head(model)
    with torch.no_grad():
        exact = task.loss(model, batch, head)
        with autocast(torch.device("cpu"), "bf16")():
            rounded = task.loss(model, batch, head)
            by_logits = task.loss(model, batch)
    assert float(rounded.sum) == pytest.approx(float(by_logits.sum), rel=1e-6)
    assert rounded.sum.dtype == torch.float32
    assert float(rounded.sum) == pytest.approx(float(exact.sum), rel=5e-3)
    assert float(rounded.sum) != float(exact.sum)
