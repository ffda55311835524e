"""Formats inferred from chat templates: what is expressible is proven, what is not is named."""

import json
import random
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import chat_templates
from commands import llmforge
from conftest import PROMPT_FORMATS, build_tokenizer, random_conversation
from llmforge.errors import PromptFormatError
from llmforge.prompt import Encoder, PromptFormat, StopRules, build_format, compile_to_jinja
from llmforge.prompt.adversary import random_conversations
from llmforge.prompt.infer import infer_format


@pytest.fixture(scope="module")
def with_template():
    """One tokenizer, given the template that is asked for."""
    tokenizer = build_tokenizer()

    def give(template: str):
        tokenizer.chat_template = template
        return tokenizer

    return give


EXPRESSIBLE = {
    "CHATML": ("chatml", {"default_system_message": ""}),
    "CHATML_WITH_DEFAULT_SYSTEM": ("chatml", {"default_system_message": "Be good."}),
    "HEADERS_TRIMMED": ("llama3", {"bos": "<s>"}),
    "HEADERS_ALWAYS_ASKING": ("llama3", {"bos": "<s>"}),
    "FIXED_DATE": (
        "llama3",
        {
            "bos": "<s>",
            "system": "<|start_header_id|>system<|end_header_id|>\n\n"
            "Today Date: 26 Jul 2024\n\n{instruction}<|eot_id|>",
            "add_system_tags_even_if_message_is_empty": True,
        },
    ),
    "SYSTEM_IN_FIRST_USER": ("gemma2", {"bos": "<s>"}),
    "LLAMA_2": (
        "mistral",
        {
            "system": "<<SYS>>\n{instruction}\n<</SYS>>\n\n",
            "user": "<s>[INST] {system}{instruction} [/INST]",
            "assistant": " {instruction} </s>",
            "bos": "",
        },
    ),
    "REASONING_AND_TOOLS": ("chatml", {"default_system_message": ""}),
    "MARKED": ("chatml", {"default_system_message": ""}),
}


@pytest.mark.parametrize("name", list(EXPRESSIBLE))
def test_a_template_that_plain_templates_can_express_is_found(name, with_template):
    base, changes = EXPRESSIBLE[name]
    inference = infer_format(with_template(getattr(chat_templates, name)))
    assert inference.format == PromptFormat(**PROMPT_FORMATS[base] | changes)
    assert inference.conversations == 300
    assert inference.reasons == ()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("TODAYS_DATE", ["dates: .*strftime_now"]),
        ("SYSTEM_UNTRIMMED", [r"white space: .*\(system: no, user: yes, assistant: yes\)"]),
        ("SYSTEM_BEFORE_LAST_USER", ["system messages: .*last user turn"]),
        ("EOS_BEHIND_LAST", [r"per-turn conditions: behind the last assistant turn stands '<\|im_end\|>\\n</s>'"]),
        ("NUMBERED_TURNS", [r"per-turn conditions: .*\[Round 1\]", "generation prompt: an answer is asked for with"]),
        ("THINKING", ["thinking: <think>…</think> is dropped from earlier assistant turns"]),
    ],
)
def test_what_cannot_be_expressed_is_named(name, told, with_template):
    inference = infer_format(with_template(getattr(chat_templates, name)))
    assert inference.format is None
    assert inference.conversations == 0
    assert len(inference.reasons) == len(told)
    for reason, pattern in zip(inference.reasons, told, strict=True):
        assert re.match(pattern, reason), reason


