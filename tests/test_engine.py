"""Answers: the same in a batch, alone and streamed; ended where they should be; with the adapter and without."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import PROMPT_FORMATS, conversation_rows, save_model, write_jsonl
from llmforge.errors import InputError, ModelError
from llmforge.models.load import load_tokenizer
from llmforge.models.source import ModelSource
from llmforge.prompt import Encoder, StopRules, build_format
from llmforge.serve.engine import Engine
from tiny_runs import LORA, run_here

CONVERSATIONS = [row["messages"][:1] for row in conversation_rows(20, seed=3)] + [
    [
        {"role": "user", "content": "long " * 30},
        {"role": "assistant", "content": "go"},
        {"role": "user", "content": "?"},
    ]
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-parameter artifact that has learnt to write several words."""
    directory = tmp_path_factory.mktemp("engine")
    rows = conversation_rows(48)
    for row in rows:
        row["messages"][1]["content"] += " naïve 你好, said the quick brown fox. STOP and more"
    write_jsonl(directory / "train.jsonl", rows)
    model = save_model(directory / "model")
    return run_here(directory, model, learning_rate=1e-2, num_epochs=8)[0].artifact_dir


@pytest.fixture(scope="module")
def engine(artifact: Path) -> Engine:
    return Engine.load(artifact, dtype="fp32")


def with_stops(engine: Engine, *sequences: str) -> Engine:
    return Engine(
        engine.model, engine.encoder, StopRules.derive(engine.encoder, sequences, []), engine.device, engine.dtype
    )


def test_an_answer_is_the_same_in_a_batch_alone_and_streamed(engine: Engine) -> None:
    alone = [engine.generate([conversation], max_new_tokens=24)[0] for conversation in CONVERSATIONS]
    assert len(set(alone)) > 3
    assert all(alone)
    for batch_size in (3, 8, 21):
        assert engine.generate(CONVERSATIONS, batch_size=batch_size, max_new_tokens=24) == alone
    assert ["".join(engine.stream(conversation, max_new_tokens=24)) for conversation in CONVERSATIONS] == alone


def test_answers_are_those_of_plain_transformers(engine: Engine, artifact: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact)
    for conversation in CONVERSATIONS[:6]:
        prompt = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode([token for token in ids.tolist() if token not in engine.stop.token_ids])
        assert engine.generate([conversation], max_new_tokens=24) == [text]


def test_without_stop_sequences_answers_end_at_the_end_of_turn(engine: Engine) -> None:
    answers = engine.generate(CONVERSATIONS[:20], max_new_tokens=80)
    assert sum(answer.endswith("STOP and more") for answer in answers) > 10
    assert not any("<|im_end|>" in answer for answer in answers)


@pytest.mark.parametrize("sequence", [" STOP", "brown fox.", "你好, said", "e 你"])
def test_stop_sequences_of_several_tokens_end_an_answer_and_are_cut(sequence: str, engine: Engine) -> None:
    assert len(engine.encoder.encode_text(sequence)) > 1
    conversations = CONVERSATIONS[:20]
    whole = engine.generate(conversations, max_new_tokens=80)
    assert sum(sequence in answer for answer in whole) > 10
    stopped = with_stops(engine, sequence)
    answers = stopped.generate(conversations, max_new_tokens=80)
    assert answers == [answer.split(sequence)[0] for answer in whole]
    for conversation, answer in zip(conversations[:6], answers, strict=False):
        pieces = list(stopped.stream(conversation, max_new_tokens=80))
        assert "".join(pieces) == answer  # so nothing of the sequence was ever shown
        assert all(pieces)


def test_generation_stops_at_a_stop_sequence_and_does_not_run_on(engine: Engine) -> None:
    calls: list[int] = []
    hook = engine.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        with_stops(engine, "brown").generate([CONVERSATIONS[0]], max_new_tokens=80)
    finally:
        hook.remove()
    whole = engine.encoder.encode_text(engine.generate([CONVERSATIONS[0]], max_new_tokens=80)[0].split("fox")[0])
    assert len(calls) <= len(whole) + 1


def test_half_a_stop_sequence_and_half_a_character_are_held_back(engine: Engine) -> None:
    text = "stop naïve 日本 STO"
    ids = engine.encoder.encode_text(text)
    assert len(ids) > len(engine.encoder.encode_text("stop naïve STO")) + 3  # 日本 is spelt in bytes
    scripted = Scripted(engine, [*ids, *engine.encoder.encode_text("RE")])
    pieces = list(with_stops(scripted.engine, "STOP").stream(CONVERSATIONS[0], max_new_tokens=50))
    assert "".join(pieces) == "stop naïve 日本 STORE"
    assert not any("\ufffd" in piece for piece in pieces)
    assert not any(text.endswith(("S", "ST", "STO")) for text in itertools.accumulate(pieces))  # it might become STOP

    scripted = Scripted(engine, [*ids, *engine.encoder.encode_text("P it")])
    assert (
        "".join(with_stops(scripted.engine, "STOP").stream(CONVERSATIONS[0], max_new_tokens=50)) == "stop naïve 日本 "
    )


