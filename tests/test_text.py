"""The text of an answer: however its tokens come, it is what decoding them at once gives, cut at the first stop."""

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.prompt import Encoder, PromptFormat, StopRules
from llmforge.serve.text import TextStream, find_byte_tokens
from tokenizer_families import FAMILIES

FORMAT = PromptFormat(
    system="{instruction}", user="<|im_start|>{instruction}<|im_end|>", assistant="{instruction}", trailing_assistant=""
)
TEXTS = ["the quick brown fox", " 日本語 naïve", "🎉🎊 x", "\n\nUser: ", " a", "\ufffd", "STOP", "don't , stop . "]


@cache
def encoder_of(family: str) -> tuple[Encoder, frozenset[int]]:
    encoder = Encoder(FAMILIES[family](), FORMAT)
    return encoder, find_byte_tokens(encoder)


def stream_of(family: str, prompt: Sequence[int], stops: Sequence[str] = ()) -> TextStream:
    encoder, byte_tokens = encoder_of(family)
    return TextStream(encoder, StopRules(sequences=tuple(stops)), byte_tokens, prompt)


def streamed(stream: TextStream, ids: Sequence[int]) -> tuple[list[str], int]:
    """Give the texts that were shown, and after how many tokens the answer was over."""
    shown = []
    for count, token in enumerate(ids, start=1):
        shown.append(stream.push(token))
        if stream.is_stopped:
            return shown, count
    return [*shown, stream.finish()], len(ids)


def at_once(family: str, prompt: Sequence[int], ids: Sequence[int], stops: Sequence[str]) -> tuple[str, int]:
    """Decode prompt and answer at once, and cut; the answer ends with the token at which a stop sequence is in it."""
    encoder, byte_tokens = encoder_of(family)
    while prompt[-1] in byte_tokens:  # the characters of the prompt are whole; bytes of the answer change none of them
        prompt = prompt[:-1]
    begin = len(encoder.decode(list(prompt)))
    rules = StopRules(sequences=tuple(stops))
    for count in range(1, len(ids) + 1):
        text = encoder.decode([*prompt, *ids[:count]])[begin:]
        if rules.cut(text) != text:
            return rules.cut(text), count
    return encoder.decode([*prompt, *ids])[begin:], len(ids)


@st.composite
def answers(draw: st.DrawFn, family: str) -> tuple[list[int], list[int], list[str]]:
    """Draw a prompt, an answer of random tokens, text and bytes, and stop sequences that are likely to be in it."""
    encoder, byte_tokens = encoder_of(family)
    size = len(encoder.tokenizer)
    texts = st.sampled_from(TEXTS).map(encoder.encode_text)
    token = st.integers(0, size + 3).map(lambda id: [id])  # models have rows for tokens that the tokenizer lacks
    parts = [texts, token, st.lists(st.integers(0, size - 1), max_size=6)]
    if byte_tokens:
        parts.append(st.lists(st.sampled_from(sorted(byte_tokens)), max_size=12))
    ids = [id for part in draw(st.lists(st.one_of(*parts), min_size=1, max_size=8)) for id in part]
    prompt = encoder.encode_text(draw(st.sampled_from(["<|im_start|>hello", "a b 日", "<|im_end|>", "x\n"])))
    text = encoder.decode(ids)
    stops = []
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, max(len(text) - 1, 0)))
        stops.append(text[start : start + draw(st.integers(1, 6))] or "x")
    return prompt, ids, stops


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_streamed_is_what_decoding_at_once_gives(family: str) -> None:
    @settings(max_examples=150)
    @given(answers(family))
    def check(drawn: tuple[list[int], list[int], list[str]]) -> None:
        prompt, ids, stops = drawn
        stream = stream_of(family, prompt, stops)
        shown, count = streamed(stream, ids)
        assert ("".join(shown), count) == at_once(family, prompt, ids, stops)
        assert stream.shown == len("".join(shown))

    check()
