"""Answers that follow a grammar: JSON, or JSON of a schema, by llguidance (https://github.com/guidance-ai/llguidance)."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llmforge.errors import InputError

_ANY_OBJECT = {"type": "object"}
_LOWEST = -9 * 10**18  # llguidance overflows the stack, and takes the program with it, where a value must be lower
_UPPER_BOUNDS = ("const", "enum", "maximum", "exclusiveMaximum")


def json_grammar(schema: Mapping[str, Any] | None) -> str:
    """Make the grammar of a JSON schema's instances; None is that of any JSON object.

    Raises:
        InputError: it is no schema, has something that cannot be enforced, or llguidance is not installed.
    """
    matcher = _library()
    _check_numbers(schema)
    grammar: str = matcher.grammar_from_json_schema(json.dumps(_ANY_OBJECT if schema is None else schema))
    problem = matcher.validate_grammar(grammar)
    if problem:
        raise InputError(f"the schema cannot be followed: {problem.splitlines()[0]}")
    return grammar


def _check_numbers(schema: Any) -> None:
    """Refuse values that have to be integers so low that llguidance does not survive them."""
    inside = [(None, schema)]
    while inside:
        key, value = inside.pop()
        if isinstance(value, dict):
            inside += [(key if key in ("const", "enum") else name, each) for name, each in value.items()]
        elif isinstance(value, list):
            inside += [(key, each) for each in value]
        elif isinstance(value, int | float) and value < _LOWEST and key in _UPPER_BOUNDS:
            raise InputError(f"the schema cannot be followed: {key} is below {_LOWEST:.0e}, the lowest that it may be")


class Grammars:
    """Makes a `Matcher` for each answer, over one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocabulary: the width of the model's logits.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        import llguidance.hf

        if not tokenizer.is_fast:
            raise InputError("answers that follow a grammar need a fast tokenizer (tokenizer.json), which this is not")
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)))
        self._vocabulary = vocabulary

    def matcher(self, grammar: str, stop_token_ids: frozenset[int]) -> "Matcher":
        """Begin an answer. Raises InputError where the grammar cannot be used."""
        inner = _library()(self._tokenizer, grammar, log_level=0)
        inner.compute_bitmask()  # seconds for some patterns, and next to nothing the second time
        _check(inner)
        return Matcher(inner, self._tokenizer.eos_token, stop_token_ids, self._vocabulary)


class Matcher:
    """Where an answer stands in its grammar."""

    def __init__(self, inner: Any, end: int, stop_token_ids: frozenset[int], vocabulary: int) -> None:
        self._inner, self._end, self._vocabulary = inner, end, vocabulary
        self._stops = torch.tensor(sorted(token for token in stop_token_ids if token < vocabulary), dtype=torch.int64)

    @property
    def has_ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._inner.is_stopped())

    def allowed(self) -> torch.Tensor:
        """Say which tokens may come next, bool (V,): stop tokens where the answer may end.

        Raises:
            InputError: the grammar turns out to be too much to follow.
        """
        packed = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        _check(self._inner)
        allowed = torch.from_numpy(np.unpackbits(packed, bitorder="little")[: self._vocabulary]).bool()
        if len(self._stops):
            may_end = bool(allowed[self._end])
            allowed[self._end] = False
            allowed[self._stops] = may_end
        return allowed

    def advance(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self._inner.consume_token(self._end if token in self._stops else token)


def _check(inner: Any) -> None:
    if problem := inner.get_error():
        raise InputError(f"the grammar cannot be followed: {problem.splitlines()[0]}")


def _library() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise InputError("answers that follow a grammar need llguidance: pip install 'llmforge[serve]'") from error
    return LLMatcher
