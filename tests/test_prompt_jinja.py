"""The compiled chat template: what plain transformers renders from a saved tokenizer is what we encode, id for id."""

import json
import random

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import HOSTILE_TEXTS, PROMPT_FORMATS, build_tokenizer, random_conversation
from llmforge.errors import ConversationError
from llmforge.prompt import Encoder, PromptFormat, chat_template_of, compile_to_jinja

PER_FORMAT = 1500  # conversations; there are five formats
SPECIAL = {"llama3": "<|begin_of_text|>", "gemma2": "<bos>"}


def save_and_reload(directory, format, tokenizer):
    """Save a tokenizer with the compiled template, as an artifact does, and read it back as a server does."""
    tokenizer.chat_template = chat_template_of(format)
    tokenizer.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def served_ids(tokenizer, messages, add_generation_prompt):
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )


def renders(tokenizer, messages, add_generation_prompt, template=None):
    """Render with transformers; None where the template refuses."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except jinja2.TemplateError:
        return None


@pytest.mark.parametrize("name", list(PROMPT_FORMATS))
def test_a_saved_tokenizer_encodes_random_conversations_as_we_do(name, tmp_path):
    format = PromptFormat(**PROMPT_FORMATS[name])
    tokenizer = build_tokenizer(bos=SPECIAL.get(name, "<s>"))
    encoder = Encoder(tokenizer, format)
    server = save_and_reload(tmp_path, format, build_tokenizer(bos=SPECIAL.get(name, "<s>")))
    rng = random.Random(name)
    rendered, refused = 0, 0
    while rendered < PER_FORMAT:
        messages = random_conversation(rng)
        try:
            text = format.render(messages, False)
        except ConversationError:
            assert renders(server, messages, False) is None
            refused += 1
            continue
        assert renders(server, messages, False) == text
        assert served_ids(server, messages, True) == encoder.encode_prompt(messages)
        if rendered % 5 == 0:
            assert served_ids(server, messages, False) == encoder.encode_text(text)
        rendered += 1
    assert bool(refused) == format.system_in_user  # a system message without a user turn


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}],
        [{"role": "system", "content": ""}, {"role": "user", "content": "c"}, {"role": "system", "content": ""}],
        [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
        [{"role": "human", "content": "a"}],
    ],
)
def test_the_template_refuses_what_we_refuse(prompt_format, messages, tokenizer):
    with pytest.raises(ConversationError):
        prompt_format.render(messages)
    with pytest.raises(jinja2.TemplateError):
        tokenizer.apply_chat_template(messages, chat_template=compile_to_jinja(prompt_format), tokenize=False)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@pytest.mark.parametrize("default", ["", "Default."])
def test_the_template_refuses_a_system_message_without_user_turn(name, default, tokenizer):
    format = PromptFormat(**PROMPT_FORMATS[name] | {"default_system_message": default})
    system, assistant = {"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}
    for messages in ([system], [system, assistant], *([[assistant]] if default else [])):
        with pytest.raises(ConversationError):
            format.render(messages)
        with pytest.raises(jinja2.TemplateError):
            tokenizer.apply_chat_template(messages, chat_template=compile_to_jinja(format), tokenize=False)


# Pieces that Jinja, JSON or a regular expression could trip over, and the placeholders themselves.
PIECES = st.one_of(
    st.sampled_from(HOSTILE_TEXTS),
    st.sampled_from(("-", "+", "#}", "{{-", "{% raw %}{{ messages }}{% endraw %}", "{instruction}", "{system}")),
    st.text(max_size=4),
)
FREE = st.lists(PIECES, max_size=6).map("".join)


@st.composite
def formats(draw):
    filled = [draw(FREE) + "{instruction}" + draw(FREE) for _ in range(3)]
    system_in_user = draw(st.booleans())
    return PromptFormat(
        system=filled[0],
        user=filled[1] + ("{system}" if system_in_user else ""),
        assistant=filled[2],
        trailing_assistant=draw(FREE),
        bos=draw(FREE),
        system_in_user=system_in_user,
        default_system_message=draw(FREE),
        strip_whitespace=draw(st.booleans()),
        add_system_tags_even_if_message_is_empty=draw(st.booleans()),
    )


MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": FREE}),
    min_size=1,
    max_size=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(formats(), st.lists(MESSAGES, min_size=1, max_size=3), st.booleans())
def test_any_format_compiles_to_a_template_that_renders_alike(tokenizer, format, conversations, add_generation_prompt):
    template = compile_to_jinja(format)
    for messages in conversations:
        try:
            expected = format.render(messages, add_generation_prompt)
        except ConversationError:
            expected = None
        assert renders(tokenizer, messages, add_generation_prompt, template) == expected


def test_the_template_ignores_other_keys_of_a_message(prompt_format, tokenizer):
    bare = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    full = [bare[0] | {"name": "Ann"}, bare[1] | {"weight": 0}]
    template = compile_to_jinja(prompt_format)
    assert renders(tokenizer, full, True, template) == prompt_format.render(bare) == prompt_format.render(full)


def mutations(template: str, format: PromptFormat, rng: random.Random, count: int) -> list[str]:
    """Change single characters of the texts that a template writes, keeping it valid Jinja."""
    written = [
        piece
        for text in (format.bos, format.system, format.user, format.assistant, format.trailing_assistant)
        for piece in text.replace("{system}", "\0").replace("{instruction}", "\0").split("\0")
        if len(piece) > 1
    ]
    mutated = []
    while len(mutated) < count:
        literal = json.dumps(rng.choice(written), ensure_ascii=False)
        start = rng.choice([i for i in range(len(template)) if template.startswith(literal, i)])
        position = start + rng.randrange(1, len(literal) - 1)
        change = rng.choice([template[position] * 2, "", rng.choice("aZ_< ")])
        candidate = template[:position] + change + template[position + 1 :]
        try:
            jinja2.Environment().parse(candidate)
        except jinja2.TemplateSyntaxError:
            continue
        if candidate != template:
            mutated.append(candidate)
    return mutated


def differs(tokenizer, format, template, conversations) -> bool:
    return any(
        renders(tokenizer, messages, add_generation_prompt, template) != format.render(messages, add_generation_prompt)
        for messages in conversations
        for add_generation_prompt in (True, False)
    )


def conversations_for(seed: str) -> list[list[dict]]:
    """Random conversations that every format can render, all roles among them."""
    rng = random.Random(seed)
    drawn = (random_conversation(rng) for _ in range(60))
    return [messages for messages in drawn if any(message["role"] == "user" for message in messages)]


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma2", "chatml"])
def test_a_template_with_one_character_changed_is_caught(name, tokenizer):
    format = PromptFormat(**PROMPT_FORMATS[name])
    template = compile_to_jinja(format)
    conversations = conversations_for(name)
    assert not differs(tokenizer, format, template, conversations)
    for mutated in mutations(template, format, random.Random(name), 25):
        assert differs(tokenizer, format, mutated, conversations), mutated


@pytest.mark.parametrize(
    ("name", "found", "put"),
    [
        ("gemma2", "found.count > 1", "found.count > 0"),
        ("gemma2", "set found.text = ''", "set found.text = 'x'"),
        ("gemma2", "['content'] | trim", "['content']"),
        ("chatml", "== 'system'", "!= 'system'"),
        ("chatml", "== 'assistant'", "== 'Assistant'"),
        ("chatml", "if found.system ", "if true "),
        ("chatml", "if add_generation_prompt", "if not add_generation_prompt"),
        ("llama_guard2", "set found.text = found.system", "set found.text = ''"),
    ],
)
def test_a_template_with_changed_logic_is_caught(name, found, put, tokenizer):
    format = PromptFormat(**PROMPT_FORMATS[name])
    template = compile_to_jinja(format)
    assert found in template
    assert differs(tokenizer, format, template.replace(found, put), conversations_for(name))


def test_a_mutated_template_in_a_saved_tokenizer_gives_other_ids(tmp_path):
    format = PromptFormat(**PROMPT_FORMATS["llama3"])
    encoder = Encoder(build_tokenizer(), format)
    server = save_and_reload(tmp_path, format, build_tokenizer())
    messages = [{"role": "user", "content": "Hi!"}]
    assert served_ids(server, messages, True) == encoder.encode_prompt(messages)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<|eot_id|>", "<|eot_id>"), encoding="utf-8")
    assert served_ids(AutoTokenizer.from_pretrained(tmp_path), messages, True) != encoder.encode_prompt(messages)
