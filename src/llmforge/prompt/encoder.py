"""The one place that turns messages into token ids, for training, evaluation, generation and serving alike.

It renders text with a format and cuts it into token ids with the tokenizer, which adds nothing of its own. Which
tokens carry loss is decided here too, and nowhere else.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmforge.data.samples import Sample
from llmforge.errors import ConversationError, PromptFormatError
from llmforge.prompt.chat_template import ChatTemplate
from llmforge.prompt.conversation import Message, Turn, check_messages
from llmforge.prompt.format import PromptFormat

Format = PromptFormat | ChatTemplate

Trained = Literal["assistant", "everything"]
"""Which tokens carry loss: those the model would have to produce, or all of them."""

ENCODING_VERSION = 3  # goes into the fingerprint; raise it when the same input gives other ids or weights


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of a sample that count alike, and why they do."""

    input_ids: list[int]
    weight: float
    reason: str


class Encoder:
    """Turns conversations into token ids through one format and one tokenizer.

    Args:
        tokenizer: a transformers tokenizer. Special-token text, in templates and in content, becomes special tokens.
        format: how messages become text.
    """

    def __init__(self, tokenizer: Any, format: Format) -> None:
        self.tokenizer = tokenizer
        self.format = format
        self._cut = _cutting_pattern(tokenizer, format)

    def encode_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Encode what a server feeds the model so that it answers `messages`, or goes on with the last one of them."""
        return self.encode_text(self._render(messages, True, tools, continue_final_message))

    def encode_text(self, text: str) -> list[int]:
        """Encode rendered text; the tokenizer adds no special token."""
        return self._encode_texts([text])[0]

    def decode(self, input_ids: Sequence[int]) -> str:
        """Decode token ids to text, special tokens included."""
        return self.tokenizer.decode(input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode_conversations(
        self, rows: Sequence[Mapping[str, Any]], trained: Trained
    ) -> list[list[Sample] | ConversationError]:
        """Encode rows (`messages`, optionally `tools`) as training samples, or say why one cannot be.

        A conversation is one sample as long as each assistant turn's prompt, encoded as a server would encode it,
        begins with the ids of what came before. Where it does not (the format rewrites history, or tokens merge across
        a turn's boundary), the conversation is unrolled: a further sample starts with that turn's own prompt.
        """
        return [
            pieces_or_error
            if isinstance(pieces_or_error, ConversationError)
            else [
                Sample(
                    [token for piece in pieces for token in piece.input_ids],
                    _without_first([piece.weight for piece in pieces for _ in piece.input_ids]),
                )
                for pieces in pieces_or_error
            ]
            for pieces_or_error in self.explain(rows, trained)
        ]

    def explain(
        self, rows: Sequence[Mapping[str, Any]], trained: Trained
    ) -> list[list[list[Piece]] | ConversationError]:
        """Encode rows as `encode_conversations` does, keeping the reason for each token's weight."""
        split: list[list[Turn] | str | ConversationError] = []
        for row in rows:
            try:
                split.append(self._split(row, trained))
            except ConversationError as error:
                split.append(error)

        texts: list[str] = []
        for part in split:
            if isinstance(part, str):
                texts.append(part)
            elif isinstance(part, list):
                for turn in part:
                    texts += [turn.prompt, turn.prompt + turn.completion]
        encoded = iter(self._encode_texts(texts))

        results: list[list[list[Piece]] | ConversationError] = []
        for part in split:
            if isinstance(part, ConversationError):
                results.append(part)
            elif isinstance(part, str):
                results.append([[Piece(next(encoded), 1.0, "trained")]])
            else:
                samples = self._assemble([(turn, next(encoded), next(encoded)) for turn in part])
                results.append(samples or ConversationError("no token to learn: what the assistant writes is empty"))
        return results

    def fingerprint(self) -> str:
        """Hash all that decides how a conversation is encoded: tokenizer, format and the rules of this module."""
        return f"{self.tokenizer_fingerprint()}-{self.format_fingerprint()}-{ENCODING_VERSION}"

    def tokenizer_fingerprint(self) -> str:
        """Hash the tokenizer: what it does to text, and its special tokens."""
        if self.tokenizer.is_fast:
            self._tokenize([""])  # takes off the truncation and padding that a tokenizer file may hold
            rules = self.tokenizer.backend_tokenizer.to_str()
        else:
            rules = repr(sorted(self.tokenizer.get_vocab().items()))
        return _hash(f"{type(self.tokenizer).__name__} {self.tokenizer.special_tokens_map} {rules}")

    def format_fingerprint(self) -> str:
        """Hash the prompt format."""
        return _hash(self.format.source if isinstance(self.format, ChatTemplate) else self.format.model_dump_json())

    def rendered_example(self) -> str:
        """Render a short conversation, to show the format to a person."""
        messages = [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris."},
        ]
        try:
            return self._render(messages, False, None)
        except ConversationError as error:
            return f"(the format does not render a plain question and answer: {error})"

    def stop_token_ids(self) -> list[int]:
        """Find the special token that ends an assistant turn in this format, if there is one.

        A server that stops at the tokenizer's EOS alone never stops where the format ends turns otherwise (Llama 3's
        first release: EOS is `<|end_of_text|>`, turns end in `<|eot_id|>`).
        """
        probe = "Probe"
        answer: Message = {"role": "assistant", "content": probe}
        call = {"id": "probe0001", "type": "function", "function": {"name": probe, "arguments": {"word": probe}}}
        calling: Message = {**answer, "content": "", "tool_calls": [call, {**call, "id": "probe0002"}]}
        said = self._special_ends(answer, probe) or []
        # A call may end otherwise (`<|eom_id|>`, `<|call|>`). What ends one of two (`</tool_call>`) ends no turn.
        called = self._special_ends(calling, probe)
        if called is None:  # some templates write no more than one
            called = self._special_ends({**calling, "tool_calls": [call]}, probe) or []
        return list(dict.fromkeys([*said[:1], *called[-1:]]))

    def _special_ends(self, answer: Message, probe: str) -> list[int] | None:
        """Give the special tokens behind all that an answer says, but for those that also stand within it.

        None: the format refuses the answer.
        """
        try:
            turns = self._turns([{"role": "user", "content": probe}, answer], None)
        except (ConversationError, PromptFormatError):
            return None
        within, _, ending = turns[-1].completion.rpartition(probe)
        special = set(self.tokenizer.all_special_ids) | {
            token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        inside = set(self.encode_text(within))
        return [token for token in self.encode_text(ending) if token in special and token not in inside]

    def _split(self, row: Mapping[str, Any], trained: Trained) -> list[Turn] | str:
        messages = row["messages"]
        if trained == "everything":
            check_messages(messages)
            if len(messages) == 1 and messages[0]["role"] == "user":
                return self._document(messages[0]["content"])
            text = self._render(messages, False, row.get("tools"))
            return text.removesuffix(self.format.stray_suffix) if isinstance(self.format, ChatTemplate) else text
        turns = self._turns(messages, row.get("tools"))
        if not turns:
            raise ConversationError("no assistant message: there is nothing to learn in this row")
        if not any(turn.weight for turn in turns):
            raise ConversationError("every assistant message has weight 0: there is nothing to learn in this row")
        return turns

    def _document(self, text: str) -> str:
        """Write a lone user message as a plain document: beginning, text, end, and no chat markup."""
        bos = self.format.bos if isinstance(self.format, PromptFormat) else own_bos(self.tokenizer)
        return bos + text + (self.tokenizer.eos_token or "")

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Any,
        continue_final_message: bool = False,
    ) -> str:
        if isinstance(self.format, ChatTemplate):
            return self.format.render(messages, add_generation_prompt, tools, continue_final_message)
        if tools:
            raise ConversationError("tools need a chat template; use prompt_format: {use_hf_chat_templates: true}")
        return self.format.render(messages, add_generation_prompt, continue_final_message)

    def _turns(self, messages: Sequence[Message], tools: Any) -> list[Turn]:
        if isinstance(self.format, ChatTemplate):
            return self.format.turns(messages, tools)
        if tools:
            raise ConversationError("tools need a chat template; use prompt_format: {use_hf_chat_templates: true}")
        return self.format.turns(messages)

    def _assemble(self, turns: Sequence[tuple[Turn, list[int], list[int]]]) -> list[list[Piece]]:
        """Join turns, given with the ids of their prompt and of prompt + completion, into as few samples as agree."""
        samples: list[list[Piece]] = []
        history: list[int] = []
        for turn, prompt_ids, whole_ids in turns:
            if whole_ids[: len(prompt_ids)] == prompt_ids:
                completion_ids = whole_ids[len(prompt_ids) :]
            else:
                # The text merges across the boundary, but generation starts there: cut where the server would.
                completion_ids = self._encode_continuation(turn.completion)
            reason = "trained" if turn.weight else "weight 0"
            if history and prompt_ids[: len(history)] == history:
                samples[-1] += [Piece(prompt_ids[len(history) :], 0.0, "prompt")]
            else:
                samples.append([Piece(prompt_ids, 0.0, "prompt")])
            samples[-1].append(Piece(completion_ids, turn.weight, reason))
            history = prompt_ids + completion_ids
        return [pieces for pieces in samples if any(piece.weight and piece.input_ids for piece in pieces)]

    def _encode_continuation(self, text: str) -> list[int]:
        """Encode text that continues other text, without the space some tokenizers put in front of a beginning.

        It is encoded behind an anchor that stays a token of its own, and the anchor's ids are taken off again.
        """
        for anchor in ("\n", ".", "a", "1"):
            anchor_ids, ids = self._encode_texts([anchor, anchor + text])
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self.encode_text(text)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Encode rendered texts, each stretch between special tokens once, however many of the texts share it.

        A tokenizer takes its added tokens out of a text before anything else and encodes what lies between them stretch
        by stretch. A conversation's prompts contain one another: without this, cost grows with the square of its turns.
        """
        if self._cut is None:
            return self._tokenize(texts)
        split = [_split_before(self._cut, text) for text in texts]
        stretches = list(dict.fromkeys(itertools.chain.from_iterable(split)))
        ids = dict(zip(stretches, self._tokenize(stretches), strict=True))
        return [list(itertools.chain.from_iterable(map(ids.__getitem__, parts))) for parts in split]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def _cutting_pattern(tokenizer: Any, format: Format) -> re.Pattern[str] | None:
    """Match the added tokens that the format writes and before which every text can be cut without changing its ids.

    Those are found in the raw text whatever stands beside them, and no other added token can overlap their beginning.
    """
    if not tokenizer.is_fast:
        return None
    written = format.source if isinstance(format, ChatTemplate) else "".join(map(str, format.model_dump().values()))
    added = tokenizer.added_tokens_decoder.values()
    begun = {character for token in added for character in token.content[1:]}
    cuts = [
        token.content
        for token in added
        if token.content in written
        and not (token.normalized or token.lstrip or token.single_word)
        and token.content[0] not in begun
    ]
    return re.compile("|".join(map(re.escape, cuts))) if cuts else None


def _split_before(pattern: re.Pattern[str], text: str) -> list[str]:
    """Split text before each match of `pattern`."""
    starts = [match.start() for match in pattern.finditer(text)]
    return [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True) if start < end]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def own_bos(tokenizer: Any) -> str:
    """Give the BOS text that a tokenizer puts in front of plain text, or nothing if it puts none."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if adds_bos else ""


def _without_first(weights: list[float]) -> list[float]:
    """Set the first token's weight to 0: nothing stands before it to predict it from."""
    if weights:
        weights[0] = 0.0
    return weights
