"""The models that are served: one copy of the weights for all adapters of a base, each in its own format."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import PROMPT_FORMATS, conversation_rows, save_model, write_jsonl
from llmforge.errors import InputError, ModelError
from llmforge.models.source import ModelSource
from llmforge.models.trained import load_trained_model
from llmforge.serve.model import ServedModel
from llmforge.serve.models import Loading, Models, UnknownModelError
from llmforge.serve.requests import OverloadedError
from tiny_runs import LORA, run_here

FP32 = Loading(dtype="fp32")
ASKED = [[{"role": "user", "content": f"What does {colour} mean?"}] for colour in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> Path:
    """An adapter that has learnt something."""
    directory = tmp_path_factory.mktemp("run")
    write_jsonl(directory / "train.jsonl", conversation_rows(48))
    return run_here(directory, base_dir, lora_config=LORA, learning_rate=2e-2, num_epochs=2)[0].artifact_dir


@pytest.fixture
def models() -> Iterator[Models]:
    served = Models(cache_bytes=1 << 28)
    yield served
    served.close()


def source(directory: Path) -> ModelSource:
    return ModelSource(str(directory), directory)


def changed(artifact: Path, directory: Path, factor: float, **settings: Any) -> Path:
    """Copy an adapter and make another one of it."""
    shutil.copytree(artifact, directory)
    weights = directory / "adapter_model.safetensors"
    tensors = {name: tensor * factor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return directory


def answers(model: ServedModel, tokens: int = 8) -> list[list[int]]:
    """Answer some questions greedily, all at the same time; give the token ids."""
    asked = [model.answer(model.encode(messages), model.options(max_new_tokens=tokens)) for messages in ASKED]
    return [[token.id for piece in answer for token in piece.tokens] for answer in asked]


def expected(artifact: Path, model: ServedModel, tokens: int = 8) -> list[list[int]]:
    """Answer them with plain transformers and PEFT."""
    plain = load_trained_model(artifact, dtype=torch.float32)
    found = []
    for messages in ASKED:
        prompt = torch.tensor([model.encode(messages)])
        with torch.no_grad():
            ids = plain.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                eos_token_id=list(model.stop.token_ids), pad_token_id=0,
            )  # fmt: skip
        rest = ids[0, prompt.shape[1] :].tolist()
        found.append(rest[:-1] if rest[-1] in model.stop.token_ids else rest)
    return found


def test_adapters_of_a_base_share_its_weights_and_answer_as_peft_does(
    models: Models, artifact: Path, tmp_path: Path
) -> None:
    one = models.add("one", source(artifact), FP32)
    other = models.add("other", source(changed(artifact, tmp_path / "other", -1.5)), FP32)
    third = models.add_adapter("third", changed(artifact, tmp_path / "third", 3.0))
    base = models.add_base_of(one, "base")
    assert one.engine is other.engine is third.engine is base.engine
    for model, directory in ((one, artifact), (other, tmp_path / "other"), (third, tmp_path / "third")):
        assert answers(model) == expected(directory, model)
    assert len({str(answers(model)) for model in (one, other, third, base)}) == 4
    assert [model.name for model in models.all()] == ["one", "other", "third", "base"]
    assert models.default is None
    assert one.defaults["eos_token_id"]
    models.remove("other")
    with pytest.raises(UnknownModelError, match="there is no model other; served are one, third, base"):
        models.get("other")
    assert answers(one) == expected(artifact, one)


def test_each_adapter_is_asked_in_its_own_format(models: Models, artifact: Path, tmp_path: Path) -> None:
    one = models.add("one", source(artifact), FP32)
    other_dir = changed(artifact, tmp_path / "other", 1.0)
    content = {"prompt_format": PROMPT_FORMATS["llama_guard2"], "stopping_sequences": ["##"], "stopping_tokens": [7]}
    (other_dir / "prompt_format.yaml").write_text(yaml.safe_dump(content))
    other = models.add_adapter("other", other_dir)
    assert other.engine is one.engine
    assert (other.stop.sequences, other.stop.token_ids) == (("##",), (7,))
    assert other.encode(ASKED[0]) != one.encode(ASKED[0])
    assert other.encoder.tokenizer is one.encoder.tokenizer  # which is large, and the same


def test_a_plain_adapter_takes_the_format_of_its_base(artifact: Path, base_dir: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    models = Models(note=notes.append, cache_bytes=1 << 28)
    base = models.add("tiny", source(base_dir), FP32)
    assert models.default is base
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(artifact / name, plain / name)
    adapter = models.add_adapter("plain", plain)
    assert adapter.encode(ASKED[0]) == base.encode(ASKED[0])
    assert notes == [f"the adapter in {plain} brings no prompt_format.yaml; it is served in the prompt format of tiny"]
    assert answers(adapter) == expected(artifact, adapter)
    models.close()


def test_an_adapter_of_another_base_is_refused_by_both_names(
    models: Models, artifact: Path, base_dir: Path, tmp_path: Path
) -> None:
    models.add("one", source(artifact), FP32)
    elsewhere = save_model(tmp_path / "elsewhere", tie_word_embeddings=True)
    foreign = changed(artifact, tmp_path / "foreign", 1.0, base_model_name_or_path=str(elsewhere))
    with pytest.raises(
        ModelError, match=rf"was trained on {elsewhere}, and the base models that are served are: .*tiny"
    ):
        models.add_adapter("foreign", foreign)
    hub = changed(artifact, tmp_path / "hub", 1.0, base_model_name_or_path="org/name", revision="v2")
    with pytest.raises(ModelError, match=r"was trained on org/name at v2, and the base models that are served are"):
        models.add_adapter("hub", hub)
    copied = tmp_path / "copied"
    shutil.copytree(base_dir, copied)
    models.add_adapter("copy", changed(artifact, tmp_path / "copy", 1.0, base_model_name_or_path=str(copied)))
    with pytest.raises(InputError, match="two models have the name one"):
        models.add_adapter("one", artifact)


def test_an_adapter_that_changes_the_base_gets_weights_of_its_own(
    models: Models, artifact: Path, base_dir: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    models._note = notes.append
    one = models.add("one", source(artifact), FP32)
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(24))
    lora = {**LORA, "use_dora": True, "modules_to_save": ["lm_head"]}
    run, _ = run_here(tmp_path, base_dir, lora_config=lora, learning_rate=2e-2)
    own = models.add("own", source(run.artifact_dir), FP32)
    assert own.engine is not one.engine
    assert own.adapter is None
    assert answers(own) == expected(run.artifact_dir, own)
    assert any("a copy of the weights of its own (it has use_dora)" in note for note in notes)
    assert models.add_base_of(own, "base").engine is one.engine


def test_whole_weights_have_no_base(models: Models, base_dir: Path) -> None:
    tiny = models.add("tiny", source(base_dir), FP32)
    with pytest.raises(InputError, match="holds whole weights; its base model is not part of it"):
        models.add_base_of(tiny, "base")
    with pytest.raises(ModelError, match="there is no model at"):
        models.add("none", source(base_dir / "none"), FP32)


@pytest.fixture
def many(artifact: Path, tmp_path: Path) -> tuple[Models, Path]:
    """A server of one adapter, beside five that it finds on demand, of which it keeps two; one is in its run."""
    directory = tmp_path / "adapters"
    for number in range(4):
        changed(artifact, directory / f"a{number}", 0.5 + number)
    changed(artifact, directory / "org--tiny-user-abcde" / "artifact", 9.0)
    models = Models(dynamic_lora_loading_path=str(directory), max_adapters=2, cache_bytes=1 << 28)
    models.add("one", source(artifact), FP32)
    return models, directory


def test_adapters_are_loaded_on_demand_and_the_oldest_makes_room(many: tuple[Models, Path]) -> None:
    models, directory = many
    engine: Any = models.get("one").engine
    for name in ("a0", "one:a1", "a2", "a1", "org--tiny-user-abcde"):
        model = models.get(name)
        assert model.name == name
        assert model.engine is engine
        place = directory / name.removeprefix("one:")
        assert answers(model) == expected(
            place if (place / "adapter_config.json").exists() else place / "artifact", model
        )
    assert [model.name for model in models.all()] == ["one", "a1", "org--tiny-user-abcde"]
    answers(models.get("one"))  # a step, after which those that were dropped are gone
    assert len(engine._adapters.bytes_of) == 3
    models.close()


def test_an_adapter_that_answers_is_not_dropped(many: tuple[Models, Path]) -> None:
    models, _ = many
    asked = models.get("a0")
    answer = asked.answer(asked.encode(ASKED[0]), asked.options(max_new_tokens=400))
    held = models.get("a1")  # whose request has not come yet
    del asked
    with pytest.raises(OverloadedError, match="all 2 adapters that may be loaded at a time are answering"):
        models.get("a2")
    assert next(iter(answer)).text
    del answer
    assert models.get("a2").name == "a2"
    assert [model.name for model in models.all()] == ["one", "a1", "a2"]
    assert answers(held)
    models.close()


@pytest.mark.parametrize(
    "name",
    [
        "a9",
        "../a0",
        "a0/../../one",
        "/etc",
        "..",
        ".",
        "",
        "one:",
        "one:../a0",
        "a0\0",
        "two:a0",
        ".a0",
        "~",
        "a" * 300,
    ],
)
def test_no_name_leads_out_of_the_directory(name: str, many: tuple[Models, Path]) -> None:
    models, directory = many
    shutil.copytree(directory / "a0", directory.parent / "outside")
    shutil.copytree(directory / "a0", directory / ".a0")
    with pytest.raises(UnknownModelError, match=r"there is no model .*; served are one, and adapters in"):
        models.get(name)
    models.close()


def test_many_threads_ask_for_many_adapters(many: tuple[Models, Path]) -> None:
    models, directory = many
    wanted = {}
    for number in range(4):
        model = models.get(f"a{number}")
        wanted[f"a{number}"] = expected(directory / f"a{number}", model)
        del model
    wrong: list[str] = []

    def ask(offset: int) -> None:
        for number in range(8):
            name = f"a{(number + offset) % 4}"
            while True:
                try:
                    model = models.get(name)
                    break
                except OverloadedError:
                    threading.Event().wait(0.01)
            if answers(model) != wanted[name]:
                wrong.append(name)
            del model

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert len(models.all()) <= 3
    models.close()
