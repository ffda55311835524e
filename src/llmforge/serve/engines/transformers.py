"""Answers with transformers, on a CPU or one GPU: all requests together, each joining and leaving between two steps.

One thread computes. A step is the newest token of every answer and, up to a number of tokens, prompts that are still
to be read: first come, first served, a long one in several steps, so that it never holds up the answers for long. A
request is let in when there is a place in the batch, and memory for all that it may become: none is ever thrown out.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from llmforge.errors import InputError, LlmforgeError, ModelError
from llmforge.models.adapters import Adapters
from llmforge.models.arithmetic import choose_matmul
from llmforge.models.cached_attention import capacity_for
from llmforge.models.device import DTYPES, Dtype, autocast, best_dtype, find_device, free_memory
from llmforge.models.few_rows import multiply_few_rows
from llmforge.models.fused_norm import fuse_norms
from llmforge.models.load import load_base_model, native_context_length
from llmforge.models.source import ModelSource
from llmforge.models.stepper import Work, make_stepper
from llmforge.serve.requests import FinishReason, Listener, OverloadedError, Request, Token, Update
from llmforge.serve.sampling import Sampler
from llmforge.serve.structured import Grammars

MAX_BATCH, MAX_WAITING = 16, 256
_READ_AT_ONCE = {"cpu": 512, "cuda": 2048}  # tokens of prompts in a step
_CACHE_SHARE = 0.6  # of the memory that is free once the model is loaded
_UNLIMITED = 1 << 20  # tokens of context, of a model that has no limit


@dataclass(eq=False)
class _Answer:
    """A request and how far it is; also the ticket."""

    request: Request
    listener: Listener
    engine: "TransformersEngine"
    sampler: Sampler
    most: int  # tokens to generate
    bytes: int  # of the cache, at its longest
    conversation: Any = None
    read: int = 0  # tokens of the prompt
    newest: int = -1
    generated: int = 0
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True
        self.engine.wake()

    @property
    def is_reading(self) -> bool:
        return self.read < len(self.request.prompt_ids)


@dataclass
class _Change:
    """Something to do between steps, by the thread that computes."""

    do: Any
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class TransformersEngine:
    """An `Engine` over a model of transformers.

    Args:
        model: in evaluation mode. It is made faster in place; other programs must not use it any more.
        tokenizer: for grammars only.
        max_batch: answers at a time.
        max_waiting: requests that wait; more are refused.
        context_length: the most tokens of prompt and answer together, where it is to be less than the model's own.
        cache_bytes: memory for keys and values; None takes a part of what is free.
        prepares_grammars: read the tokenizer for grammars now. That takes seconds for a large vocabulary, in which
            nothing else goes on; otherwise the first request with a grammar has it done.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        device: torch.device,
        dtype: Dtype,
        max_batch: int = MAX_BATCH,
        max_waiting: int = MAX_WAITING,
        context_length: int | None = None,
        cache_bytes: int | None = None,
        prepares_grammars: bool = False,
    ) -> None:
        native = native_context_length(model.config) or _UNLIMITED
        self.context_length = min(native, context_length or native)
        self.device, self.dtype, self.model = device, dtype, model.to(device)
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        self._making_grammars = threading.Lock()
        self._autocast = autocast(device, dtype)
        self._max_batch, self._max_waiting = max_batch, max_waiting
        choose_matmul(device)
        fuse_norms(model)
        multiply_few_rows(model)
        self._adapters = Adapters(model)
        self._stepper, self.note = make_stepper(model, self._adapters, device, self._autocast)
        self._vocabulary = len(model.get_input_embeddings().weight)
        self._cache_bytes = int(_CACHE_SHARE * free_memory(device)) if cache_bytes is None else cache_bytes
        if prepares_grammars and tokenizer.is_fast:
            self._make_grammars()
        self._reserved = 0
        self._running: list[_Answer] = []
        self._waiting: deque[_Answer] = deque()
        self._changes: deque[_Change] = deque()
        self._news = threading.Condition()
        self._is_closing = False
        self._seconds_per_answer = 1.0  # lately
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        source: ModelSource,
        tokenizer: Any,
        *,
        dtype: Dtype | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Load a base model, or the whole weights of an artifact.

        Args:
            dtype: number format of weights and computation; None takes the best for the hardware.
            options: of the class.

        Raises:
            ModelError: the model is missing or damaged.
        """
        device = find_device()
        dtype = dtype or best_dtype(device)[0]
        model = load_base_model(source, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code).eval()
        return cls(model, tokenizer, device=device, dtype=dtype, **options)

    def submit(self, request: Request, listener: Listener) -> _Answer:
        """Take a request; see `Engine.submit`."""
        sampling, length = request.sampling, len(request.prompt_ids)
        if not 0 < length < self.context_length:
            raise InputError(
                f"the prompt has {length:,} tokens; allowed are 1 to {self.context_length - 1:,}, since prompt and "
                f"answer share a context of {self.context_length:,}"
            )
        if request.adapter is not None and request.adapter not in self._adapters:
            raise InputError(f"there is no adapter {request.adapter!r} in this engine")
        outside = next((t for t in (*request.prompt_ids, *sampling.logit_bias) if not 0 <= t < self._vocabulary), None)
        if outside is not None:
            raise InputError(f"the token id {outside} is not in the model's vocabulary of {self._vocabulary:,}")
        matcher = None
        if sampling.grammar is not None:
            matcher = self._make_grammars().matcher(sampling.grammar, request.stop_token_ids)
        most = min(sampling.max_tokens, self.context_length - length)
        cached = capacity_for(length + most) * self._stepper.bytes_per_token
        if cached > self._cache_bytes:
            raise InputError(
                f"prompt and answer of {length + most:,} tokens need {cached / 1e9:.1f} GB of memory, and "
                f"{self._cache_bytes / 1e9:.1f} GB are set aside; ask for fewer tokens (max_tokens)"
            )
        answer = _Answer(request, listener, self, Sampler(sampling, request.prompt_ids, matcher), most, cached)
        with self._news:
            if self._is_closing:
                raise OverloadedError("the server is being stopped", retry_after=10.0)
            # Counted together: a step may be under way while there is still a place in the batch.
            if len(self._running) + len(self._waiting) >= self._max_batch + self._max_waiting:
                wait = self._seconds_per_answer * len(self._waiting) / self._max_batch
                raise OverloadedError(
                    f"{len(self._waiting)} requests are waiting already; try again later", retry_after=max(1.0, wait)
                )
            self._waiting.append(answer)
            self._news.notify()
        return answer

    def add_adapter(self, name: str, directory: Path) -> None:
        """Read an adapter, and let requests name it. Raises ModelError; see `Adapters.read`."""
        layers = self._adapters.read(directory)
        self._between_steps(lambda: self._adapters.add(name, layers))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter when no request needs it any more; returns at once."""

        version = self._adapters.version(name)

        def remove() -> None:
            if version != self._adapters.version(name):
                return  # another one has the name now
            if any(answer.request.adapter == name for answer in (*self._running, *self._waiting)):
                self._changes.append(_Change(remove))
            else:
                self._adapters.remove(name)

        with self._news:
            self._changes.append(_Change(remove))
            self._news.notify()

    def stats(self) -> dict[str, float]:
        """See `Engine.stats`."""
        running = list(self._running)
        return {
            "running": len(running),
            "waiting": len(self._waiting),
            "cached_tokens": sum(answer.read + answer.generated for answer in running),
            "adapter_bytes": sum(self._adapters.bytes_of.values()),
        }

    def wake(self) -> None:
        """Let the thread look at what has changed."""
        with self._news:
            self._news.notify()

    def close(self) -> None:
        """Stop; see `Engine.close`."""
        with self._news:
            self._is_closing = True
            self._news.notify()
        self._thread.join()

    def _make_grammars(self) -> Grammars:
        with self._making_grammars:
            if self._grammars is None:
                self._grammars = Grammars(self._tokenizer, self._vocabulary)
            return self._grammars

    def _between_steps(self, do: Any) -> None:
        change = _Change(do)
        with self._news:
            self._changes.append(change)
            self._news.notify()
        change.done.wait()
        if change.error is not None:
            raise change.error

    def _work(self) -> None:
        """Step until the engine is closed. What fails in a step ends the answers of that step, not the engine."""
        while True:
            with self._news:
                while not (self._running or self._waiting or self._changes or self._is_closing):
                    self._news.wait()
                changes, self._changes = self._changes, deque()
                is_closing = self._is_closing
            for change in changes:
                try:
                    change.do()
                except BaseException as error:
                    change.error = error
                change.done.set()
            if is_closing:
                for answer in (*self._running, *self._waiting):
                    answer.is_cancelled = True
            self._drop_cancelled()
            if is_closing:
                return
            self._let_in()
            if not self._running:
                if self._changes or self._waiting:
                    time.sleep(0.001)  # an adapter that is to go waits for a request that was not let in
                continue
            try:
                self._step()
            except Exception as error:
                failure = error if isinstance(error, LlmforgeError) else _in_words(error)
                for answer in list(self._running):
                    self._end(answer, Update((), error=failure))

    def _let_in(self) -> None:
        """Let requests in, in their order, as long as there is room."""
        while self._waiting and len(self._running) < self._max_batch:
            answer = self._waiting[0]
            if self._reserved + answer.bytes > self._cache_bytes and self._running:
                return
            self._waiting.popleft()
            self._reserved += answer.bytes
            answer.conversation = self._stepper.conversation()
            self._running.append(answer)

    def _step(self) -> None:
        budget = _READ_AT_ONCE[self.device.type]
        work: list[Work] = []
        answers: list[_Answer] = []
        for answer in self._running:
            request = answer.request
            if not answer.is_reading:
                work.append(Work(answer.conversation, [answer.newest], request.adapter))
            elif budget > 0:
                part = request.prompt_ids[answer.read : answer.read + budget]
                budget -= len(part)
                answer.read += len(part)
                work.append(Work(answer.conversation, part, request.adapter, wants_logits=not answer.is_reading))
            else:
                continue
            answers.append(answer)
        logits_SV = self._stepper.step(work)
        wanting = [answer for answer, item in zip(answers, work, strict=True) if item.wants_logits]
        for answer, token in zip(wanting, self._choose(wanting, logits_SV), strict=True):
            if isinstance(token, Token):
                self._tell(answer, token)
            else:
                self._end(answer, Update((), error=token))

    def _choose(self, answers: Sequence[_Answer], logits_SV: torch.Tensor) -> list[Token | InputError]:
        """Choose the next token of each answer; an error is its own, and ends no other."""
        samplers = [answer.sampler for answer in answers]
        are_plain = [sampler.is_plain for sampler in samplers]
        likeliest = logits_SV.argmax(-1).tolist() if any(are_plain) else [-1] * len(samplers)
        rows = logits_SV if all(are_plain) else logits_SV.cpu()
        return [
            Token(best) if sampler.is_plain else _chosen(sampler, row)
            for sampler, best, row in zip(samplers, likeliest, rows, strict=True)
        ]

    def _tell(self, answer: _Answer, token: Token) -> None:
        request = answer.request
        answer.newest = token.id
        answer.generated += 1
        finish: FinishReason | None = None
        is_stop = token.id in request.stop_token_ids and not request.sampling.ignore_stops
        if is_stop or answer.sampler.has_ended:
            finish = "stop"
        elif answer.generated >= answer.most:
            finish = "length"
        if finish is None:
            answer.listener(Update((token,)))
        else:
            self._end(answer, Update((token,), finish))

    def _drop_cancelled(self) -> None:
        for answer in [a for a in self._running if a.is_cancelled]:
            self._end(answer, Update((), "cancelled"))
        cancelled = [a for a in self._waiting if a.is_cancelled]
        if cancelled:
            with self._news:
                self._waiting = deque(a for a in self._waiting if not a.is_cancelled)
            for answer in cancelled:
                answer.listener(Update((), "cancelled"))

    def _end(self, answer: _Answer, last: Update) -> None:
        self._running.remove(answer)
        self._reserved -= answer.bytes
        self._stepper.forget(answer.conversation)
        answer.listener(last)


def _chosen(sampler: Sampler, logits_V: torch.Tensor) -> Token | InputError:
    try:
        return sampler.choose(logits_V)
    except InputError as error:
        return error


def _in_words(error: Exception) -> LlmforgeError:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return LlmforgeError("out of memory; serve with a smaller --max-batch, or ask for fewer tokens")
    return ModelError(f"the model failed: {type(error).__name__}: {error}")
