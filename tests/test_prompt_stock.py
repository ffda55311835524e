"""The stock formats of core models, the conversations that are unrolled, and what a run says of both."""

import shutil

import pytest
import yaml

import chat_templates
from conftest import CHATML_TEMPLATE, PROMPT_FORMATS, conversation_rows, save_model, write_jsonl
from llmforge.config import load_config
from llmforge.prompt import Encoder, PromptFormat
from llmforge.prompt.adversary import random_conversations
from llmforge.prompt.stock import stock_generation_config
from llmforge.train.prepare import load_encoder, prepare_run
from test_prompt_real_tokenizers import load
from tiny_runs import Listener, write_config

CORE = (
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Meta-Llama-3-70B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-70B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.1-70B-Instruct",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "mistralai/Mistral-Nemo-Instruct-2407",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mistralai/Mixtral-8x7B-Instruct",
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi! "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye."},
]
WRITTEN = {
    "mistralai/Mistral-7B-Instruct-v0.3": "<s>[INST] Be brief.\n\nHi![/INST] Hello.</s>[INST] Bye.[/INST]",
    "mistralai/Mistral-Nemo-Instruct-2407": "<s>[INST]Be brief.\n\nHi![/INST]Hello.</s>[INST]Bye.[/INST]",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "<s>[INST] Be brief. + Hi! [/INST]Hello.</s> [INST] Bye. [/INST]",
}


@pytest.mark.parametrize("model_id", CORE)
def test_core_models_have_a_format(model_id):
    stock = stock_generation_config(model_id)
    format = PromptFormat(**stock["prompt_format"])
    assert all(isinstance(sequence, str) for sequence in stock["stopping_sequences"])
    if model_id.startswith("meta-llama/"):
        assert format == PromptFormat(**PROMPT_FORMATS["llama3"])
        assert stock["stopping_sequences"] == ["<|end_of_text|>", "<|eot_id|>"]
    else:
        expected = WRITTEN[model_id if model_id in WRITTEN else f"{model_id}-v0.1"]
        assert format.render(CONVERSATION) == expected


@pytest.mark.real_tokenizers
@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("llama3", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("llama3_1", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
        ("mistral_nemo", "mistralai/Mistral-Nemo-Instruct-2407"),
    ],
)
def test_stock_prompts_have_the_ids_of_the_models_own_templates(name, model_id):
    """But for Nemo's system messages of conversations that go on, which its template moves to the last user turn."""
    tokenizer = load(name)
    ours = Encoder(tokenizer, PromptFormat(**stock_generation_config(model_id)["prompt_format"]))
    compared = 0
    for drawn in random_conversations(300, 4, orderly=True):
        has_system = drawn[0]["role"] == "system"
        if drawn[-1]["role"] != "user" or (name == "mistral_nemo" and has_system and len(drawn) > 2):
            continue
        messages = [{**message, "content": message["content"].strip() or "x"} for message in drawn]
        served = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ours.encode_prompt(messages) == served
        compared += 1
    assert compared > 50


def test_other_models_have_none():
    for model_id in ("meta-llama/Meta-Llama-3-8B", "meta-llama/meta-llama-3-8b-instruct", "llama", ""):
        assert stock_generation_config(model_id) is None


@pytest.fixture
def core_model(tmp_path, model_dir):
    """A tiny model, found under the name of a core one."""
    name = "meta-llama/Meta-Llama-3.1-8B-Instruct"
    shutil.copytree(model_dir, tmp_path / name)
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(8))
    return name


def test_a_core_models_format_is_used_and_recorded(core_model, tmp_path):
    config = write_config(tmp_path, core_model)
    preparation = prepare_run(load_config(config), Listener())
    assert preparation.encoder.format == PromptFormat(**PROMPT_FORMATS["llama3"])
    assert preparation.stop.sequences == ("<|end_of_text|>", "<|eot_id|>")
    assert preparation.encoder.fingerprint() == load_encoder(load_config(config)).fingerprint()
    resolved = preparation.config.to_yaml()
    assert f"stock format of {core_model}" in resolved
    section = yaml.safe_load(resolved)["generation_config"]
    assert section["prompt_format"]["user"] == PROMPT_FORMATS["llama3"]["user"]
    assert section["stopping_sequences"] == ["<|end_of_text|>", "<|eot_id|>"]
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved)
    assert prepare_run(load_config(again), Listener()).encoder.format == preparation.encoder.format


