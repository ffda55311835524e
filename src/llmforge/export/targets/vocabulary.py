"""What the converters to GGUF do not find in a tokenizer's files, or know in another way, measured on the tokenizer."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llmforge.errors import ConversationError
from llmforge.prompt import Encoder

SPACE = "▁"  # how SentencePiece vocabularies write a space


@dataclass(frozen=True, slots=True)
class Spacing:
    """Where a tokenizer with a SentencePiece vocabulary puts a space in front of text.

    llama.cpp puts one at the beginning and behind every special token, or nowhere (`add_space_prefix`).

    `at_start` and `behind_tokens` say what the tokenizer does; `starts_plain` is whether the format's prompts begin
    with text that is no special token, `only_plain` whether they hold nothing else.
    """

    at_start: bool
    behind_tokens: bool
    starts_plain: bool
    only_plain: bool

    @classmethod
    def of(cls, encoder: Encoder) -> Self | None:
        """Measure it; None where the vocabulary is not SentencePiece's."""
        tokenizer = encoder.tokenizer

        def tokens(text: str) -> list[str]:
            return tokenizer.convert_ids_to_tokens(encoder.encode_text(text))

        if not any(SPACE in token for token in tokens("a a")):
            return None
        special = next(iter(tokenizer.all_special_tokens), "")
        behind = tokens(f"{special}a")[1 if special else 0 :]
        try:
            prompt = encoder.encode_prompt([{"role": "user", "content": "a"}])
        except ConversationError:  # prompts that only longer conversations make
            prompt = []
        added = [token in tokenizer.added_tokens_decoder for token in prompt]
        return cls(
            at_start=tokens("a")[0].startswith(SPACE),
            behind_tokens=behind[0].startswith(SPACE),
            starts_plain=added[:1] == [False],
            only_plain=bool(added) and not any(added),
        )

    @property
    def prefix(self) -> bool:
        """What `add_space_prefix` has to be, so that the format's prompts get their ids."""
        return self.at_start if self.only_plain else self.behind_tokens

    @property
    def warning(self) -> str | None:
        """What cannot be said in a GGUF file, if anything."""
        if not self.starts_plain or self.at_start == self.behind_tokens:
            return None
        return (
            "this tokenizer puts a space in front of a text, but none behind a special token; llama.cpp does both or "
            "neither, and this format's prompts begin without a special token, so some have other tokens there than "
            "were trained. A format that begins with the BOS token has no such prompts"
        )


def new_tokens(tokenizer: Any) -> dict[str, int]:
    """Give the added tokens behind the end of the vocabulary that the tokenizer was trained with."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    return {token.content: token_id for token_id, token in added if token_id >= tokenizer.vocab_size}


def split_digest(directory: Path) -> str | None:
    """Hash the regular expressions by which a saved tokenizer splits text first, as Ollama's converter does.

    None: there is no tokenizer.json.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    first = json.loads(path.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    steps = [step for step in first.get("pretokenizers", []) if step["type"] == "Split"]
    return hashlib.sha256("".join(step["pattern"].get("Regex", "") for step in steps).encode()).hexdigest()
