"""Generates answers with transformers on one device, from an artifact and the prompt format it was trained with."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import peft
import torch
import transformers

from llmforge.errors import InputError
from llmforge.models.device import DTYPES, Dtype, autocast, best_dtype, find_device
from llmforge.models.load import load_tokenizer, quiet
from llmforge.models.source import ModelSource
from llmforge.models.trained import load_trained_model
from llmforge.prompt import Encoder, Message, StopRules, load_format

DEFAULT_NEW_TOKENS = 512
ANCHOR_TOKENS = 8  # decoded in front of an answer, so that its first token keeps its leading space


@dataclass
class Engine:
    """A loaded model, its tokenizer and format, where it stops, and the number format it computes in."""

    model: Any
    encoder: Encoder
    stop: StopRules
    device: torch.device
    dtype: Dtype

    @classmethod
    def load(
        cls,
        artifact: Path,
        *,
        dtype: Dtype | None = None,
        trust_remote_code: bool = False,
        allow_pickle_weights: Sequence[str] = (),
    ) -> Self:
        """Load an artifact: base model and adapter, or whole weights, with its prompt format.

        Args:
            dtype: number format of weights and computation; None takes the best for the hardware.
            trust_remote_code, allow_pickle_weights: what the run's config allowed for the base model.

        Raises:
            ModelError: the artifact or its base model is missing or damaged.
        """
        device = find_device()
        dtype = dtype or best_dtype(device)[0]
        model = load_trained_model(
            artifact,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            allow_pickle_weights=allow_pickle_weights,
        )
        model.generation_config = transformers.GenerationConfig.from_pretrained(artifact)
        model.generation_config.stop_strings = None  # `_StopSequences` finds them
        tokenizer = load_tokenizer(ModelSource(str(artifact), artifact), trust_remote_code=trust_remote_code)
        encoder, stop = load_format(artifact, tokenizer)
        return cls(model.to(device).eval(), encoder, stop, device, dtype)

    def generate(self, conversations: Sequence[Sequence[Message]], *, batch_size: int = 8, **options: Any) -> list[str]:
        """Answer conversations, several at a time, those of like length together.

        Args:
            options: of transformers' `GenerationConfig` (max_new_tokens, temperature, …), over the artifact's own.
        """
        prompts = [self.encoder.encode_prompt(conversation) for conversation in conversations]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, ids in zip(chosen, self._generate_ids([prompts[i] for i in chosen], options), strict=True):
                answers[index] = self._text(prompts[index], ids)
        return answers

    def stream(self, messages: Sequence[Message], **options: Any) -> Iterator[str]:
        """Answer one conversation, giving the text piece by piece as it is produced."""
        prompt = self.encoder.encode_prompt(messages)
        tokens = _TokenQueue()
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self._generate_ids([prompt], options, tokens)
            except BaseException as error:
                failures.append(error)
            finally:
                tokens.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        ids: list[int] = []
        shown = 0
        try:
            for token in tokens:
                if token in self.stop.token_ids:
                    break
                ids.append(token)
                text = self._decode_after(prompt, ids)
                cut = self.stop.cut(text)
                # Hold back what may turn out to be a stop sequence, or half of a character.
                ready = len(cut) if len(cut) < len(text) else len(text) - self.stop.held_back(text)
                if text.endswith("\ufffd"):
                    continue
                if ready > shown:
                    yield cut[shown:ready]
                    shown = ready
                if len(cut) < len(text):
                    break
            rest = self._text(prompt, ids)[shown:]
            if rest:
                yield rest
        finally:
            tokens.is_cancelled = True
            thread.join()
        if failures:
            raise failures[0]

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Answer as the base model does, under the same format: what the model was before training.

        Raises:
            InputError: the artifact holds whole weights, so that the base model is not in it.
        """
        if not isinstance(self.model, peft.PeftModel):
            raise InputError("this artifact holds whole weights; its base model is not part of it")
        with self.model.disable_adapter():
            yield

    def _generate_ids(
        self, prompts: Sequence[Sequence[int]], options: Mapping[str, Any], tokens: "_TokenQueue | None" = None
    ) -> list[list[int]]:
        """Generate from prompts padded on the left to one length; gives the new ids before each answer's stop."""
        longest = max(len(prompt) for prompt in prompts)
        pad = self.encoder.tokenizer.pad_token_id
        filler = 0 if pad is None else pad  # masked, so its value never matters
        input_ids_BT = torch.tensor([[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with quiet(), torch.no_grad(), autocast(self.device, self.dtype)():
            output_BT = self.model.generate(
                input_ids=input_ids_BT.to(self.device),
                attention_mask=mask_BT.to(self.device),
                stopping_criteria=transformers.StoppingCriteriaList([_StopSequences(self, longest, tokens)]),
                streamer=tokens,
                pad_token_id=filler,
                **self._settings(options),
            )
        return [self._before_stop(row[longest:].tolist()) for row in output_BT]

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        settings = {"eos_token_id": list(self.stop.token_ids) or None, **options}
        if self.model.generation_config.max_new_tokens is None:
            settings.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
        if "temperature" in options:
            settings.setdefault("do_sample", options["temperature"] > 0)
        if not settings.get("do_sample", True):
            settings.pop("temperature", None)  # transformers refuses a temperature that it will not use
        return settings

    def _before_stop(self, ids: list[int]) -> list[int]:
        return ids[: next((index for index, token in enumerate(ids) if token in self.stop.token_ids), len(ids))]

    def _text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        return self.stop.cut(self._decode_after(prompt, ids))

    def _decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Decode generated ids as they continue the prompt."""
        anchor = list(prompt[-ANCHOR_TOKENS:])
        return self.encoder.decode([*anchor, *ids])[len(self.encoder.decode(anchor)) :]


class _StopSequences(transformers.StoppingCriteria):
    """Ends each answer at its first stop sequence, and all of them once nobody listens any more."""

    def __init__(self, engine: Engine, prompt_length: int, tokens: "_TokenQueue | None") -> None:
        self._engine = engine
        self._prompt_length = prompt_length
        self._tokens = tokens
        # A stop sequence of n characters lies within the last n tokens, plus those that hold half a character.
        self._tail = max((len(sequence) for sequence in engine.stop.sequences), default=0) + 4

    def __call__(self, input_ids_BT: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        done = torch.zeros(len(input_ids_BT), dtype=torch.bool, device=input_ids_BT.device)
        if self._tokens is not None and self._tokens.is_cancelled:
            return ~done
        stop = self._engine.stop
        if stop.sequences:
            for row, ids in enumerate(input_ids_BT[:, self._prompt_length :][:, -self._tail :].tolist()):
                text = self._engine.encoder.decode(ids)
                done[row] = any(sequence in text for sequence in stop.sequences)
        return done


class _TokenQueue(transformers.generation.BaseStreamer):
    """Hands tokens from the thread that generates to the one that reads."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._saw_prompt:
            for token in value.flatten().tolist():
                self._queue.put(token)
        self._saw_prompt = True  # the first call brings the prompt

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._queue.get, None)