@pytest.mark.parametrize(
    ("change", "told"),
    [
        # an empty block of thinking in front of the last answer, as Qwen 3's template has it
        (
            (
                "{{- '<|im_start|>assistant\\n' + content",
                "{{- '<|im_start|>assistant\\n' + ('<think></think>' if loop.last else '') + content",
            ),
            "thinking: an empty block '<think></think>'",
        ),
        (("split('</think>')", "split('</SECRET>')"), "content: the text of a message"),
        (("message.content + '<|im_end|>", "message.content | replace('a', 'b') + '<|im_end|>"), "content"),
        (("message.content + '<|im_end|>", "message.content ~ message.content + '<|im_end|>"), "written 2 times"),
        (("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif"), "generation prompt: .*<think>"),
    ],
)
def test_changes_of_a_thinking_template_are_named(change, told, with_template):
    template = chat_templates.THINKING
    assert change[0] in template
    inference = infer_format(with_template(template.replace(*change)))
    assert inference.format is None
    assert any(re.search(told, reason) for reason in inference.reasons), inference.reasons


@pytest.mark.parametrize("condition", ["messages[0].role == 'system'", "messages | length > 2"])
def test_a_date_that_some_conversations_have_is_seen(condition, with_template):
    date = "{% if " + condition + " %}{{ strftime_now('%Y-%m-%d') }}{% endif %}"
    inference = infer_format(with_template(date + chat_templates.CHATML))
    assert inference.format is None
    assert any(reason.startswith("dates: ") for reason in inference.reasons)


def test_an_answer_that_is_lost_is_not_called_thinking_that_is_dropped(with_template):
    changed = "(message['content'] | title if message['role'] == 'assistant' else message['content']) +"
    template = chat_templates.CHATML.replace("message['content'] +", changed)
    (reason, *_) = infer_format(with_template(template)).reasons
    assert reason.startswith("content: ")


def test_a_word_that_the_template_looks_for_is_tried(with_template):
    """A condition on content that no list of hostile texts holds is found in the template's own source."""
    template = chat_templates.CHATML.replace(
        "message['content'] +", "(message['content'] if 'open sesame' not in message['content'] else 'no') +"
    )
    inference = infer_format(with_template(template))
    assert inference.format is None
    assert "content: the text of a message" in inference.reasons[0]


def test_remarks_say_what_is_lost(with_template):
    def remarks(template: str) -> str:
        return "\n".join(infer_format(with_template(template)).remarks)

    plain = remarks(chat_templates.CHATML)
    rich = remarks(chat_templates.REASONING_AND_TOOLS)
    assert "tools:" in rich
    assert "reasoning_content:" in rich
    assert "tools:" not in plain
    assert "reasoning_content:" not in plain
    assert "always ends in '<|start_header_id|>assistant" in remarks(chat_templates.HEADERS_ALWAYS_ASKING)
    assert "the template refuses two messages of a role" in remarks(chat_templates.SYSTEM_IN_FIRST_USER)
    assert "the template refuses them" in remarks(chat_templates.NO_SYSTEM)
    switched = chat_templates.CHATML.replace("assistant\n' }}", "assistant\n' }}{% if shout %}{{ 'LOUD' }}{% endif %}")
    assert "switches: the template may be given shout" in remarks(switched)


@pytest.mark.parametrize("name", list(PROMPT_FORMATS))
def test_a_compiled_format_is_inferred_back(name, with_template):
    format = PromptFormat(**PROMPT_FORMATS[name])
    inference = infer_format(with_template(compile_to_jinja(format)), conversations=50)
    assert inference.format is not None, inference.reasons
    rng = random.Random(name)
    for _ in range(200):
        messages = random_conversation(rng)
        if any(message["role"] == "user" for message in messages):
            assert inference.format.render(messages) == format.render(messages)


WORDS = st.text("ab <>[]|{}\\\"'\n/:", max_size=6)


@settings(max_examples=80, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(WORDS, min_size=6, max_size=6),
    st.sampled_from(["", "<s>", "<B> "]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "Be good."]),
)
def test_any_compiled_format_is_inferred_back(with_template, texts, bos, in_user, strip, default):
    format = PromptFormat(
        system=texts[0] + "{instruction}" + texts[1],
        user=("{system}" if in_user else "") + texts[2] + "{instruction}" + texts[3],
        assistant=texts[4] + "{instruction}" + texts[5],
        trailing_assistant=texts[4],
        bos=bos,
        system_in_user=in_user,
        strip_whitespace=strip,
        default_system_message=default,
    )
    inference = infer_format(with_template(compile_to_jinja(format)), conversations=20)
    assert inference.format is not None, inference.reasons
    for messages in random_conversations(20, 1, orderly=True):
        for ask in (True, False):
            assert inference.format.render(messages, ask) == format.render(messages, ask)


