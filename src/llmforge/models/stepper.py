"""Runs a model step by step over many conversations, in the fastest of three ways that computes what the model does.

1. All conversations in one pass, over a cache of ours (`cached_attention.py`).
2. One conversation after the other, each with the cache that the model makes itself: models whose layers carry more
   than keys and values, or whose attention is more than a softmax.
3. The same without a cache, computing everything anew for each token: models that have none.

Which of them is right is found out on the model at hand, by comparing with its plain forward pass.

Shapes: N tokens of a step, S of them whose logits are wanted, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import peft
import torch

from llmforge.models.adapters import Adapters
from llmforge.models.cached_attention import NAME, Cache, Conversation, NotCacheableError, Step, arranged, stepping
from llmforge.models.head import Head, find_head
from llmforge.models.load import UNREADABLE, quiet, reason

_PADDED_FROM, _PAD_TO = 32, 16  # places: a product of a new shape costs oneDNN some milliseconds
_TOLERANCE = 1e-4  # of the largest logit
_HALF_TOLERANCE = 5e-2  # of the root mean square


@dataclass(frozen=True)
class Work:
    """The next tokens of a conversation, and whether the logits behind the last one are wanted."""

    conversation: Any
    tokens: Sequence[int]
    adapter: str | None = None
    wants_logits: bool = True


class Stepper(Protocol):
    """A model and what it remembers of conversations; `together` says that a step is one forward pass."""

    together: bool

    def conversation(self) -> Any:
        """Begin one."""

    def forget(self, conversation: Any) -> None:
        """End one."""

    def step(self, work: Sequence[Work]) -> torch.Tensor:
        """Compute the next tokens of different conversations; give the logits that are wanted (S, V), in fp32."""

    @property
    def bytes_per_token(self) -> int:
        """What remembering a token takes; 0 where nobody knows."""


Autocast = Callable[[], AbstractContextManager]


class Together:
    """The first way."""

    together = True

    def __init__(self, model: Any, head: Head | None, adapters: Adapters, device: torch.device, autocast: Autocast):
        self._model, self._head, self._adapters, self._device, self._autocast = model, head, adapters, device, autocast
        self._cache = Cache()
        self._precision = torch.get_float32_matmul_precision() if device.type == "cpu" else "highest"

    @property
    def bytes_per_token(self) -> int:
        return self._cache.bytes_per_token

    def conversation(self) -> Conversation:
        return Conversation()

    def forget(self, conversation: Conversation) -> None:
        self._cache.forget(conversation)

    @torch.inference_mode()
    def step(self, work: Sequence[Work]) -> torch.Tensor:
        for item in work:
            self._cache.make_room(item.conversation, item.conversation.length + len(item.tokens))
        of = {id(item.conversation): number for number, item in enumerate(work)}
        growing = arranged([w.conversation for w in work if len(w.tokens) == 1 and w.conversation.length])
        reading = [w.conversation for w in work if not (len(w.tokens) == 1 and w.conversation.length)]
        order = [of[id(conversation)] for conversation in (*growing, *reading)]
        tokens = [token for number in order for token in work[number].tokens]
        names = [work[number].adapter for number in order for _ in work[number].tokens]
        pads = -len(tokens) % _PAD_TO if len(tokens) > _PADDED_FROM else 0
        lengths = [(conversation, len(work[of[id(conversation)]].tokens)) for conversation in reading]
        step = Step.of(growing, lengths, self._device, pads, self._precision)
        ends, place = [0] * len(work), 0
        for number in order:
            place += len(work[number].tokens)
            ends[number] = place - 1
        wanted = [end for end, item in zip(ends, work, strict=True) if item.wants_logits]
        logits_SV = self._run(step, [*tokens, *[0] * pads], [*names, *[names[-1]] * pads], wanted)
        for item in work:
            item.conversation.length += len(item.tokens)
        return logits_SV

    def _run(self, step: Step, tokens: Sequence[int], names: Sequence[str | None], wanted: list[int]) -> torch.Tensor:
        inputs = {
            "input_ids": torch.tensor(tokens, device=self._device)[:, None],
            "position_ids": step.position_ids,
            "use_cache": False,
        }
        places_S = torch.tensor(wanted, dtype=torch.int64, device=self._device)
        with self._autocast(), stepping(step):
            if self._head is None:
                with self._adapters.using(names, self._device):
                    return self._model(**inputs).logits[places_S, -1].float()
            with self._head.selecting(places_S), self._adapters.using(names, self._device, wanted):
                logits_SV: torch.Tensor = self._model(**inputs).logits.flatten(0, -2).float()
        return logits_SV


class _Remembered:
    """A conversation of the other ways: its tokens, and the model's own cache."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.cache: dict[str, Any] = {}

    @property
    def length(self) -> int:
        return len(self.tokens)


