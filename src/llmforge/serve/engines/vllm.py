"""Answers with vLLM, where it is installed (https://docs.vllm.ai).

vLLM batches, schedules and keeps its cache in processes of its own; here is an event loop in a thread that speaks with
them. Prompts and answers are token ids, so that text is rendered and read by the same code as with every other engine.
"""

import asyncio
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmforge.errors import InputError, LlmforgeError, ModelError
from llmforge.models.device import Dtype, best_dtype, find_device
from llmforge.models.merge import servability
from llmforge.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource
from llmforge.serve.requests import FinishReason, Listener, OverloadedError, Request, Sampling, Token, Update

MAX_LORA_RANK = 64
ADAPTERS_AT_ONCE = 4  # in one batch
_DTYPES: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16"}
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled"}
_RETRY_AFTER, _SHUTDOWN, _LOOK = 1.0, 10.0, 0.05  # seconds
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(eq=False)
class _Answer:
    """A request and how far it is; also the ticket."""

    request: Request
    listener: Listener
    engine: "VllmEngine"
    params: Any
    adapter: Any
    task: "asyncio.Task[None] | None" = None
    is_cancelled: bool = False
    is_over: bool = False
    generated: int = field(default=0)

    def cancel(self) -> None:
        self.is_cancelled = True
        self.engine.stop_answer(self)

    def tell(self, update: Update) -> None:
        """Tell the listener, which hears of one end only."""
        if not self.is_over:
            self.is_over = update.finish is not None or update.error is not None
            self.listener(update)


