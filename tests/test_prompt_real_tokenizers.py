"""The encoder's promises with tokenizers and chat templates of published models.

They are fetched by `make install-tokenizers`; LLMFORGE_TOKENIZERS names another folder that holds a directory for each.
"""

import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import CHATML_TEMPLATE, PROMPT_FORMATS, build_tokenizer, random_conversation
from llmforge.errors import ConversationError
from llmforge.prompt import Encoder, PromptFormat, StopRules, build_format, chat_template_of

pytestmark = pytest.mark.real_tokenizers

NAMES = ("llama3", "llama3_1", "gemma3", "qwen3")
END_OF_TURN = {"llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>", "qwen3": "<|im_end|>"}
FORMATS = {"llama3": "llama3", "llama3_1": "llama3", "gemma3": "gemma2", "qwen3": "chatml"}


def load(name: str):
    root = Path(os.environ.get("LLMFORGE_TOKENIZERS") or Path(__file__).parent.parent / ".cache" / "tokenizers")
    places = [place for place in (root / name, root / name / "package" / "models") if any(place.glob("tokenizer.*"))]
    if not places:
        pytest.skip(f"no tokenizer {name} in {root}: run `make install-tokenizers`, or set LLMFORGE_TOKENIZERS")
    return AutoTokenizer.from_pretrained(places[0])


@pytest.fixture(scope="module", params=NAMES)
def named(request):
    """A tokenizer's name and itself; one at a time is in memory."""
    return request.param, load(request.param)


def conversations(seed: int, count: int) -> list[list[dict]]:
    """Draw conversations that begin with a user or a system message followed by one."""
    rng = random.Random(seed)
    drawn = []
    while len(drawn) < count:
        messages = sorted(random_conversation(rng), key=lambda message: message["role"] != "system")
        if len(messages) < 20 and next(m for m in messages if m["role"] != "system")["role"] == "user":
            drawn.append(messages)
    return drawn


def served_ids(tokenizer, messages, template=None):
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def check_row(encoder: Encoder, messages: list[dict]) -> int:
    """Check a row's samples against what a server is given and what the template writes; give the trained turns."""
    (samples,) = encoder.explain([{"messages": messages}], "assistant")
    if isinstance(samples, ConversationError):
        raise samples
    turns = iter(encoder.format.turns(messages))
    answers = iter(index for index, message in enumerate(messages) if message["role"] == "assistant")
    count = 0
    for pieces in samples:
        before = []
        for piece in pieces:
            if piece.weight:
                assert before == served_ids(
                    encoder.tokenizer, messages[: next(answers)], chat_template_of(encoder.format)
                )
                # Qwen 3's tokenizer composes characters (Unicode NFC).
                assert composed(encoder.decode(piece.input_ids)) == composed(next(turns).completion)
                count += 1
            before += piece.input_ids
    assert next(turns, None) is None
    return count


def test_the_own_template_trains_what_it_serves(named):
    name, tokenizer = named
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    checked = 0
    for messages in conversations(1, 120):
        assert encoder.encode_prompt(messages) == served_ids(tokenizer, messages)
        if any(message["role"] == "assistant" for message in messages):
            checked += check_row(encoder, messages)
    assert checked > 100, name


def test_the_explicit_format_trains_what_it_serves(named):
    name, tokenizer = named
    encoder = Encoder(tokenizer, PromptFormat(**PROMPT_FORMATS[FORMATS[name]]))
    for messages in conversations(2, 120):
        assert encoder.encode_prompt(messages) == served_ids(tokenizer, messages, chat_template_of(encoder.format))
        if any(message["role"] == "assistant" for message in messages):
            assert check_row(encoder, messages) > 0


def test_answers_end_in_the_end_of_turn(named):
    name, tokenizer = named
    for format in (build_format(None, tokenizer), PromptFormat(**PROMPT_FORMATS[FORMATS[name]])):
        encoder = Encoder(tokenizer, format)
        messages = [
            {"role": "user", "content": "48/2?"},
            {"role": "assistant", "content": "24"},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "Then 12."},
        ]
        (samples,) = encoder.encode_conversations([{"messages": messages}], "assistant")
        trained = [
            encoder.decode([token for token, weight in zip(s.input_ids, s.loss_weights, strict=True) if weight])
            for s in samples
        ]
        assert "".join(trained).rstrip("\n").endswith("Then 12." + END_OF_TURN[name])
        assert "".join(trained).count(END_OF_TURN[name]) == 2
        assert tokenizer.convert_tokens_to_ids(END_OF_TURN[name]) in StopRules.derive(encoder, [], []).token_ids
        if tokenizer.bos_token_id is not None:
            assert all(s.input_ids.count(tokenizer.bos_token_id) == 1 for s in samples)