class Alone:
    """The second way, and without `cached` the third."""

    together = False
    bytes_per_token = 0

    def __init__(self, model: Any, adapters: Adapters, device: torch.device, autocast: Autocast, *, cached: bool):
        self._model, self._adapters, self._device, self._autocast = model, adapters, device, autocast
        self._cached = cached

    def conversation(self) -> _Remembered:
        return _Remembered()

    def forget(self, conversation: _Remembered) -> None:
        conversation.tokens, conversation.cache = [], {}

    @torch.inference_mode()
    def step(self, work: Sequence[Work]) -> torch.Tensor:
        rows = [(self._one(item), item) for item in work]
        return torch.stack([logits_V for logits_V, item in rows if item.wants_logits])

    def _one(self, item: Work) -> torch.Tensor:
        conversation = item.conversation
        before = conversation.length if self._cached else 0
        conversation.tokens += item.tokens
        ids = conversation.tokens[before:]
        positions = torch.arange(before, before + len(ids), device=self._device)
        inputs = {"input_ids": torch.tensor([ids], device=self._device), "use_cache": self._cached}
        if self._cached:
            mask = torch.ones(1, conversation.length, dtype=torch.int64, device=self._device)
            inputs |= {"position_ids": positions[None], "attention_mask": mask, **conversation.cache}
        with self._autocast(), self._adapters.using([item.adapter], self._device):
            output = self._model(**inputs)
        names = ("past_key_values", "cache_params", "state")
        conversation.cache = {name: output[name] for name in names if self._cached and output.get(name) is not None}
        if self._cached and not conversation.cache:
            raise NotCacheableError("it gives no cache")
        logits_V: torch.Tensor = output.logits[0, -1].float()
        return logits_V


def make_stepper(model: Any, adapters: Adapters, device: torch.device, autocast: Autocast) -> tuple[Stepper, str]:
    """Choose the way for a model; the second value says why it is not the first, in words, or nothing.

    Args:
        model: in evaluation mode, on its device.
    """
    with autocast():
        head = find_head(model)
    if head is not None:
        head.stays_whole = True
        adapters.narrow(head.module)
    probe = _Probe(model, device, autocast)
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    before = base.config._attn_implementation
    if before == "sdpa":
        base.set_attn_implementation(NAME)
        together = Together(model, head, adapters, device, autocast)
        why = probe.problem(together)
        if not why:
            return together, ""
        base.set_attn_implementation(before)
    else:
        why = f"its attention is {before}"
    alone = Alone(model, adapters, device, autocast, cached=True)
    problem = probe.problem(alone)
    if not problem:
        return alone, f"conversations are computed one after the other, not together: {why}"
    return (
        Alone(model, adapters, device, autocast, cached=False),
        f"every token is computed from the whole conversation, without a cache: {problem}",
    )


class _Probe:
    """Two conversations of random tokens, and the logits of the model's plain forward passes behind some of them."""

    _LENGTHS = (11, 37)
    _READ = 29  # tokens of the longer one in its first step
    _GROWN = 3

    def __init__(self, model: Any, device: torch.device, autocast: Autocast) -> None:
        vocabulary = len(model.get_input_embeddings().weight)
        generator = torch.Generator().manual_seed(0)
        self._rows = [torch.randint(vocabulary, (n + self._GROWN,), generator=generator) for n in self._LENGTHS]
        self._expected = []
        with quiet(), torch.inference_mode(), autocast():
            for row in self._rows:
                logits_TV = model(input_ids=row[None].to(device), use_cache=False).logits[0]
                self._expected.append(logits_TV[-1 - self._GROWN :].float())
        self._half = self._expected[0].dtype != torch.float32 or logits_TV.dtype in (torch.bfloat16, torch.float16)

    def problem(self, stepper: Stepper) -> str:
        """Say in what steps differ from plain forward passes; nothing if they do not."""
        try:
            with quiet():
                found = self._run(stepper)
        except torch.OutOfMemoryError:
            raise
        except NotCacheableError as error:
            return str(error)
        except (*UNREADABLE, IndexError, NotImplementedError) as error:
            return f"it cannot compute single tokens ({reason(error)})"
        for rows_GV, expected_GV in zip(found, self._expected, strict=True):
            off = torch.stack(rows_GV) - expected_GV
            allowed = float(off.abs().max()) <= _TOLERANCE * float(expected_GV.abs().max())
            if self._half:
                allowed = float(off.norm()) <= _HALF_TOLERANCE * float(expected_GV.norm())
            if not allowed:
                return f"its logits are off by up to {float(off.abs().max()):.2g} in steps"
        return ""

    def _run(self, stepper: Stepper) -> list[list[torch.Tensor]]:
        """Read both prompts, the longer one in two steps beside the first new token of the shorter; then grow both."""
        first, second = stepper.conversation(), stepper.conversation()
        short, long = (row.tolist() for row in self._rows)
        lengths = self._LENGTHS
        found: list[list[torch.Tensor]] = [[], []]
        logits = stepper.step([Work(first, short[: lengths[0]]), Work(second, long[: self._READ], wants_logits=False)])
        found[0].append(logits[0])
        logits = stepper.step([Work(second, long[self._READ : lengths[1]]), Work(first, short[lengths[0] :][:1])])
        found[1].append(logits[0])
        found[0].append(logits[1])
        for step in range(1, self._GROWN):
            logits = stepper.step(
                [Work(first, [short[lengths[0] + step]]), Work(second, [long[lengths[1] + step - 1]])]
            )
            found[0].append(logits[0])
            found[1].append(logits[1])
        found[1].append(stepper.step([Work(second, [long[-1]])])[0])
        for conversation in (first, second):
            stepper.forget(conversation)
        return found
