"""The encoder: the same ids for training and serving, and loss on exactly what the model has to produce."""

import pickle
import random
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import chat_templates
from conftest import (
    CHATML_TEMPLATE,
    CORPUS,
    PROMPT_FORMATS,
    SPECIAL_TOKENS,
    build_tokenizer,
    random_conversation,
)
from llmforge.errors import ConversationError, PromptFormatError
from llmforge.prompt import (
    ChatTemplate,
    Encoder,
    PromptFormat,
    StopRules,
    build_format,
    chat_template_of,
    format_section,
    load_format,
    save_format,
)

PASS_THROUGH = PromptFormat(
    system="{instruction}", user="{instruction}", assistant="{instruction}", trailing_assistant=""
)
CHATML = PromptFormat(**PROMPT_FORMATS["chatml"] | {"default_system_message": ""})
LLAMA3_FIRST_RELEASE = (  # asks for an answer whether or not one is wanted
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
FORGETS_THINKING = (  # only the last answer keeps its thinking
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS_THE_LAST_TURN = (  # EOS behind the last turn alone
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKS_FIRST = CHATML_TEMPLATE.replace(
    "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>' }}{% endif"
)
ASKS_OTHERWISE = CHATML_TEMPLATE.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>bot\n' }}{% endif")


def template(source: str, tokenizer) -> ChatTemplate:
    return ChatTemplate(source, tokenizer, from_tokenizer=False)


def chat(*contents: str, system: str | None = None) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [
        {"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)
    ]


def encode(encoder: Encoder, messages, trained="assistant", **row):
    """Encode one row; raise what is wrong with it."""
    (result,) = encoder.encode_conversations([{"messages": messages, **row}], trained)
    if isinstance(result, ConversationError):
        raise result
    return result


def trained_text(encoder: Encoder, sample) -> str:
    return encoder.decode(
        [token for token, weight in zip(sample.input_ids, sample.loss_weights, strict=True) if weight]
    )


def direct_ids(tokenizer, text: str) -> list[int]:
    """Encode in one go, as a server does."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_row(encoder: Encoder, messages: list[dict]) -> int:
    """Check all that is promised of a row's samples; give their number."""
    (pieces_of_samples,) = encoder.explain([{"messages": messages}], "assistant")
    samples = encode(encoder, messages)
    assert len(samples) == len(pieces_of_samples)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = iter(zip(answers, encoder.format.turns(messages), strict=True))
    for sample, pieces in zip(samples, pieces_of_samples, strict=True):
        assert sample.input_ids == [token for piece in pieces for token in piece.input_ids]
        assert sample.loss_weights[0] == 0
        weights = [piece.weight for piece in pieces for _ in piece.input_ids]
        assert sample.loss_weights[1:] == weights[1:]
        before = []
        for piece in pieces:
            if piece.reason == "prompt":
                assert piece.weight == 0
            else:
                index, turn = next(turns)
                if index:
                    assert before == encoder.encode_prompt(messages[:index])
                    assert before == direct_ids(encoder.tokenizer, encoder.format.render(messages[:index]))
                assert encoder.decode(piece.input_ids) == turn.completion
                assert piece.weight == turn.weight
            before += piece.input_ids
    assert next(turns, None) is None
    return len(samples)


def system_first(messages: list[dict]) -> list[dict]:
    return sorted(messages, key=lambda message: message["role"] != "system")


def test_random_conversations_keep_every_promise(prompt_format, tokenizer):
    encoder = Encoder(tokenizer, prompt_format)
    rng = random.Random(7)
    for _ in range(150):
        messages = system_first(random_conversation(rng))
        roles = [message["role"] for message in messages]
        if roles[:2] != ["system", "assistant"] and "assistant" in roles:
            check_row(encoder, messages)


@pytest.mark.parametrize("source", [CHATML_TEMPLATE, LLAMA3_FIRST_RELEASE, FORGETS_THINKING])
def test_random_conversations_keep_every_promise_under_chat_templates(source, tokenizer):
    encoder = Encoder(tokenizer, template(source, tokenizer))
    rng = random.Random(8)
    for _ in range(150):
        messages = [message for message in random_conversation(rng) if message["role"] != "system"]
        if any(message["role"] == "assistant" for message in messages):
            check_row(encoder, messages)


def test_what_is_trained_and_what_is_not(tokenizer):
    encoder = Encoder(tokenizer, CHATML)
    (sample,) = encode(encoder, chat("Hi", "Hello!", "Bye", "Ciao.", system="Short."))
    assert encoder.decode(sample.input_ids) == CHATML.render(
        chat("Hi", "Hello!", "Bye", "Ciao.", system="Short."), False
    )
    assert trained_text(encoder, sample) == "Hello!<|im_end|>\nCiao.<|im_end|>\n"
    assert set(sample.loss_weights) == {0.0, 1.0}


def test_a_turn_of_weight_0_is_read_and_not_learned(tokenizer):
    encoder = Encoder(tokenizer, CHATML)
    messages = chat("Hi", "wrong", "Again", "right")
    messages[1]["weight"] = 0
    (sample,) = encode(encoder, messages)
    assert sample.input_ids == encode(encoder, chat("Hi", "wrong", "Again", "right"))[0].input_ids
    assert trained_text(encoder, sample) == "right<|im_end|>\n"
    (pieces,) = encoder.explain([{"messages": messages}], "assistant")[0]
    assert [(piece.reason, piece.weight) for piece in pieces] == [
        ("prompt", 0.0),
        ("weight 0", 0.0),
        ("prompt", 0.0),
        ("trained", 1.0),
    ]


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (chat("no answer"), "no assistant message"),
        ([*chat("q"), {"role": "assistant", "content": "a", "weight": 0}], "weight 0"),
        ([{"role": "robot", "content": "a"}], "robot"),
        ([], "empty"),
    ],
)
def test_rows_with_nothing_to_learn_are_said_to_be_so(messages, told, tokenizer):
    for format in (CHATML, template(CHATML_TEMPLATE, tokenizer)):
        good, bad, also_good = Encoder(tokenizer, format).encode_conversations(
            [{"messages": chat("q", "a")}, {"messages": messages}, {"messages": chat("r", "b")}], "assistant"
        )
        assert isinstance(bad, ConversationError)
        assert told in str(bad)
        assert len(good) == len(also_good) == 1


def test_an_answer_without_tokens_is_nothing_to_learn(tokenizer):
    with pytest.raises(ConversationError, match="empty"):
        encode(Encoder(tokenizer, PASS_THROUGH), chat("question", ""))
    (sample,) = encode(Encoder(tokenizer, CHATML), chat("question", ""))
    assert trained_text(Encoder(tokenizer, CHATML), sample) == "<|im_end|>\n"


def test_everything_is_trained_but_the_first_token(tokenizer):
    encoder = Encoder(tokenizer, CHATML)
    messages = chat("Hi", "Hello!", system="Short.")
    (sample,) = encode(encoder, messages, "everything")
    assert sample.input_ids == encoder.encode_text(CHATML.render(messages, False))
    assert sample.loss_weights == [0.0] + [1.0] * (len(sample.input_ids) - 1)


def test_a_lone_user_message_is_a_document(tokenizer):
    format = PromptFormat(**PROMPT_FORMATS["llama3"])
    (sample,) = encode(Encoder(tokenizer, format), chat("Once upon a time"), "everything")
    assert Encoder(tokenizer, format).decode(sample.input_ids) == "<|begin_of_text|>Once upon a time</s>"
    (sample,) = encode(Encoder(tokenizer, template(CHATML_TEMPLATE, tokenizer)), chat("Once"), "everything")
    assert tokenizer.decode(sample.input_ids) == "Once</s>"  # this tokenizer puts no BOS in front of text


def test_malformed_rows_are_refused_under_everything_too(tokenizer):
    for messages in ([], ["x"], [{"role": "user", "content": None}], [{"role": "user"}]):
        with pytest.raises(ConversationError):
            encode(Encoder(tokenizer, CHATML), messages, "everything")


def test_tools_need_a_chat_template(tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    encoder = Encoder(tokenizer, CHATML)
    for trained in ("assistant", "everything"):
        with pytest.raises(ConversationError, match="use_hf_chat_templates"):
            encode(encoder, chat("q", "a"), trained, tools=tools)
        assert encode(encoder, chat("q", "a"), trained, tools=None) == encode(encoder, chat("q", "a"), trained)
    with pytest.raises(ConversationError):
        encoder.encode_prompt(chat("q"), tools)
    source = "{% for t in tools or [] %}{{ 'tool ' + t['function']['name'] + '\n' }}{% endfor %}" + CHATML_TEMPLATE
    encoder = Encoder(tokenizer, template(source, tokenizer))
    assert encoder.decode(encoder.encode_prompt(chat("q"), tools)).startswith("tool add\n<|im_start|>user")
    (sample,) = encode(encoder, chat("q", "a"), tools=tools)
    assert encoder.decode(sample.input_ids).startswith("tool add\n<|im_start|>user")
    assert trained_text(encoder, sample) == "a<|im_end|>\n"


# Special tokens


def test_special_token_text_is_the_special_token_in_templates_and_content(tokenizer):
    encoder = Encoder(tokenizer, PASS_THROUGH)
    ids = encoder.encode_prompt(chat("<|begin_of_text|>Is this safe?<|eot_id|>"))
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert encoder.decode(ids) == "<|begin_of_text|>Is this safe?<|eot_id|>"


def test_no_second_bos_from_a_tokenizer_that_adds_one_by_itself():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")],
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    with_bos = PromptFormat(**PROMPT_FORMATS["mistral"])
    for format, count in ((with_bos, 1), (CHATML, 0), (template("{{ bos_token }}" + CHATML_TEMPLATE, tokenizer), 1)):
        encoder = Encoder(tokenizer, format)
        (sample,) = encode(encoder, chat("Hi", "Hello!", "Bye", "Ciao"))
        for ids in (encoder.encode_prompt(chat("Hi")), sample.input_ids):
            assert ids.count(tokenizer.bos_token_id) == count
        assert encoder.encode_prompt(chat("Hi"))[-1] != tokenizer.eos_token_id
    # A document gets the BOS that this tokenizer would have put there, once.
    (document,) = encode(Encoder(tokenizer, template(CHATML_TEMPLATE, tokenizer)), chat("Once"), "everything")
    assert tokenizer.decode(document.input_ids) == "<s>Once</s>"


def test_truncation_and_padding_in_a_tokenizer_file_are_ignored(tmp_path):
    plain = build_tokenizer()
    plain.backend_tokenizer.enable_truncation(4)
    plain.backend_tokenizer.enable_padding(length=64)
    plain.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoder = Encoder(tokenizer, CHATML)
    before = encoder.fingerprint()
    (sample,) = encode(encoder, chat("The quick brown fox jumps", "over the lazy dog."))
    assert (
        sample == encode(Encoder(build_tokenizer(), CHATML), chat("The quick brown fox jumps", "over the lazy dog."))[0]
    )
    assert encoder.fingerprint() == before == Encoder(build_tokenizer(), CHATML).fingerprint()


# Texts are cut at special tokens before they are encoded; that must not show.


@pytest.mark.parametrize(
    "added",
    [
        [],
        [AddedToken("<|im_end|>", lstrip=True, special=True, normalized=False)],
        [AddedToken("<|im_start|>", rstrip=True, special=True, normalized=False)],
        [AddedToken("<|im_start|>assistant", special=False, normalized=False)],
        [AddedToken("!<|im", special=False, normalized=False)],
        [AddedToken("\n<|im_start|>user", special=False, normalized=True), AddedToken("fox", normalized=True)],
    ],
)
def test_ids_are_those_of_the_whole_text(added):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(added)
    rng = random.Random(9)
    for format in (CHATML, template(CHATML_TEMPLATE, tokenizer)):
        encoder = Encoder(tokenizer, format)
        for _ in range(100):
            text = format.render(
                [message for message in random_conversation(rng) if message["role"] != "system"] or chat("x")
            )
            assert encoder.encode_text(text) == direct_ids(tokenizer, text)
        for text in (
            "Stop!<|im_start|>user\nfox <|im_end|>  <|im_start|>assistant",
            "<|im_start|>" * 3,
            "",
            " <|im_end|> \n",
        ):
            assert encoder.encode_text(text) == direct_ids(tokenizer, text)


def test_shared_stretches_do_not_mix_up_rows(tokenizer):
    encoder = Encoder(tokenizer, CHATML)
    rng = random.Random(10)
    rows = [{"messages": chat(*(rng.choice(CORPUS) for _ in range(2 * rng.randint(1, 4))))} for _ in range(50)]
    assert encoder.encode_conversations(rows, "assistant") == [encode(encoder, row["messages"]) for row in rows]


# Unrolling


def test_a_clean_conversation_is_one_sample(tokenizer):
    assert check_row(Encoder(tokenizer, CHATML), chat(*"abcdefgh")) == 1


def test_tokens_that_would_merge_across_the_start_of_an_answer_are_cut_where_a_server_cuts(tokenizer):
    encoder = Encoder(tokenizer, PASS_THROUGH)
    messages = chat("The capital of Fra", "nce is Paris.")
    prompt = encoder.encode_prompt(messages[:1])
    assert encoder.encode_text("The capital of France is Paris.")[: len(prompt)] != prompt  # they do merge
    (sample,) = encode(encoder, messages)
    assert sample.input_ids[: len(prompt)] == prompt
    assert trained_text(encoder, sample) == "nce is Paris."


def test_tokens_that_merge_across_the_end_of_an_answer_unroll_the_conversation(tokenizer):
    encoder = Encoder(tokenizer, PASS_THROUGH)
    messages = chat("The capital is ", "Par", "is, of France", ".")
    first, second = encode(encoder, messages)
    assert trained_text(encoder, first) == "Par"
    assert trained_text(encoder, second) == "."
    prompt = encoder.encode_prompt(messages[:3])
    assert second.input_ids[: len(prompt)] == prompt
    assert prompt[: len(first.input_ids)] != first.input_ids
    assert check_row(encoder, messages) == 2


def test_history_that_a_template_rewrites_is_unrolled(tokenizer):
    encoder = Encoder(tokenizer, template(FORGETS_THINKING, tokenizer))
    messages = chat("48/2", "<think>half</think>24", "and 72/3", "<think>third</think>24", "bye", "no thought")
    assert check_row(encoder, messages) == 3
    texts = [encoder.decode(sample.input_ids) for sample in encode(encoder, messages)]
    assert "<think>half" in texts[0]
    assert "<think>half" not in texts[1]
    assert "<think>third" in texts[1]
    assert "<think>" not in texts[2]
    # Where nothing is rewritten, nothing is unrolled.
    assert check_row(encoder, chat("a", "b", "c", "<think>d</think>e")) == 1


def test_an_unrolled_turn_of_weight_0_is_no_sample(tokenizer):
    encoder = Encoder(tokenizer, template(FORGETS_THINKING, tokenizer))
    messages = chat("q", "<think>x</think>a", "r", "<think>y</think>b")
    messages[1]["weight"] = 0
    (sample,) = encode(encoder, messages)
    assert trained_text(encoder, sample) == "<think>y</think>b<|im_end|>\n"


# Chat templates


def test_the_stray_header_of_the_next_answer_is_not_part_of_a_turn(tokenizer):
    format = template(LLAMA3_FIRST_RELEASE, tokenizer)
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert format.stray_suffix == header
    encoder = Encoder(tokenizer, format)
    (sample,) = encode(encoder, chat("Hi", "Hello!", "Bye", "Ciao."))
    assert trained_text(encoder, sample) == "Hello!<|eot_id|>Ciao.<|eot_id|>"
    assert encoder.decode(sample.input_ids).endswith("Ciao.<|eot_id|>")
    (everything,) = encode(encoder, chat("Hi", "Hello!"), "everything")
    assert encoder.decode(everything.input_ids).endswith("Hello!<|eot_id|>")
    # What is rendered stays what the template says.
    assert format.render(chat("Hi", "Hello!"), False).endswith(header)
    # A default system message changes none of it, though it ends as turns do and stands before the first user header.
    source = chat_templates.HEADERS_ALWAYS_ASKING_WITH_DEFAULT_SYSTEM
    encoder = Encoder(tokenizer, template(source, tokenizer))
    (sample,) = encode(encoder, chat("Hi", "Hello!", "Bye", "Ciao."))
    assert trained_text(encoder, sample) == "Hello!<|eot_id|>Ciao.<|eot_id|>"


@pytest.mark.parametrize("source", [CHATML_TEMPLATE, FORGETS_THINKING, ENDS_THE_LAST_TURN])
def test_other_templates_have_no_stray_suffix(source, tokenizer):
    assert template(source, tokenizer).stray_suffix == ""


def test_compiled_templates_have_no_stray_suffix(prompt_format, tokenizer):
    assert template(chat_template_of(prompt_format), tokenizer).stray_suffix == ""


def test_an_end_that_only_the_last_turn_has_is_learned(tokenizer):
    encoder = Encoder(tokenizer, template(ENDS_THE_LAST_TURN, tokenizer))
    first, second = encode(encoder, chat("Hi", "Hello!", "Bye", "Ciao."))
    assert trained_text(encoder, first) == "assistant: Hello!\n</s>"
    assert trained_text(encoder, second) == "assistant: Ciao.\n</s>"


@pytest.mark.parametrize("source", [CHATML_TEMPLATE, LLAMA3_FIRST_RELEASE])
def test_an_assistant_that_speaks_first_learns_no_header(source, tokenizer):
    encoder = Encoder(tokenizer, template(source, tokenizer))
    messages = [{"role": "assistant", "content": "Welcome!"}, *chat("Hi", "Hello!")]
    (sample,) = encode(encoder, messages)
    end = "<|im_end|>\n" if source == CHATML_TEMPLATE else "<|eot_id|>"
    assert trained_text(encoder, sample) == f"Welcome!{end}Hello!{end}"


def test_a_template_and_its_explicit_format_agree(tokenizer):
    rng = random.Random(11)
    ours, theirs = Encoder(tokenizer, CHATML), Encoder(tokenizer, template(CHATML_TEMPLATE, tokenizer))
    for _ in range(100):
        # The plain template writes an empty system message too; ours does not.
        messages = [m for m in random_conversation(rng) if m["role"] != "system"]
        assert ours.encode_prompt(messages) == theirs.encode_prompt(messages)
        if any(message["role"] == "assistant" for message in messages):
            assert encode(ours, messages) == encode(theirs, messages)


@pytest.mark.parametrize("name", list(PROMPT_FORMATS))
def test_a_compiled_template_trains_what_its_format_trains(name, tokenizer):
    format = PromptFormat(**PROMPT_FORMATS[name])
    compiled = template(chat_template_of(format), tokenizer)
    messages = chat("Hi", "Hello!", "Bye", "Ciao.", system="Be brief.")
    ours = Encoder(tokenizer, format).encode_conversations([{"messages": messages}], "assistant")
    assert Encoder(tokenizer, compiled).encode_conversations([{"messages": messages}], "assistant") == ours


def test_a_generation_prompt_that_does_not_begin_the_turn_is_an_error_of_the_format(tokenizer):
    encoder = Encoder(tokenizer, template(ASKS_OTHERWISE, tokenizer))
    with pytest.raises(PromptFormatError, match="generation prompt") as caught:
        encoder.encode_conversations([{"messages": chat("q", "a")}], "assistant")
    assert "prompt_format" in str(caught.value)  # what to do instead
    assert len(encoder.encode_conversations([{"messages": chat("q", "a")}], "everything")[0]) == 1
    assert encoder.encode_prompt(chat("q"))  # it can be served all the same


def test_an_answer_without_thinking_is_an_error_of_its_row_where_thinking_is_opened(tokenizer):
    encoder = Encoder(tokenizer, template(THINKS_FIRST, tokenizer))
    rows = [{"messages": chat("q", answer)} for answer in ("a", "<think>hm</think>a")]
    bad, good = encoder.encode_conversations(rows, "assistant")
    assert isinstance(bad, ConversationError)
    assert "opens <think>" in str(bad)
    assert "prompt_format" in str(bad)  # what to do instead
    (sample,) = good
    trained = [token for token, weight in zip(sample.input_ids, sample.loss_weights, strict=True) if weight]
    assert encoder.decode(trained) == "hm</think>a<|im_end|>\n"


def test_one_odd_conversation_is_an_error_of_its_row(tokenizer):
    # Of two answers in a row, only the last is written.
    source = CHATML_TEMPLATE.replace("message['content'] +", "(message['content'] if loop.index0 < 2 else '') +")
    encoder = Encoder(tokenizer, template(source, tokenizer))
    odd = [*chat("q", "a"), {"role": "assistant", "content": "b"}]
    good, bad = encoder.encode_conversations([{"messages": chat("q", "a")}, {"messages": odd}], "assistant")
    assert len(good) == 1
    assert isinstance(bad, ConversationError)


def test_what_a_template_writes_of_history_may_depend_on_the_answer(tokenizer):
    """The first of two answers has a mark in front until the second is there."""
    mark = "('!' if loop.last and message['role'] == 'assistant' else '')"
    source = CHATML_TEMPLATE.replace("message['content'] +", f"{mark} + message['content'] +")
    encoder = Encoder(tokenizer, template(source, tokenizer))
    messages = [*chat("q", "a"), {"role": "assistant", "content": "b"}]
    (sample,) = encode(encoder, messages)
    assert trained_text(encoder, sample) == "!a<|im_end|>\n!b<|im_end|>\n"
    text = encoder.decode(sample.input_ids)
    assert text == encoder.format.render(messages[:2]) + "!b<|im_end|>\n"
    assert text.startswith(encoder.format.render(messages[:1]) + "!a<|im_end|>\n")


def test_a_system_message_that_moves_to_the_last_user_turn_is_learned_where_it_is_served(tokenizer):
    encoder = Encoder(tokenizer, template(chat_templates.SYSTEM_BEFORE_LAST_USER, tokenizer))
    messages = [{"role": "system", "content": "Be brief."}, *chat("q", "a", "r", "b")]
    first, second = encode(encoder, messages)
    assert encoder.decode(first.input_ids) == "<s>[INST] Be brief.\n\nq[/INST] a</s>"
    assert encoder.decode(second.input_ids) == "<s>[INST] q[/INST] a</s>[INST] Be brief.\n\nr[/INST] b</s>"
    assert [trained_text(encoder, sample) for sample in (first, second)] == [" a</s>", " b</s>"]


def test_a_template_that_changes_the_answer_is_refused(tokenizer):
    source = CHATML_TEMPLATE.replace("message['content']", "message['content'] | upper")
    with pytest.raises(ConversationError, match="changes the assistant's text"):
        encode(Encoder(tokenizer, template(source, tokenizer)), chat("q", "answer"))
    stripping = CHATML_TEMPLATE.replace("message['content']", "message['content'] | trim")
    encoder = Encoder(tokenizer, template(stripping, tokenizer))
    assert trained_text(encoder, encode(encoder, chat("q", " answer\n"))[0]) == "answer<|im_end|>\n"


def test_a_template_does_not_see_weights(tokenizer):
    format = template("{% for m in messages %}{{ m | tojson }}{% endfor %}", tokenizer)
    assert format.render([{"role": "user", "content": "q", "weight": 1}]) == '{"role": "user", "content": "q"}'


def test_a_template_may_refuse_a_conversation(tokenizer):
    source = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML_TEMPLATE
    encoder = Encoder(tokenizer, template(source, tokenizer))
    good, bad = encoder.encode_conversations(
        [{"messages": chat("q", "a")}, {"messages": chat("q", "a", "r", "b")}], "assistant"
    )
    assert len(good) == 1
    assert "too long" in str(bad)


@pytest.mark.parametrize("expression", ["1 / 0", "messages[0]['content'] + 1", "nothing.at.all", "dict(1)", "2 ** 'x'"])
def test_a_template_that_fails_says_so(expression, tokenizer):
    with pytest.raises(ConversationError, match="refuses"):
        Encoder(tokenizer, template("{{ " + expression + " }}", tokenizer)).encode_prompt(chat("q"))


@pytest.mark.parametrize("source", ["{% for m in messages %}", "{{ messages | no_such_filter }}", "{{", "{% nope %}"])
def test_a_template_that_is_not_jinja(source, tokenizer):
    with pytest.raises(PromptFormatError, match="not valid Jinja"):
        build_format({"chat_template": source}, tokenizer)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__",
        "messages.__class__.__base__.__subclasses__()",
        "messages.append(1)",
        "cycler.__init__.__globals__",
    ],
)
def test_a_template_cannot_leave_the_sandbox(expression, tokenizer):
    with pytest.raises(PromptFormatError, match="sandbox"):
        build_format({"chat_template": "{{ " + expression + " }}"}, tokenizer)


# Tokenizers that put a space in front of a beginning


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """Build what SentencePiece models become in `tokenizers`."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    scheme = "first" if kind == "bpe first" else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    rng = random.Random(0)
    tokenizer.train_from_iterator((" ".join(rng.choices(CORPUS, k=12)) for _ in range(300)), trainer)
    if kind == "unigram":
        pieces = [(token, -10.0) for token in byte_tokens]
        learned = [(tokenizer.id_to_token(index), -float(index) / 20) for index in range(tokenizer.get_vocab_size())]
        unigram = Tokenizer(models.Unigram([*learned, *pieces], 0, byte_fallback=True))
        unigram.pre_tokenizer = tokenizer.pre_tokenizer
        tokenizer = unigram
    if kind == "bpe normalizer":  # Llama 2's way
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=["unigram", "bpe always", "bpe first", "bpe normalizer"])
def spaced_tokenizer(request):
    return sentencepiece_like(request.param)


@pytest.mark.parametrize(
    ("user", "trailing", "assistant", "end"),
    [
        ("Q: {instruction}\n", "A:", "A: {instruction}", "\n"),
        ("Q: {instruction}\n", "A: ", "A: {instruction}", "\n"),
        ("[INST] {instruction} [/INST]", "", "{instruction}", "</s>"),
        ("[INST] {instruction} [/INST]", "", " {instruction}", "</s>"),
        ("<|im_start|>user\n{instruction}<|im_end|>\n", "<|im_start|>", "<|im_start|>{instruction}", "<|im_end|>"),
        ("{instruction}", "", "{instruction}", ""),
    ],
)
@pytest.mark.parametrize("answer", ["24 clips", "Paris.", " safe", "\n\nunsafe\nS1", "你好 👍", ".", "1"])
def test_an_answer_gains_no_space(spaced_tokenizer, user, trailing, assistant, end, answer):
    format = PromptFormat(
        system="{instruction}", user=user, assistant=assistant + end, trailing_assistant=trailing, bos="<s>"
    )
    encoder = Encoder(spaced_tokenizer, format)
    messages = chat("How many clips?", answer)
    (sample,) = encode(encoder, messages)
    prompt = encoder.encode_prompt(messages[:1])
    assert sample.input_ids[: len(prompt)] == prompt
    assert not any(sample.loss_weights[: len(prompt)])
    assert all(sample.loss_weights[len(prompt) :])
    whole = format.render(messages, False)
    assert encoder.decode(sample.input_ids) == encoder.decode(direct_ids(spaced_tokenizer, whole))


def test_cutting_at_special_tokens_does_not_show_in_spaced_tokenizers(spaced_tokenizer):
    rng = random.Random(12)
    for name in ("chatml", "mistral", "llama3"):
        encoder = Encoder(spaced_tokenizer, PromptFormat(**PROMPT_FORMATS[name]))
        for _ in range(60):
            text = encoder.format.render([{"role": "user", "content": "?"}, *random_conversation(rng)])
            assert encoder.encode_text(text) == direct_ids(spaced_tokenizer, text)


# Fingerprint and pickling


def test_the_fingerprint_changes_with_all_that_decides_the_ids(tokenizer):
    other_bos, other_vocabulary, more = build_tokenizer(bos="<bos>"), build_tokenizer(300), build_tokenizer()
    more.add_tokens(["<label_0>"])
    encoders = [
        Encoder(tokenizer, CHATML),
        Encoder(tokenizer, CHATML.model_copy(update={"strip_whitespace": True})),
        Encoder(tokenizer, PromptFormat(**PROMPT_FORMATS["llama3"])),
        Encoder(tokenizer, template(CHATML_TEMPLATE, tokenizer)),
        Encoder(tokenizer, template(FORGETS_THINKING, tokenizer)),
        Encoder(other_bos, CHATML),
        Encoder(other_vocabulary, CHATML),
        Encoder(more, CHATML),
    ]
    assert len({encoder.fingerprint() for encoder in encoders}) == len(encoders)
    assert Encoder(build_tokenizer(), CHATML).fingerprint() == encoders[0].fingerprint()
    padded = build_tokenizer()
    padded(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert Encoder(padded, CHATML).fingerprint() == encoders[0].fingerprint()


def test_the_fingerprint_is_the_same_in_another_process(tmp_path, tokenizer):
    (tmp_path / "encoder.pickle").write_bytes(pickle.dumps(Encoder(tokenizer, template(CHATML_TEMPLATE, tokenizer))))
    program = (
        "import pickle, sys; encoder = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(encoder.fingerprint(), encoder.encode_prompt([{'role': 'user', 'content': 'Hi!'}]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "encoder.pickle")], capture_output=True, text=True, check=True
    ).stdout
    encoder = Encoder(tokenizer, template(CHATML_TEMPLATE, tokenizer))
    assert out.strip() == f"{encoder.fingerprint()} {encoder.encode_prompt(chat('Hi!'))}"


@pytest.mark.parametrize("kind", ["explicit", "template"])
def test_a_pickled_encoder_encodes_alike(kind, tokenizer):
    encoder = Encoder(tokenizer, CHATML if kind == "explicit" else template(LLAMA3_FIRST_RELEASE, tokenizer))
    copy = pickle.loads(pickle.dumps(encoder))
    rows = [{"messages": chat("Hi", "Hello!", "Bye", "Ciao.")}]
    assert copy.encode_conversations(rows, "assistant") == encoder.encode_conversations(rows, "assistant")
    assert copy.fingerprint() == encoder.fingerprint()


# Building, saving and loading formats


def test_a_section_decides_the_format(tokenizer, chatml_tokenizer):
    assert build_format(PROMPT_FORMATS["llama3"], chatml_tokenizer) == PromptFormat(**PROMPT_FORMATS["llama3"])
    assert (
        build_format(PROMPT_FORMATS["llama3"] | {"use_hf_chat_templates": False}, tokenizer).bos == "<|begin_of_text|>"
    )
    for section in (None, {}, {"use_hf_chat_templates": True}):
        own = build_format(section, chatml_tokenizer)
        assert isinstance(own, ChatTemplate)
        assert own.from_tokenizer
        assert own.source == CHATML_TEMPLATE
    given = build_format({"chat_template": FORGETS_THINKING}, chatml_tokenizer)
    assert (given.source, given.from_tokenizer) == (FORGETS_THINKING, False)


@pytest.mark.parametrize("section", [None, {}, {"use_hf_chat_templates": True}])
def test_a_tokenizer_without_template_needs_a_section(section, tokenizer):
    with pytest.raises(PromptFormatError, match="has no chat template") as caught:
        build_format(section, tokenizer)
    assert "trailing_assistant:" in str(caught.value)  # what to write


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"user": "x"}, r"user: .*\{instruction\}"),
        ({"system_in_user": True}, r"\{system\}"),
        ({"unknown": 1}, "unknown"),
        ({"bos": 3}, "bos"),
    ],
)
def test_a_wrong_section_is_an_error_that_names_the_key(change, told, tokenizer):
    with pytest.raises(PromptFormatError, match=told):
        build_format(PROMPT_FORMATS["chatml"] | change, tokenizer)


def test_plain_text_needs_no_format(tokenizer):
    encoder = Encoder(tokenizer, build_format(None, tokenizer, plain_text=True))
    (sample,) = encode(encoder, chat("Once upon a time"), "everything")
    assert encoder.decode(sample.input_ids) == "Once upon a time</s>"


@pytest.mark.parametrize("kind", ["explicit", "own template", "given template"])
def test_a_saved_format_is_loaded_as_it_was(kind, tmp_path, chatml_tokenizer):
    section = {
        "explicit": PROMPT_FORMATS["gemma2"] | {"default_system_message": "\x85\r\n\t“quoted” 'x' \\ # : {} 你好 👍 "},
        "own template": None,
        "given template": {"chat_template": FORGETS_THINKING},
    }[kind]
    format = build_format(section, chatml_tokenizer)
    stop = StopRules(sequences=("<|im_end|>", "\n\nUser:", "\x85"), token_ids=(2, 4))
    save_format(tmp_path, format, stop)
    encoder, loaded_stop = load_format(tmp_path, chatml_tokenizer)
    assert loaded_stop == stop
    assert type(encoder.format) is type(format)
    assert format_section(encoder.format) == format_section(format)
    assert encoder.fingerprint() == Encoder(chatml_tokenizer, format).fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["prompt_format.yaml"]


def test_every_value_of_a_saved_format_is_written_out(tmp_path, tokenizer):
    save_format(tmp_path, CHATML, StopRules())
    text = (tmp_path / "prompt_format.yaml").read_text()
    assert all(f"  {key}: " in text for key in PromptFormat.model_fields)


@pytest.mark.parametrize(
    "content", [None, "", "[", "[]", "prompt_format: 3", "prompt_format: {system: x}", "stopping_tokens: []", "a: \x00"]
)
def test_a_missing_or_damaged_file_is_said_to_be_so(content, tmp_path, tokenizer):
    if content is not None:
        (tmp_path / "prompt_format.yaml").write_text(content)
    with pytest.raises(PromptFormatError, match="prompt_format"):
        load_format(tmp_path, tokenizer)


# Where generation ends


def test_answers_and_calls_that_end_differently_both_stop(tokenizer):
    """And a token that stands within the turn does not, though it is the first special one behind the text."""
    format = template(chat_templates.CHANNELS, tokenizer)
    ends = Encoder(tokenizer, format).stop_token_ids()
    assert [tokenizer.decode([token]) for token in ends] == ["<end_of_turn>", "<|eot_id|>"]
    closing = chat_templates.CHANNELS.replace("'<end_of_turn>'", "'<|end_header_id|><end_of_turn>'")
    ends = Encoder(tokenizer, template(closing, tokenizer)).stop_token_ids()
    assert [tokenizer.decode([token]) for token in ends] == ["<end_of_turn>", "<|eot_id|>"]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("llama3", "<|eot_id|>"),
        ("mistral", "</s>"),
        ("gemma2", "<end_of_turn>"),
        ("chatml", "<|im_end|>"),
        ("llama_guard2", "<|eot_id|>"),
    ],
)
def test_eos_and_the_end_of_turn_stop(name, end, tokenizer):
    encoder = Encoder(tokenizer, PromptFormat(**PROMPT_FORMATS[name]))
    stop = StopRules.derive(encoder, [], [])
    assert set(stop.token_ids) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    assert len(stop.token_ids) == len(set(stop.token_ids))
    assert stop.sequences == ()


def test_stop_rules_of_templates_and_of_the_user(tokenizer):
    encoder = Encoder(tokenizer, template(LLAMA3_FIRST_RELEASE, tokenizer))
    start, pad = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<pad>"])
    stop = StopRules.derive(encoder, ["<|im_start|>", "\n\n", "a"], [pad])
    assert stop.sequences == ("<|im_start|>", "\n\n", "a")
    assert stop.token_ids[:2] == (pad, start)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in stop.token_ids
    assert encoder.encode_text("a")[0] not in stop.token_ids  # an ordinary token is no special one
    assert StopRules.derive(Encoder(tokenizer, PASS_THROUGH), [], []).token_ids == (tokenizer.eos_token_id,)


def test_a_format_that_cannot_be_trained_still_stops_at_eos(tokenizer):
    encoder = Encoder(tokenizer, template(THINKS_FIRST, tokenizer))
    assert tokenizer.eos_token_id in StopRules.derive(encoder, [], []).token_ids


def test_text_is_cut_at_the_first_stop_sequence():
    stop = StopRules(sequences=("</s>", "\nUser:", "\nUs"))
    assert stop.cut("Hello.\nUser: hi</s>") == "Hello."
    assert stop.cut("Hello.</s>\nUser: hi") == "Hello."
    assert stop.cut("</s>") == ""
    assert stop.cut("Hello.") == "Hello."
    assert StopRules().cut("x") == "x"


def test_streaming_holds_back_what_may_become_a_stop_sequence():
    stop = StopRules(sequences=("</s>", "\nUser:"))
    assert [stop.held_back(text) for text in ("Hi", "Hi<", "Hi</", "Hi</s", "Hi\n", "Hi\nUse", "Hi<\nUser", "")] == [
        0, 1, 2, 3, 1, 4, 5, 0,
    ]  # fmt: skip
    assert StopRules().held_back("anything") == 0
    rng = random.Random(13)
    for _ in range(300):
        text = "".join(rng.choices("<s/>\nUser: ", k=30)) + "</s>" + "".join(rng.choices("ab<", k=5))
        streamed, shown = "", ""
        for character in text:
            streamed += character
            cut = stop.cut(streamed)
            if cut != streamed:
                shown += cut[len(shown) :]
                break
            shown = cut[: len(cut) - stop.held_back(cut)]
        assert shown == stop.cut(text)