@pytest.mark.parametrize("name", ["HEADERS_TRIMMED", "SYSTEM_IN_FIRST_USER", "CHATML_WITH_DEFAULT_SYSTEM"])
def test_a_template_with_one_character_changed_gives_another_format(name, with_template):
    template = getattr(chat_templates, name)
    original = infer_format(with_template(template), conversations=30).format
    for found in ("|>", "<|", "<start_of_turn>model", "good"):
        if found in template:
            changed = template.replace(found, found + "!")
            other = infer_format(with_template(changed), conversations=30)
            assert other.format != original


def test_stopping_sequences_stop_what_is_trained(with_template):
    tokenizer = with_template(chat_templates.SYSTEM_IN_FIRST_USER)
    inference = infer_format(tokenizer, conversations=20)
    assert inference.stopping_sequences == ("<end_of_turn>",)
    stop = StopRules.derive(Encoder(tokenizer, inference.format), inference.stopping_sequences, ())
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in stop.token_ids
    plain = with_template(chat_templates.CHATML.replace("<|im_end|>\n", "\nEND\n"))
    assert infer_format(plain, conversations=20).stopping_sequences == ("END",)
    endless = infer_format(with_template(chat_templates.CHATML.replace("<|im_end|>", "")), conversations=20)
    assert endless.stopping_sequences == ()
    assert any("stopping:" in remark for remark in endless.remarks)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, "no chat template to infer a format from"),
        ("{% for message in messages %}", "not valid Jinja"),
        ("{{ raise_exception('never') }}", "renders not even one user message.*never"),
    ],
)
def test_templates_that_cannot_be_watched(template, told, with_template):
    with pytest.raises(PromptFormatError, match=told):
        infer_format(with_template(template))


def test_the_command_writes_a_config_that_trains_alike(tmp_path):
    tokenizer = build_tokenizer(chat_template=chat_templates.SYSTEM_IN_FIRST_USER)
    tokenizer.save_pretrained(tmp_path)  # no weights, no config.json
    result = llmforge("prompt", "infer", tmp_path)
    assert result.code == 0, result.err
    assert "proven equal" in result.err
    section = yaml.safe_load(result.out)["generation_config"]
    assert section["stopping_sequences"] == ["<end_of_turn>"]
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    ours, own = (Encoder(reloaded, build_format(given, reloaded)) for given in (section["prompt_format"], None))
    rows = [
        {"messages": messages}
        for messages in random_conversations(60, 7, orderly=True)
        if any(message["role"] == "assistant" for message in messages)
    ]
    assert ours.encode_conversations(rows, "assistant") == own.encode_conversations(rows, "assistant")


def test_the_command_names_what_cannot_be_expressed(tmp_path):
    build_tokenizer(chat_template=chat_templates.THINKING).save_pretrained(tmp_path)
    result = llmforge("prompt", "infer", tmp_path)
    assert result.code == 0, result.err
    assert "# - thinking: <think>" in result.out
    assert yaml.safe_load(result.out) == {"generation_config": {"prompt_format": {"use_hf_chat_templates": True}}}
    as_json = json.loads(llmforge("prompt", "infer", tmp_path, "--json").out)
    assert as_json["expressible"] is False
    assert as_json["generation_config"] == {"prompt_format": {"use_hf_chat_templates": True}}
    assert as_json["reasons"]


def test_the_command_without_chat_template(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    result = llmforge("prompt", "infer", tmp_path)
    assert result.code == 2
    assert "no chat template" in result.err
    assert "Traceback" not in result.err
