"""Compares token ids in training with those that the tokenizer, saved and loaded again, gives a server.

    python benchmarks/parity.py [DIRECTORY_OR_GGUF ...] [--conversations 1000]

Without names it takes every tokenizer in LLMFORGE_TOKENIZERS (by default .cache/tokenizers, which
`make install-tokenizers` fills) and the GGUF files in .cache/models. Each is compared under its own chat template, and
under ChatML written as a prompt_format, which adds tokens to no vocabulary: headers become ordinary text where a
tokenizer does not know them. Half of the conversations are orderly, half are not; all are full of text that trips
tokenizers and templates, the tokenizer's own special tokens among it.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from llmforge.errors import ConversationError, InputError
from llmforge.models.load import load_tokenizer, save_tokenizer
from llmforge.models.source import ModelSource, find_model
from llmforge.prompt import ChatTemplate, Encoder, Format, PromptFormat, chat_template_of
from llmforge.prompt.adversary import TEXTS, random_conversations

CACHE = Path(__file__).parent.parent / ".cache"
SEED = 7
CHATML = PromptFormat(
    system="<|im_start|>system\n{instruction}<|im_end|>\n",
    user="<|im_start|>user\n{instruction}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{instruction}<|im_end|>\n",
    trailing_assistant="<|im_start|>assistant\n",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="tokenizer directories or .gguf files")
    parser.add_argument("--conversations", type=int, default=1000, help="to compare, for each tokenizer and format")
    options = parser.parse_args()
    print(f"transformers {transformers.__version__}, {options.conversations:,} conversations, seed {SEED}\n")
    print("| tokenizer | format | conversations | refused by both | prompts | tokens | mismatches | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    mismatches = 0
    for name, tokenizer in _tokenizers(options.models or [*_installed()]):
        for label, format in _formats(tokenizer):
            began = time.perf_counter()
            conversations, refused, prompts, tokens, wrong = _compare(tokenizer, format, options.conversations)
            mismatches += wrong
            seconds = time.perf_counter() - began
            print(
                f"| {name} | {label} | {conversations:,} | {refused:,} | {prompts:,} | {tokens:,} | {wrong:,} | "
                f"{seconds:.0f} |",
                flush=True,
            )
    sys.exit(1 if mismatches else 0)


def _formats(tokenizer: Any) -> Iterator[tuple[str, Format]]:
    if tokenizer.chat_template:
        yield "its chat template", ChatTemplate(tokenizer.get_chat_template(), tokenizer, from_tokenizer=True)
    yield "prompt_format (ChatML)", CHATML


def _compare(tokenizer: Any, format: Format, count: int) -> tuple[int, int, int, int, int]:
    """Compare until `count` conversations have been: the prompt of the whole, and each that a sample begins with."""
    encoder = Encoder(tokenizer, format)
    with tempfile.TemporaryDirectory() as directory:
        save_tokenizer(tokenizer, Path(directory))
        served = transformers.AutoTokenizer.from_pretrained(directory)
    served.chat_template = chat_template_of(format)
    conversations = refused = prompts = tokens = wrong = 0
    texts = (*TEXTS, *tokenizer.all_special_tokens)
    drawn = [random_conversations(10 * count, SEED, texts=texts, orderly=orderly) for orderly in (True, False)]
    for messages in (messages for pair in zip(*drawn, strict=True) for messages in pair):
        if conversations == count:
            break
        try:
            trained = encoder.encode_prompt(messages)
        except ConversationError:
            try:
                _served_ids(served, messages)
            except Exception:
                refused += 1
            continue  # formats of ours are stricter than some templates: nothing is trained then
        conversations += 1
        if isinstance(format, PromptFormat):  # it writes the system message in front, wherever it stands
            messages.sort(key=lambda message: message["role"] != "system")
        compared = [(trained, _served_ids(served, messages))]
        (samples,) = encoder.encode_conversations([{"messages": messages}], "assistant")
        if not isinstance(samples, ConversationError):
            compared += list(_sample_prompts(served, messages, samples))
        for ours, theirs in compared:
            prompts += 1
            tokens += len(theirs)
            wrong += ours != theirs
    return conversations, refused, prompts, tokens, wrong


def _sample_prompts(served: Any, messages: Any, samples: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Give, for each answer, the sample's ids as far as its prompt should reach, and the prompt as it is served."""
    current = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not any(m["role"] == "user" for m in messages[:index]):
            continue
        try:
            prompt = _served_ids(served, messages[:index])
        except Exception:
            continue
        # Turns share a sample as long as the ids agree; the first later sample that begins with this prompt has it.
        begins = [list(sample.input_ids[: len(prompt)]) == prompt for sample in samples[current:]]
        current += begins.index(True) if True in begins else 0
        yield list(samples[current].input_ids[: len(prompt)]), prompt


def _served_ids(tokenizer: Any, messages: Any) -> list[int]:
    visible = [{"role": message["role"], "content": message["content"]} for message in messages]
    return tokenizer.apply_chat_template(visible, add_generation_prompt=True, tokenize=True, return_dict=False)


def _installed() -> Iterator[Path]:
    root = Path(os.environ.get("LLMFORGE_TOKENIZERS") or CACHE / "tokenizers")
    yield from sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    yield from sorted((CACHE / "models").glob("*.gguf"))


def _tokenizers(places: list[Path]) -> Iterator[tuple[str, Any]]:
    for place in places:
        try:
            source: ModelSource = find_model(str(place), relative_to=Path.cwd(), weights=False)
            yield place.name, load_tokenizer(source)
        except InputError as error:
            print(f"{place.name} is not loaded: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
