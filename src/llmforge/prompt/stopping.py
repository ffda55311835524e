"""Where generation ends: the same rules for chat, batch generation, serving and every export."""

from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from llmforge.prompt.encoder import Encoder


class StopRules(BaseModel):
    """Strings and token ids at which generation ends; neither is part of the answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequences: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()

    @classmethod
    def derive(cls, encoder: Encoder, sequences: Sequence[str], token_ids: Sequence[int]) -> Self:
        """Complete the user's stop rules with what follows from tokenizer and format.

        The tokenizer's EOS always stops, and so does the special token that ends an assistant turn in this format.
        A stop sequence that is a single special token is also a stop token, which every server honours.
        """
        tokenizer: Any = encoder.tokenizer
        found = list(token_ids)
        for sequence in sequences:
            ids = encoder.encode_text(sequence)
            if len(ids) == 1 and (ids[0] in tokenizer.all_special_ids or ids[0] in tokenizer.added_tokens_decoder):
                found += ids
        if tokenizer.eos_token_id is not None:
            found.append(tokenizer.eos_token_id)
        found += encoder.stop_token_ids()
        return cls(sequences=tuple(sequences), token_ids=tuple(dict.fromkeys(found)))

    def cut(self, text: str) -> str:
        """Cut text at the first stop sequence in it."""
        positions = [position for sequence in self.sequences if (position := text.find(sequence)) >= 0]
        return text[: min(positions)] if positions else text

    def held_back(self, text: str) -> int:
        """Count the characters at the end of `text` that may turn out to begin a stop sequence."""
        longest = 0
        for sequence in self.sequences:
            for length in range(min(len(sequence) - 1, len(text)), longest, -1):
                if text.endswith(sequence[:length]):
                    longest = length
                    break
        return longest
