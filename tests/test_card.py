"""The model card and the loss curve of an artifact."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import build_model, build_tokenizer
from llmforge.export.card import CardFacts, Evaluation, code, fenced, model_card
from llmforge.export.loss_curve import plot_losses, smooth

FACTS = CardFacts(
    tag="org/m:al_ice:<b>abcde",
    base_model="org/m",
    hub_id="org/m",
    is_adapter=True,
    task="instruction_tuning",
    parameters=134_515_008,
    trainable_parameters=921_600,
    rows=1200,
    samples=1188,
    tokens_per_epoch=182_344,
    trained_tokens_per_epoch=31_234,
    epochs=2.0,
    steps=100,
    best_step=50,
    first_train_loss=2.5,
    last_train_loss=0.75,
    evaluations=[Evaluation(50, 0.9, 2.4596, {"accuracy": 0.875}), Evaluation(100, 1.0, 2.718)],
    prompt_format_yaml='user: "```\\n{instruction}````"\n',
    rendered_example="```\nHello````Hi</s>",
    stopping_sequences=["</s>", "\n\n", "a`|b"],
    resolved_config_yaml="model_id: org/m\nlearning_rate: 1.0e-4\n",
    hashes={"data": "sha256:abc"},
    versions={"torch": "2.13.0"},
    proof=["parity: 12 prompts have the same token ids in training and in serving"],
    loss_curve="loss_curve.png",
)


def read_front_matter(card: str) -> dict:
    match = re.match(r"---\n(.*?)---\n", card, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1])


def test_the_front_matter_is_what_the_hub_reads() -> None:
    assert read_front_matter(model_card(FACTS)) == {
        "base_model": "org/m",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["llmforge", "lora"],
    }
    full = dataclasses.replace(FACTS, is_adapter=False, hub_id=None, base_model="/models/m")
    assert read_front_matter(model_card(full)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmforge", "full"],
    }


def test_the_hub_library_accepts_the_card() -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(FACTS))
    assert card.data.base_model == "org/m"
    assert card.data.tags == ["llmforge", "lora"]


def test_the_card_states_what_was_trained_and_measured() -> None:
    card = model_card(FACTS)
    for said in (
        r"# org/m:al\_ice:\<b\>abcde",
        "step 50, the best by evaluation loss",
        "1,200 (1,188 trained on)",
        "182,344, of which 31,234 carry loss",
        "134,515,008, of which 921,600 trained (0.69%)",
        "2.5000 at the first step, 0.7500 at the last",
        "| step | evaluation loss | perplexity | accuracy |",
        "| **50** (kept) | 0.9000 | 2.46 | 0.875 |",
        "![Loss over optimizer steps](loss_curve.png)",
        "| data | `sha256:abc` |",
        "learning_rate: 1.0e-4",
    ):
        assert said in card


def test_prompt_format_and_example_stand_verbatim_whatever_backticks_they_hold() -> None:
    card = model_card(FACTS)
    assert "`````text\n```\nHello````Hi</s>\n`````" in card
    assert f"`````yaml\n{FACTS.prompt_format_yaml}`````" in card
    assert r"Generation stops at `</s>`, `\n\n`, ``a`|b`` or the end-of-sequence token." in card


@given(st.text(alphabet="`a\n ", max_size=30))
def test_no_text_closes_its_own_fence(text: str) -> None:
    opening, *body, closing = fenced(text, "text").split("\n")
    fence = opening.removesuffix("text")
    assert closing == fence
    assert not any(fence in line for line in body)
    assert "\n".join(body) == text.removesuffix("\n")
    marks = re.match("`+", code(text or "a"))
    assert marks is not None
    assert "\n" not in code(text)


def test_a_long_run_shows_a_readable_number_of_evaluations_with_the_best() -> None:
    evaluations = [Evaluation(step, 1.0, 2.7) for step in range(1, 1001)]
    card = model_card(dataclasses.replace(FACTS, evaluations=evaluations, best_step=777))
    shown = re.findall(r"^\| (?:\*\*)?([\d,]+)(?:\*\* \(kept\))? \| 1\.0000", card, re.MULTILINE)
    assert len(shown) == 21
    assert {"777", "1,000"} <= set(shown)


@pytest.mark.parametrize("is_adapter", [True, False])
def test_the_loading_snippet_runs(is_adapter: bool, tmp_path: Path, model_dir: Path, monkeypatch, capsys) -> None:
    if is_adapter:
        from peft import LoraConfig, get_peft_model

        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tokenizer = build_tokenizer(chat_template=template)
        model = build_model(len(tokenizer))
        model.generation_config.save_pretrained(tmp_path)
        get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    else:
        shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    facts = dataclasses.replace(FACTS, is_adapter=is_adapter, base_model=str(model_dir), hub_id=None)
    (program,) = re.findall(r"```python\n(.*?)```", model_card(facts), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_gguf_base_is_loaded_as_transformers_does() -> None:
    card = model_card(dataclasses.replace(FACTS, base_model="/m/tiny.gguf"))
    assert "AutoModelForCausalLM.from_pretrained('/m', gguf_file='tiny.gguf')" in card


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        ([], []),
        ([(1, 2.5)], []),
        ([(1, 2.5)], [(1, 2.4)]),
        ([(step, 3 / step) for step in range(1, 100_001)], [(step, 1.0) for step in range(0, 100_001, 500)]),
        ([(1, float("nan")), (2, 1.0), (3, float("inf"))], [(3, float("nan"))]),
    ],
)
def test_losses_of_any_run_become_a_picture(train: list, evaluation: list, tmp_path: Path) -> None:
    path = tmp_path / "loss_curve.png"
    plot_losses(train, evaluation, path, "a $title$ with _markup^")
    with Image.open(path) as image:
        assert image.size == (1000, 600)
        colours = len(image.convert("RGB").getcolors(2**24))
    assert colours > 10


def test_smoothing_keeps_a_constant_and_follows_a_fall() -> None:
    assert np.allclose(smooth(np.full(500, 2.0)), 2.0)
    falling = smooth(np.linspace(3, 1, 300))
    assert falling[0] == 3.0
    assert np.all(np.diff(falling) < 0)
    assert falling[-1] < 1.1
