"""What an engine is asked and what it answers: token ids in, token ids out. No text and no HTTP below this line.

An engine is handed requests by any thread and tells a listener of every token from a thread of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from llmforge.errors import LlmforgeError

FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: a stop token, `max_tokens` (or the end of the context), or because nobody wants the rest."""


class OverloadedError(LlmforgeError):
    """No more requests are taken just now; `retry_after` is how many seconds a client does well to wait."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: choose among so many of the likeliest; 0 among all.
        top_p: choose among the likeliest tokens that together have this probability.
        min_p: leave out tokens with less than this share of the likeliest one's probability.
        seed: the same seed gives the same answer, whatever else is being answered; None draws one.
        presence_penalty, frequency_penalty: taken from the logit of a token that was generated, once or every time.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt and answer.
        logit_bias: added to the logits of tokens, by id.
        logprobs: give each token's log-probability and those of so many of the likeliest; None gives neither.
        grammar: what the answer has to follow, as `serve.structured` makes it.
        ignore_stops: do not end at stop tokens, so that an answer has `max_tokens`; for measuring.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    grammar: str | None = None
    ignore_stops: bool = False


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Args:
        prompt_ids: at least one token.
        stop_token_ids: end the answer, and are told of as its last token.
        adapter: the name under which `add_adapter` was given it; None is the base model itself.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    stop_token_ids: frozenset[int] = frozenset()
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token; `logprob` and `top` (id and log-probability, likeliest first) where they were asked for.

    Log-probabilities are those of the model, before temperature and penalties.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Update:
    """What is new of an answer. The last one has `finish`, or an `error` that ended it."""

    tokens: tuple[Token, ...]
    finish: FinishReason | None = None
    error: Exception | None = None


Listener = Callable[[Update], None]
"""Hears of an answer. It is called by the engine's thread, so it must return at once and raise nothing."""


class Ticket(Protocol):
    """A request that was taken."""

    def cancel(self) -> None:
        """Give up the answer; from any thread, and any number of times. Its last update has `finish` "cancelled"."""


class Engine(Protocol):
    """A model that generates.

    `context_length` is the most tokens of prompt and answer together; `stats` what `/metrics` shows.
    """

    context_length: int

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Take a request.

        Raises:
            OverloadedError: too many are waiting.
            InputError: the prompt leaves no room for an answer, or the adapter is not there.
        """

    def add_adapter(self, name: str, directory: Any) -> None:
        """Make a LoRA adapter answerable under a name. Raises ModelError when it cannot be loaded onto this base."""

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter, once the requests that it answers have ended."""

    def stats(self) -> dict[str, float]:
        """Count what is being answered (`running`), what waits (`waiting`), and cached tokens (`cached_tokens`)."""

    def close(self) -> None:
        """Stop, cancelling what is not finished; return when the thread has ended."""
