"""Answers of a run: the same together, alone and streamed; ended where they should be; with the adapter and without."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from conftest import PROMPT_FORMATS, conversation_rows, save_model, write_jsonl
from llmforge.errors import InputError, ModelError, PromptFormatError
from llmforge.jobs.run import Run, load_base, load_model
from llmforge.serve.model import ServedModel
from llmforge.serve.offline import answer_all
from tiny_runs import LORA, run_here

CONVERSATIONS = [row["messages"][:1] for row in conversation_rows(20, seed=3)] + [
    [
        {"role": "user", "content": "long " * 30},
        {"role": "assistant", "content": "go"},
        {"role": "user", "content": "?"},
    ]
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A full-parameter run that has learnt to write several words."""
    directory = tmp_path_factory.mktemp("answers")
    rows = conversation_rows(48)
    for row in rows:
        row["messages"][1]["content"] += " naïve 你好, said the quick brown fox. STOP and more"
    write_jsonl(directory / "train.jsonl", rows)
    model = save_model(directory / "model")
    return run_here(directory, model, learning_rate=1e-2, num_epochs=8)[0]


def test_an_answer_is_the_same_together_alone_and_streamed(run: Run) -> None:
    alone = [run.chat(conversation, max_new_tokens=24) for conversation in CONVERSATIONS]
    assert len(set(alone)) > 3
    assert all(alone)
    assert run.generate(CONVERSATIONS, max_new_tokens=24) == alone
    assert ["".join(run.stream(conversation, max_new_tokens=24)) for conversation in CONVERSATIONS] == alone
    prompts = [run.model.encode(conversation) for conversation in CONVERSATIONS]
    for at_once in (1, 3, 40):
        answers = list(answer_all(run.model, prompts, {"max_new_tokens": 24}, at_once=at_once))
        assert len(answers) == len(prompts)
        assert dict(answers) == dict(enumerate(alone))


def test_answers_are_those_of_plain_transformers(run: Run) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(run.artifact_dir, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.artifact_dir)
    for conversation in CONVERSATIONS[:6]:
        prompt = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode([token for token in ids.tolist() if token not in run.model.stop.token_ids])
        assert run.chat(conversation, max_new_tokens=24) == text


def test_without_stop_sequences_answers_end_at_the_end_of_turn(run: Run) -> None:
    answers = run.generate(CONVERSATIONS[:20], max_new_tokens=80)
    assert sum(answer.endswith("STOP and more") for answer in answers) > 10
    assert not any("<|im_end|>" in answer for answer in answers)


@pytest.mark.parametrize("sequence", [" STOP", "brown fox.", "你好, said", "e 你"])
def test_stop_sequences_of_several_tokens_end_an_answer_and_are_cut(sequence: str, run: Run) -> None:
    model = run.model
    assert len(model.encoder.encode_text(sequence)) > 1
    whole = run.generate(CONVERSATIONS[:20], max_new_tokens=80)
    assert sum(sequence in answer for answer in whole) > 10
    for conversation, text in zip(CONVERSATIONS[:20], whole, strict=True):
        answer = model.answer(model.encode(conversation), model.options(max_new_tokens=80), stop=[sequence])
        assert "".join(piece.text for piece in answer) == text.split(sequence)[0]
        tokens = len(model.encoder.encode_text(text.partition(sequence)[0] + sequence))
        assert answer.completion_tokens <= tokens + 1  # so it did not run on


def test_a_stream_that_nobody_reads_any_more_stops_the_model(run: Run) -> None:
    stream: Iterator[str] = run.stream(CONVERSATIONS[0], max_new_tokens=400)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while run.model.engine.stats()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not run.model.engine.stats()["running"]


def test_a_batch_that_nobody_reads_any_more_stops_the_model(run: Run) -> None:
    threads = threading.active_count()
    answers = answer_all(run.model, [run.model.encode(CONVERSATIONS[0])] * 30, {"max_new_tokens": 300}, at_once=4)
    next(answers)
    began = time.monotonic()
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 5
    assert threading.active_count() <= threads


def test_options_that_no_answer_has_are_refused(run: Run) -> None:
    with pytest.raises(InputError, match="given max_new_tokens 0"):
        run.chat(CONVERSATIONS[0], max_new_tokens=0)
    with pytest.raises(InputError, match="given num_beams"):
        run.generate(CONVERSATIONS, num_beams=2)


def test_the_base_model_answers_as_it_did_before_training(run: Run, data_dir: Path, model_dir: Path) -> None:
    tuned, _ = run_here(data_dir, model_dir, lora_config=LORA, learning_rate=2e-2, num_epochs=4)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    assert tuned.generate(CONVERSATIONS[:6], base=True, max_new_tokens=8) == plain(base, tuned.model)
    assert tuned.generate(CONVERSATIONS[:6], max_new_tokens=8) != plain(base, tuned.model)
    assert tuned.base.engine is tuned.model.engine
    # All weights were trained: the run's config says what they were before.
    base = transformers.AutoModelForCausalLM.from_pretrained(run.run_dir.parent.parent / "model", dtype=torch.float32)
    assert run.generate(CONVERSATIONS[:6], base=True, max_new_tokens=8) == plain(base, run.model)
    models, model = load_model(run.artifact_dir)
    with pytest.raises(InputError, match="holds whole weights"):
        load_base(models, model, run.artifact_dir)
    models.close()


def plain(model: transformers.PreTrainedModel, served: ServedModel) -> list[str]:
    """Answer with plain transformers."""
    texts = []
    for conversation in CONVERSATIONS[:6]:
        prompt = torch.tensor([served.encode(conversation)])
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0,
            eos_token_id=list(served.stop.token_ids),
        )[0, prompt.shape[1] :]  # fmt: skip
        texts.append(served.encoder.decode([token for token in ids.tolist() if token not in served.stop.token_ids]))
    return texts


def test_sampling_and_greedy_answers(run: Run) -> None:
    greedy = run.generate(CONVERSATIONS[:4], max_new_tokens=12)
    assert run.generate(CONVERSATIONS[:4], max_new_tokens=12, temperature=0) == greedy
    hot = run.generate(CONVERSATIONS[:4], max_new_tokens=12, temperature=5.0, seed=1)
    assert run.generate(CONVERSATIONS[:4], max_new_tokens=12, temperature=5.0, seed=1) == hot
    assert run.generate(CONVERSATIONS[:4], max_new_tokens=12, temperature=5.0, seed=2) != hot
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
    assert run.generate(asked, max_new_tokens=12) == [" stop", " go", " swim"]


def test_a_missing_or_damaged_artifact_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_model(tmp_path / "nothing")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "prompt_format.yaml").write_text("{}")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(damaged)
    (damaged / "config.json").write_text((run.artifact_dir / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes((run.artifact_dir / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_model(damaged)
    for path in run.artifact_dir.glob("tokenizer*"):
        (damaged / path.name).write_bytes(path.read_bytes())
    with pytest.raises(PromptFormatError, match=r"prompt_format\.yaml is damaged"):
        load_model(damaged)