@pytest.mark.parametrize("name", ["llama3", "llama3_1"])
def test_the_explicit_llama_3_format_is_the_published_template(name):
    tokenizer = load(name)
    encoder = Encoder(tokenizer, PromptFormat(**PROMPT_FORMATS["llama3"]))
    for messages in conversations(3, 120):
        # The template writes an empty system message; a format leaves it out.
        if messages[0]["role"] != "system" or messages[0]["content"].strip():
            assert encoder.encode_prompt(messages) == served_ids(tokenizer, messages)


def test_both_llama_3_tokenizers_train_alike():
    """The first release writes a stray header behind every conversation; nothing of it is trained."""
    first, second = (load(name) for name in ("llama3", "llama3_1"))
    rows = [{"messages": messages} for messages in conversations(4, 80)]
    encoders = [Encoder(tokenizer, build_format(None, tokenizer)) for tokenizer in (first, second)]
    assert [encoder.format.stray_suffix for encoder in encoders] == [
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "",
    ]
    ours, theirs = (encoder.encode_conversations(rows, "assistant") for encoder in encoders)
    assert [result for result in ours if isinstance(result, list)] == [r for r in theirs if isinstance(r, list)]


def test_texts_cut_at_special_tokens_give_the_ids_of_the_whole(named):
    name, tokenizer = named
    encoder = Encoder(tokenizer, PromptFormat(**PROMPT_FORMATS[FORMATS[name]]))
    for messages in conversations(5, 120):
        text = encoder.format.render(messages)
        assert encoder.encode_text(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_thinking_is_forgotten_in_history_and_learned_in_the_last_answer():
    tokenizer = load("qwen3")
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    messages = [
        {"role": "user", "content": "48/2?"},
        {"role": "assistant", "content": "<think>\nhalf\n</think>\n\n24"},
        {"role": "user", "content": "72/3?"},
        {"role": "assistant", "content": "24"},
    ]
    assert check_row(encoder, messages) == 2
    (samples,) = encoder.encode_conversations([{"messages": messages}], "assistant")
    first, second = (encoder.decode(sample.input_ids) for sample in samples)
    assert "half" in first
    assert "half" not in second
    # Of two answers in a row, each is learned behind what the server writes in front of it.
    assert check_row(encoder, [messages[0], messages[3], {"role": "assistant", "content": "No, 25."}]) >= 1


def test_nemos_system_messages_are_learned_where_the_template_puts_them():
    tokenizer = load("mistral_nemo")
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "48/2?"},
        {"role": "assistant", "content": "24"},
        {"role": "user", "content": "72/3?"},
        {"role": "assistant", "content": "24"},
    ]
    assert check_row(encoder, messages) == 2
    (samples,) = encoder.encode_conversations([{"messages": messages}], "assistant")
    assert [encoder.decode(sample.input_ids).count("Be brief.") for sample in samples] == [1, 1]


def test_mistral_common_does_not_take_the_place_of_a_tokenizer(tmp_path):
    """Where that package is, transformers loads its class for any directory with a `tekken.json` beside the rest."""
    package = Path(__file__).parent.parent / ".cache" / "mistral-common"
    if not package.is_dir():
        pytest.skip(f"no {package}: run `make install-tokenizers`")
    build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tekken.json").write_text("{}")
    program = (
        "import sys, pathlib\n"
        "from transformers.utils.import_utils import is_mistral_common_available\n"
        "from llmforge.models.load import load_tokenizer\n"
        "from llmforge.models.source import ModelSource\n"
        "assert is_mistral_common_available()\n"
        "tokenizer = load_tokenizer(ModelSource('model', pathlib.Path(sys.argv[1])))\n"
        "print(tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout == "<|im_start|>user\nHi<|im_end|>\n\n", done.stderr
