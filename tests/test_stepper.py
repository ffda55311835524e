"""Conversations step by step, together or alone, are what plain forward passes over each of them compute."""

import random
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
import transformers

from llmforge.errors import ModelError
from llmforge.models.adapters import Adapters
from llmforge.models.cached_attention import Cache, Conversation, capacity_for
from llmforge.models.stepper import Stepper, Work, make_stepper
from small_models import KINDS, SMALL, VOCABULARY, small_model

CPU = torch.device("cpu")
ALONE = {"soft-capping": "plain softmax", "sinks": "attention is eager"}


def stepper_of(model: torch.nn.Module) -> tuple[Stepper, str]:
    return make_stepper(model, Adapters(model), CPU, nullcontext)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_forward_pass_of_each_conversation(kind: str) -> None:
    """Twelve conversations come and go over 60 steps, with prompts of 1 to 400 tokens read in parts."""
    model, plain = small_model(kind), small_model(kind)
    stepper, why = stepper_of(model)
    assert stepper.together == (kind not in ALONE), why
    if kind in ALONE:
        assert why.startswith("conversations are computed one after the other")
    numbers = random.Random(1)
    live: list[tuple[object, list[int], int]] = []  # a conversation, its tokens, and how many of them were read
    compared = 0
    for _ in range(60 if stepper.together else 20):
        while len(live) < 5:
            tokens = [numbers.randrange(VOCABULARY) for _ in range(numbers.choice((1, 3, 40, 250, 257, 400)))]
            live.append((stepper.conversation(), tokens, 0))
        work, after = [], []
        for conversation, tokens, done in live:
            part = tokens[done : done + numbers.choice((1, 90, 300))]
            work.append(Work(conversation, part, wants_logits=done + len(part) == len(tokens)))
            after.append((conversation, tokens, done + len(part)))
        logits = iter(stepper.step(work))
        live = []
        for conversation, tokens, done in after:
            if done == len(tokens):
                found = next(logits)
                if numbers.random() < 0.2:
                    with torch.no_grad():
                        expected = plain(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
                    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
                    compared += 1
                tokens = [*tokens, int(found.argmax())]
            if numbers.random() < 0.05 or len(tokens) > 480:
                stepper.forget(conversation)
            else:
                live.append((conversation, tokens, done))
    assert compared >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_with_adapters_of_every_layer_are_what_peft_computes(kind: str, tmp_path: Path) -> None:
    """Of embeddings and heads too; in long steps and in short ones."""
    model = small_model(kind)
    adapters = Adapters(model)
    stepper, _ = make_stepper(model, adapters, CPU, nullcontext)
    plain: dict[str | None, torch.nn.Module] = {None: small_model(kind)}
    layers = [name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
    if kind == "keys wider than values":  # PEFT takes the names of its MLP for those of experts
        layers = [name for name in layers if ".mlp." not in name]
    assert len(layers) > 2
    for rank in (2, 3):
        name = f"rank {rank}"
        plain[name] = peft.get_peft_model(
            small_model(kind), peft.LoraConfig(r=rank, target_modules=layers), autocast_adapter_dtype=False
        )
        for path, parameter in plain[name].named_parameters():
            if "lora_" in path:
                parameter.data = torch.randn_like(parameter) * 0.3
        plain[name].save_pretrained(tmp_path / name, save_embedding_layers=False)
        adapters.add(name, adapters.read(tmp_path / name))
    numbers = random.Random(1)
    live = [(stepper.conversation(), name, [numbers.randrange(VOCABULARY) for _ in range(40)]) for name in plain]
    work = [Work(conversation, tokens, name) for conversation, name, tokens in live]
    for _ in range(4):
        found = stepper.step(work)
        for row, (_, name, tokens) in zip(found, live, strict=True):
            with torch.no_grad():
                expected = plain[name](torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
            assert (row - expected).abs().max() <= 1e-5 * expected.abs().max()
            tokens.append(int(row.argmax()))
        work = [Work(conversation, tokens[-1:], name) for conversation, name, tokens in live]


def test_a_layer_that_is_given_some_tokens_only_is_not_mixed(tmp_path: Path) -> None:
    """Experts that are modules would be, and nobody would know whose tokens they are given."""
    model = small_model("llama")
    adapters = Adapters(model)
    for name in ("one", "two"):
        adapted = peft.get_peft_model(small_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / name)
        adapters.add(name, adapters.read(tmp_path / name))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.zeros(3, 1, SMALL["hidden_size"], dtype=torch.float64)
    with adapters.using(["one", "two", None], CPU):
        layer(x)
        with pytest.raises(ModelError, match=r"cannot share a step: .*q_proj is given 2 of its 3 tokens.*merged"):
            layer(x[:2])


def test_a_model_with_a_state_answers_alone() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    stepper, why = stepper_of(model)
    assert not stepper.together
    assert why
    conversation, tokens = stepper.conversation(), list(range(20))
    found = stepper.step([Work(conversation, tokens)])[0]
    for _ in range(3):
        tokens.append(int(found.argmax()))
        found = stepper.step([Work(conversation, tokens[-1:])])[0]
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bf16_is_judged_by_its_own_rounding() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL)).to(torch.bfloat16).eval()
    stepper, why = stepper_of(model)
    assert stepper.together, why


@torch.inference_mode()
def test_rows_of_a_slab_move_up_and_conversations_keep_theirs() -> None:
    cache, numbers = Cache(), random.Random(0)
    content: dict[Conversation, torch.Tensor] = {}
    for _ in range(300):
        if not content or (len(content) < 12 and numbers.random() < 0.6):
            content[Conversation()] = torch.empty(0, 1, 2)
        conversation = numbers.choice(list(content))
        if numbers.random() < 0.1:
            cache.forget(conversation)
            del content[conversation]
        else:
            more = torch.rand(numbers.choice((1, 100, 900)), 1, 2)
            end = conversation.length + len(more)
            cache.make_room(conversation, end)
            assert conversation.slab is not None
            keys, values = conversation.slab.layer(0, more[:1, :, None], more[:1, :, None])
            for tensor in (keys, values):
                tensor[conversation.row, :, conversation.length : end] = more.transpose(0, 1)
            conversation.length = end
            content[conversation] = torch.cat([content[conversation], more])
        for conversation, expected in content.items():
            if conversation.slab is None:
                continue
            keys, values = conversation.slab.layer(0, *[torch.empty(1, 1, 1, 2)] * 2)
            for tensor in (keys, values):
                assert torch.equal(tensor[conversation.row, 0, : conversation.length], expected[:, 0])
        rows = sorted((c.slab.capacity, c.row) for c in content if c.slab is not None)
        assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 256), (256, 256), (257, 1024), (1024, 1024), (5000, 16384)])
def test_slabs_have_few_capacities(tokens: int, capacity: int) -> None:
    assert capacity_for(tokens) == capacity