class VllmEngine:
    """An `Engine` over vLLM's asynchronous one.

    Args:
        arguments: of vLLM's `AsyncEngineArgs`.
        max_batch: answers at a time; vLLM's `max_num_seqs`.
        max_waiting: requests that wait; more are refused.

    Raises:
        InputError: vLLM is not installed, or knows not one of the arguments.
        ModelError: vLLM cannot load the model.
    """

    note = ""

    def __init__(self, arguments: Mapping[str, Any], *, max_batch: int, max_waiting: int) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            import vllm
        except ImportError as error:
            raise InputError(
                f"the engine vllm needs the package vllm, which cannot be imported ({error}); install it as "
                "https://docs.vllm.ai/en/stable/getting_started/installation says, or use --engine transformers"
            ) from error
        self._vllm = vllm
        try:
            settings = vllm.AsyncEngineArgs(**arguments)
        except TypeError as error:
            raise InputError(f"engine_kwargs: vLLM {vllm.__version__} does not take them ({error})") from error
        self._places, self._max_batch = max_batch + max_waiting, max_batch
        self._max_lora_rank = settings.max_lora_rank if settings.enable_lora else 0
        self._max_logprobs = settings.max_logprobs
        self._answers: set[_Answer] = set()
        self._adapters: dict[str, Any] = {}
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._is_closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        try:
            self._llm: Any = self._wait(_start(settings))
        except Exception as error:
            self._end_thread()
            raise ModelError(
                f"vLLM cannot load {arguments.get('model')} ({type(error).__name__}: {error}); what it wrote above "
                "says why. Where its reason is LoRA, which it is started with, set engine_kwargs: {enable_lora: false}"
            ) from error
        self.context_length: int = self._llm.model_config.max_model_len
        self._base: Any = None  # what requests for the base model name as their adapter
        self._zeros = tempfile.TemporaryDirectory(prefix="llmforge-")

    @classmethod
    def load(
        cls,
        source: ModelSource,
        tokenizer: Any,
        *,
        max_batch: int,
        max_waiting: int,
        dtype: Dtype | None = None,
        trust_remote_code: bool = False,
        context_length: int | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a base model, or the whole weights of an artifact.

        Args:
            tokenizer: is not used; vLLM reads its own, for grammars.
            dtype: number format; None takes the best for the hardware.
            engine_kwargs: further arguments of vLLM, which come before those from here.
        """
        arguments = {
            "model": str(source.directory),
            "dtype": _DTYPES[dtype or best_dtype(find_device())[0]],
            "trust_remote_code": trust_remote_code,
            "max_num_seqs": max_batch,
            **({} if context_length is None else {"max_model_len": context_length}),
            "enable_lora": True,
            **(engine_kwargs or {}),
        }
        if arguments["enable_lora"]:
            arguments = {"max_lora_rank": MAX_LORA_RANK, "max_loras": ADAPTERS_AT_ONCE, **arguments}
        return cls(arguments, max_batch=max_batch, max_waiting=max_waiting)

    def submit(self, request: Request, listener: Listener) -> _Answer:
        """Take a request; see `Engine.submit`."""
        length, sampling = len(request.prompt_ids), request.sampling
        if not 0 < length < self.context_length:
            raise InputError(
                f"the prompt has {length:,} tokens; allowed are 1 to {self.context_length - 1:,}, since prompt and "
                f"answer share a context of {self.context_length:,}"
            )
        if request.adapter is not None and request.adapter not in self._adapters:
            raise InputError(f"there is no adapter {request.adapter!r} in this engine")
        if sampling.logprobs is not None and sampling.logprobs > self._max_logprobs:
            raise InputError(
                f"{sampling.logprobs} log-probabilities are asked for; this engine gives {self._max_logprobs} at most"
            )
        params = self._params(request)
        with self._lock:
            adapter = self._base if request.adapter is None else self._adapters[request.adapter]
            answer = _Answer(request, listener, self, params, adapter)
            if self._is_closing:
                raise OverloadedError("the server is being stopped", retry_after=10.0)
            if len(self._answers) >= self._places:
                raise OverloadedError(
                    f"{len(self._answers) - self._max_batch} requests are waiting already; try again later",
                    _RETRY_AFTER,
                )
            self._answers.add(answer)
        self._loop.call_soon_threadsafe(self._begin, answer)
        return answer

    def stop_answer(self, answer: _Answer) -> None:
        """Have vLLM give up an answer."""
        if not answer.is_over and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: answer.task is not None and answer.task.cancel())

    def add_adapter(self, name: str, directory: Path) -> None:
        """Have vLLM read an adapter. Raises ModelError when it cannot."""
        settings = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        reasons = servability(directory)
        if not self._max_lora_rank:
            reasons.append("vLLM was started without LoRA (engine_kwargs: {enable_lora: true} starts it with it)")
        elif settings["r"] > self._max_lora_rank:
            reasons.append(
                f"its rank is {settings['r']}, and vLLM has room for {self._max_lora_rank} (engine_kwargs: "
                "{max_lora_rank: …} gives it more)"
            )
        if reasons:
            raise ModelError(
                f"vLLM cannot serve the adapter in {directory}: {'; '.join(reasons)}. llmforge export --format merged "
                "makes a whole model of it; --engine transformers serves it as it is"
            )
        try:
            if self._base is None and self._vllm.platforms.current_platform.is_cpu():
                self._set_base_apart(directory)
            self._adapters[name] = self._add(name, directory)
        except Exception as error:
            raise ModelError(
                f"vLLM cannot load the adapter in {directory} ({type(error).__name__}: {error})"
            ) from error

    def _add(self, name: str, directory: Path) -> Any:
        request = self._vllm.lora.request.LoRARequest(name, next(self._ids), str(directory))
        self._wait(self._llm.add_lora(request))
        return request

    def _set_base_apart(self, adapter: Path) -> None:
        """Have requests for the base model name an adapter too, one that adds zeros, before the first adapter comes.

        On a CPU, vLLM computes a request without an adapter with the last one in memory where others in the batch have
        one (https://github.com/vllm-project/vllm/pull/48421).
        """
        with safe_open(adapter / ADAPTER_WEIGHTS, "pt") as weights:
            module = next(name for name in sorted(weights.keys()) if name.endswith(_A)).removesuffix(_A)
            shapes = {name: weights.get_slice(name).get_shape() for name in (module + _A, module + _B)}
        directory = Path(self._zeros.name)
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module.rsplit(".", 1)[-1]]}
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
        zeros = {
            module + _A: torch.zeros(1, shapes[module + _A][1]),
            module + _B: torch.zeros(shapes[module + _B][0], 1),
        }
        save_file(zeros, directory / ADAPTER_WEIGHTS)
        base = self._add("zeros", directory)
        with self._lock:
            self._base = base
        while self._has_bare_answers():
            time.sleep(_LOOK)

    def _has_bare_answers(self) -> bool:
        with self._lock:
            return any(answer.adapter is None for answer in self._answers)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests that name it already are answered, for vLLM reads it again where it must."""
        self._adapters.pop(name, None)

    def stats(self) -> dict[str, float]:
        """See `Engine.stats`."""
        with self._lock:
            answers = list(self._answers)
        return {
            "running": min(len(answers), self._max_batch),
            "waiting": max(0, len(answers) - self._max_batch),
            "cached_tokens": sum(len(a.request.prompt_ids) + a.generated for a in answers if a.generated),
        }

    def close(self) -> None:
        """Stop; see `Engine.close`."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        self._wait(self._end_answers())
        self._llm.shutdown(timeout=_SHUTDOWN)
        self._llm = None  # it ends itself again when it is deleted, which fails once Python itself ends
        self._end_thread()
        self._zeros.cleanup()

    def _params(self, request: Request) -> Any:
        sampling = request.sampling
        constraint = None if sampling.grammar is None else self._constraint(sampling.grammar)
        return self._vllm.SamplingParams(
            max_tokens=min(sampling.max_tokens, self.context_length - len(request.prompt_ids)),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            logprobs=sampling.logprobs,
            # What ends an answer are our stop rules, of which the EOS is part. A grammar ends with vLLM's own.
            ignore_eos=sampling.ignore_stops or constraint is None,
            stop_token_ids=[] if sampling.ignore_stops else sorted(request.stop_token_ids),
            structured_outputs=constraint,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )

    def _constraint(self, grammar: str) -> Any:
        """Hand on a grammar: of a JSON schema, which each of vLLM's libraries can follow, the schema itself."""
        kind = self._vllm.sampling_params.StructuredOutputsParams
        if not grammar.lstrip().startswith("{"):
            return kind(grammar=grammar)
        parts = json.loads(grammar)["grammars"]
        if len(parts) != 1 or "json_schema" not in parts[0]:
            raise InputError("the engine vllm follows JSON schemas and single grammars only")
        return kind(json=parts[0]["json_schema"])

    def _begin(self, answer: _Answer) -> None:
        answer.task = self._loop.create_task(self._generate(answer))
        answer.task.add_done_callback(lambda task: self._forget(answer))
        if answer.is_cancelled:
            answer.task.cancel()

    def _forget(self, answer: _Answer) -> None:
        answer.tell(Update((), "cancelled"))  # unless it came to its end
        with self._lock:
            self._answers.discard(answer)

    async def _generate(self, answer: _Answer) -> None:
        prompt = {"prompt_token_ids": list(answer.request.prompt_ids)}
        try:
            async for output in self._llm.generate(
                prompt, answer.params, str(next(self._ids)), lora_request=answer.adapter
            ):
                completion = output.outputs[0]
                tokens = _tokens(completion, answer.request.sampling)
                answer.generated += len(tokens)
                finish = _FINISH.get(completion.finish_reason or "")
                if finish is None and completion.finish_reason is not None:
                    raise ModelError(f"vLLM ended the answer with {completion.finish_reason}")
                if tokens or finish is not None:
                    answer.tell(Update(tokens, finish))
        except Exception as error:
            answer.tell(Update((), error=_in_words(error)))

    async def _end_answers(self) -> None:
        with self._lock:
            tasks = [answer.task for answer in self._answers if answer.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if (handler := getattr(self._llm, "output_handler", None)) is not None:
            handler.cancel()  # vLLM does so later, when it has told of its own end as of a failure

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end_thread(self) -> None:
        self._wait(_end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _start(settings: Any) -> Any:
    """Start vLLM on the running loop, which from then on carries its messages."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(settings)


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _tokens(completion: Any, sampling: Sampling) -> tuple[Token, ...]:
    """Take the new tokens out of an output, with their log-probabilities where they were asked for."""
    if sampling.logprobs is None:
        return tuple(Token(token) for token in completion.token_ids)
    told = []
    for token, place in zip(completion.token_ids, completion.logprobs, strict=True):
        ranked = sorted(place.items(), key=lambda item: item[1].rank)
        top = tuple((other, float(found.logprob)) for other, found in ranked[: sampling.logprobs])
        told.append(Token(token, float(place[token].logprob), top))
    return tuple(told)


def _in_words(error: Exception) -> Exception:
    if isinstance(error, LlmforgeError):
        return error
    if isinstance(error, ValueError):  # what vLLM refuses of a request
        return InputError(f"vLLM refuses the request: {error}")
    return ModelError(f"vLLM failed: {type(error).__name__}: {error}")