@pytest.mark.parametrize(
    ("section", "source"),
    [
        ({"prompt_format": {"use_hf_chat_templates": True}}, CHATML_TEMPLATE),
        ({"prompt_format": {"chat_template": chat_templates.MARKED}}, chat_templates.MARKED),
    ],
)
def test_a_format_in_the_config_has_precedence(section, source, core_model, tmp_path):
    config = write_config(tmp_path, core_model, generation_config=section)
    preparation = prepare_run(load_config(config), Listener())
    assert preparation.encoder.format.source == source
    assert preparation.stop.sequences == ()
    assert "stock format" not in preparation.config.to_yaml()


def test_stopping_sequences_in_the_config_have_precedence(core_model, tmp_path):
    config = write_config(tmp_path, core_model, generation_config={"stopping_sequences": ["<|eot_id|>"]})
    preparation = prepare_run(load_config(config), Listener())
    assert preparation.encoder.format == PromptFormat(**PROMPT_FORMATS["llama3"])
    assert preparation.stop.sequences == ("<|eot_id|>",)


def test_other_models_are_served_by_their_own_template(tmp_path, model_dir):
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(8))
    preparation = prepare_run(load_config(write_config(tmp_path, model_dir)), Listener())
    assert preparation.encoder.format.source == CHATML_TEMPLATE


def thinking_rows(count: int) -> list[dict]:
    """Rows of which the first half think in a turn that the conversation goes on from."""
    rows = []
    for number in range(count):
        thought = f"<think>\nhm {number}\n</think>\n\n" if number < count // 2 else ""
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"{number}?"},
                    {"role": "assistant", "content": f"{thought}{number}."},
                    {"role": "user", "content": "Sure?"},
                    {"role": "assistant", "content": "Yes."},
                ]
            }
        )
    return rows


def test_unrolled_conversations_are_told(tmp_path):
    model = save_model(tmp_path / "model", chat_template=chat_templates.THINKING)
    write_jsonl(tmp_path / "train.jsonl", thinking_rows(8))
    listener = Listener()
    preparation = prepare_run(load_config(write_config(tmp_path, model)), listener)
    assert len(preparation.train.dataset) == 12
    (note,) = [note for note in listener.notes if "samples" in note]
    assert note.startswith("4 of 8 conversations are trained as 8 samples, because the chat template writes earlier")
    assert "<think>\\nhm 0" in note
    assert "train.jsonl:1" in note


def test_nothing_is_told_where_nothing_is_unrolled(tmp_path):
    model = save_model(tmp_path / "model", chat_template=chat_templates.THINKING)
    write_jsonl(tmp_path / "train.jsonl", thinking_rows(8)[4:])
    listener = Listener()
    preparation = prepare_run(load_config(write_config(tmp_path, model)), listener)
    assert len(preparation.train.dataset) == 4
    assert not [note for note in listener.notes if "samples" in note]


def test_conversations_unrolled_because_tokens_merge_are_told(tmp_path, model_dir):
    """A turn that ends in a space, before one that begins with a letter: byte-level BPE joins them."""
    write_jsonl(
        tmp_path / "train.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "What is the capital of"},
                    {"role": "assistant", "content": "Fra"},
                    {"role": "user", "content": "nce. The capital of France is"},
                    {"role": "assistant", "content": "Paris."},
                ]
            }
        ],
    )
    passed = "{instruction}"
    format = {"system": passed, "user": passed, "assistant": passed, "trailing_assistant": ""}
    config = write_config(
        tmp_path,
        model_dir,
        generation_config={"prompt_format": format, "stopping_sequences": ["Fra", "Paris."]},
    )
    listener = Listener()
    prepare_run(load_config(config), listener)
    (note,) = [note for note in listener.notes if "samples" in note]
    assert note.startswith("1 of 1 conversations are trained as 2 samples, because tokens at the boundary of a turn")