def test_bytes_that_are_no_text_end_as_replacement_characters(engine: Engine) -> None:
    half = engine.encoder.encode_text("a日")[:2]
    scripted = Scripted(engine, half)
    streamed = "".join(scripted.engine.stream(CONVERSATIONS[0], max_new_tokens=2))
    assert streamed == scripted.engine.generate([CONVERSATIONS[0]], max_new_tokens=2)[0]
    assert streamed.startswith("a\ufffd")


class Scripted:
    """An engine whose model is made to say given tokens and then end its turn."""

    def __init__(self, engine: Engine, ids: list[int]) -> None:
        end = engine.stop.token_ids[0]
        config = engine.model.config

        class Model(transformers.LlamaForCausalLM):
            said = 0

            def forward(self, input_ids: Any = None, **options: Any) -> Any:
                output = super().forward(input_ids=input_ids, **options)
                self.said = 0 if input_ids.shape[1] > 1 else self.said + 1  # the prompt comes in one piece
                output.logits[:, -1] = -1.0
                output.logits[:, -1, ids[self.said] if self.said < len(ids) else end] = 1.0
                return output

        model = Model(config).eval()
        model.generation_config = engine.model.generation_config
        self.engine = Engine(model, engine.encoder, engine.stop, engine.device, engine.dtype)


def test_a_stream_that_nobody_reads_any_more_stops_the_model(engine: Engine) -> None:
    stream: Iterator[str] = engine.stream(CONVERSATIONS[0], max_new_tokens=400)
    next(stream)
    began, threads = time.monotonic(), threading.active_count()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 2
    assert threading.active_count() < threads


def test_a_failure_while_streaming_reaches_the_reader(engine: Engine) -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(engine.stream(CONVERSATIONS[0], max_new_tokens=0))


def test_without_the_adapter_it_answers_as_the_base_model(data_dir: Path, model_dir: Path) -> None:
    run, _ = run_here(data_dir, model_dir, lora_config=LORA, learning_rate=2e-2, num_epochs=4)
    tuned = Engine.load(run.artifact_dir, dtype="fp32")
    tokenizer = load_tokenizer(ModelSource("", model_dir))
    base_model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    base_model.generation_config = tuned.model.generation_config
    base = Engine(base_model, Encoder(tokenizer, build_format(None, tokenizer)), tuned.stop, tuned.device, tuned.dtype)
    expected = base.generate(CONVERSATIONS, max_new_tokens=8)
    with tuned.without_adapter():
        assert tuned.generate(CONVERSATIONS, max_new_tokens=8) == expected
    assert tuned.generate(CONVERSATIONS, max_new_tokens=8) != expected


def test_whole_weights_have_no_base_to_go_back_to(engine: Engine) -> None:
    with pytest.raises(InputError, match="whole weights"), engine.without_adapter():
        pass


def test_sampling_and_greedy_answers(engine: Engine) -> None:
    greedy = engine.generate(CONVERSATIONS[:4], max_new_tokens=12)
    assert engine.generate(CONVERSATIONS[:4], max_new_tokens=12, temperature=0) == greedy
    torch.manual_seed(0)
    hot = engine.generate(CONVERSATIONS[:4], max_new_tokens=12, temperature=5.0)
    torch.manual_seed(0)
    assert engine.generate(CONVERSATIONS[:4], max_new_tokens=12, temperature=5.0) == hot
    assert hot != greedy


def test_a_prompt_format_of_ones_own_is_answered_in_it(data_dir: Path, model_dir: Path) -> None:
    """The pass-through format: everything is in the data, and the stop string is several tokens."""
    rows = conversation_rows(48)
    for row in rows:
        row["messages"][0]["content"] = f"Q: {row['messages'][0]['content']}\nA:"
        row["messages"][1]["content"] = f" {row['messages'][1]['content']}\n##"
    write_jsonl(data_dir / "train.jsonl", rows)
    format = {**PROMPT_FORMATS["llama_guard2"], "assistant": "{instruction}"}
    run, _ = run_here(
        data_dir,
        model_dir,
        learning_rate=1e-2,
        num_epochs=12,
        generation_config={"prompt_format": format, "stopping_sequences": ["\n##"]},
    )
    asked = [[{"role": "user", "content": f"Q: {colour}?\nA:"}] for colour in ("red", "green", "blue")]
    assert run.engine.generate(asked, max_new_tokens=12) == [" stop", " go", " swim"]


def test_a_missing_or_damaged_artifact_is_named(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no artifact"):
        Engine.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        Engine.load(tmp_path / "empty")
