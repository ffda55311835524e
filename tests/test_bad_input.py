"""What bad input gets: exit code 2 and a sentence that says what was given and what to change, before any weights load.

The model here is a trap: its files are whole, but its weights are not those of its architecture, so that loading them
is an error that is unlike all others. The first test sees it snap.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import llmforge
from commands import llmforge as command
from commands import program, write_config
from conftest import conversation_rows, save_model, write_jsonl
from llmforge.errors import ConfigError, DataError

THE_TRAP = "of its architecture"
USER, ASSISTANT, SYSTEM = (
    {"role": "user", "content": "What does red mean?"},
    {"role": "assistant", "content": "stop"},
    {"role": "system", "content": "Be brief."},
)


@pytest.fixture(scope="session")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that cannot be told from a good one without loading its weights."""
    directory = save_model(tmp_path_factory.mktemp("trap"))
    save_file({"unused": np.zeros(1, np.float32)}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with good training data."""
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(16))
    return tmp_path


@pytest.fixture
def broken_model(trap: Path, place: Path) -> Callable[..., Path]:
    """Copies the model and breaks the copy: changes config.json, removes files, writes others."""

    def copy(*, remove: tuple[str, ...] = (), config: dict | None = None, **contents: bytes) -> Path:
        directory = place / "model"
        shutil.copytree(trap, directory)
        for name in remove:
            (directory / name).unlink()
        if config is not None:
            settings = json.loads((directory / "config.json").read_text()) | config
            (directory / "config.json").write_text(json.dumps(settings))
        for name, content in contents.items():
            (directory / name.replace("__", ".")).write_bytes(content)
        return directory

    return copy


def refused(place: Path, model: object, *said: object, **changes: Any) -> str:
    """Run `finetune`, and check that it refuses before the weights, says all of `said`, and leaves no run behind."""
    outcome = command("finetune", write_config(place, model, **changes))
    assert outcome.code == 2, outcome.err
    assert THE_TRAP not in outcome.error
    for text in said:
        assert str(text) in outcome.error
    assert outcome.out == ""
    assert not list(place.glob("runs/*"))
    return outcome.error


def test_good_input_reaches_the_weights(place: Path, trap: Path) -> None:
    outcome = command("finetune", write_config(place, trap))
    assert outcome.code == 2
    assert THE_TRAP in outcome.error


# --- data ---------------------------------------------------------------------------------------------------


def test_a_missing_file(place: Path, trap: Path) -> None:
    refused(place, trap, "nope.jsonl", "does not exist", place / "nope.jsonl", train_path="nope.jsonl")


def test_a_deepspeed_file_that_is_not_there(place: Path, trap: Path) -> None:
    outcome = command("validate", write_config(place, trap, deepspeed={"config_path": "configs/zero_3.json"}))
    assert outcome.code == 2
    for text in ("deepspeed.config_path: given configs/zero_3.json", str(place), "--set deepspeed=null"):
        assert text in outcome.error


def test_an_empty_file(place: Path, trap: Path) -> None:
    (place / "empty.jsonl").touch()
    refused(place, trap, "empty.jsonl", "empty", "one example a line", train_path="empty.jsonl")
    (place / "blank.jsonl").write_text("\n\n")
    refused(place, trap, "blank.jsonl", "no row", "one example a line", train_path="blank.jsonl")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{oops", ("not JSON", "column 2", "{oops", "one object a line")),
        ('["a", "b"]', ("JSON list", "one object a line")),
        ('"text"', ("not an object but 'text'", "one JSON object a line")),
        (b"\xff\xfe{}", ("not UTF-8", "0xff")),
        ({"text": "hello"}, ("no column 'messages'", "'text'", "data_format")),
        ({"messages": "hello"}, ("messages is the text 'hello'", "a list of {role, content}")),
        ({"messages": []}, ("empty list", "at least one user turn")),
        ({"messages": [{"role": "bot", "content": "x"}, ASSISTANT]}, ("'bot'", "system, user, assistant or tool")),
        ({"messages": [{"role": "user", "content": ""}, ASSISTANT]}, ("message 1", "empty content", "expected text")),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, ("message 2", "no content", "expected text")),
        ({"messages": [USER]}, ("no assistant turn", "'user'", "task: causal_lm")),
        ({"messages": [ASSISTANT]}, ("no user turn", "'assistant'")),
        ({"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, ("2 system messages", "at most one")),
        ({"chosen": [USER, ASSISTANT]}, ("'chosen' without 'rejected'", "needs both")),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, ("preference_tuning",)),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(place: Path, trap: Path, row: Any, said: tuple[str, ...]) -> None:
    good = json.dumps({"messages": [USER, ASSISTANT]}).encode()
    bad = row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
    (place / "train.jsonl").write_bytes(good + b"\n" + bad + b"\n" + good + b"\n")
    refused(place, trap, f"{place / 'train.jsonl'}:2: ", "on_bad_row: skip", *said)


def test_rows_that_are_all_too_long(place: Path, trap: Path) -> None:
    said = ("context_length 4", "overlong: drop", "nothing is left", "raise context_length")
    refused(place, trap, *said, context_length=4, overlong="drop")
    said = (f"{place / 'train.jsonl'}:1: ", "more than context_length 4", "overlong: truncate")
    refused(place, trap, *said, context_length=4, overlong="error")
    refused(place, trap, "nothing is left", "raise context_length", context_length=1)


# --- config -------------------------------------------------------------------------------------------------


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\x00")
    for path, said in (
        (tmp_path / "nope.yaml", "no such file"),
        (tmp_path, "is a directory"),
        (tmp_path / "binary.yaml", "not UTF-8"),
    ):
        outcome = command("finetune", path)
        assert outcome.code == 2
        assert f"{path}" in outcome.error
        assert said in outcome.error


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"context_length": 0}, "context_length", ("given 0", "at least 1")),
        ({"learning_rat": 1e-4}, "learning_rat", ("unknown key", "did you mean learning_rate")),
        (
            {"generation_config": {"prompt_format": {"user": "User: "}}},
            "generation_config.prompt_format.user",
            ('given "User: "', "{instruction}"),
        ),
        (
            {"generation_config": {"prompt_format": {"system_in_user": True}}},
            "generation_config.prompt_format.user",
            ("{system}", "system_in_user: false"),
        ),
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload", ("parallel: auto", "parallel: fsdp2")),
        ({"quantization": "4bit"}, "quantization", ("given 4bit", "quantization: none")),
    ],
)
def test_a_wrong_value_is_named_by_file_line_and_key(
    place: Path, trap: Path, changes: dict, key: str, said: tuple[str, ...]
) -> None:
    for section in changes.values():
        if isinstance(section, dict):
            passed = dict.fromkeys(("system", "user", "assistant"), "{instruction}") | {"trailing_assistant": ""}
            section["prompt_format"] = passed | section["prompt_format"]
    error = refused(place, trap, f"{key}: ", *said, **changes)
    line = int(error.split("config.yaml:")[1].split(":")[0])
    written = (place / "config.yaml").read_text().splitlines()[line - 1]
    assert written.strip().startswith(f"{key.rpartition('.')[2]}:")


def test_a_tokenizer_without_template_needs_a_prompt_format(place: Path, broken_model: Callable[..., Path]) -> None:
    model = broken_model(remove=("chat_template.jinja",))
    error = refused(place, model, "no chat template", str(model), "prompt_format:", "{instruction}", "chat_template")
    assert "use_hf_chat_templates" not in error
    asked = {"prompt_format": {"use_hf_chat_templates": True}}
    refused(place, model, "use_hf_chat_templates is true", "no chat template", generation_config=asked)


def test_a_template_that_is_no_jinja(place: Path, trap: Path) -> None:
    wrong = {"prompt_format": {"chat_template": "{% for message in messages %}"}}
    refused(place, trap, "chat template", "not valid Jinja", "endfor", generation_config=wrong)


# --- models -------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(place: Path) -> None:
    refused(place, "./nope", "model_id: there is no file or directory ./nope", str(place), "hub id")
    refused(place, "nope.gguf", "there is no file or directory nope.gguf")
    refused(place, "train.jsonl", "train.jsonl is a file", ".gguf")


def test_a_directory_without_weights(place: Path, broken_model: Callable[..., Path]) -> None:
    model = broken_model(remove=("model.safetensors",))
    refused(place, model, "model_id:", model, "has no weights", "expected model.safetensors", "found", "config.json")
    for file in model.iterdir():
        file.unlink()
    refused(place, model, model, "has no config.json", "save_pretrained")
    (model / "adapter_config.json").write_text("{}")
    refused(place, model, "is an adapter, not a base model", "initial_adapter_model_ckpt_path")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_corrupt_safetensors_file(place: Path, broken_model: Callable[..., Path], trap: Path, damage: str) -> None:
    whole = (trap / "model.safetensors").read_bytes()
    content = {"truncated": whole[:-2], "garbage": b"\0garbage" * 9, "empty": b""}[damage]
    model = broken_model(model__safetensors=content)
    refused(place, model, model / "model.safetensors", "not a whole safetensors file", "download it again")


def test_an_index_that_does_not_hold(place: Path, broken_model: Callable[..., Path]) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    model = broken_model(remove=("model.safetensors",), model__safetensors__index__json=index)
    refused(place, model, "lacks 2 of 2 weight files: model-1.safetensors, model-2.safetensors")
    (model / "model.safetensors.index.json").write_text("{}")
    refused(place, model, "model.safetensors.index.json has no weight_map")


def test_pickled_weights_are_refused_unless_allowed_by_name(place: Path, broken_model: Callable[..., Path]) -> None:
    model = broken_model(remove=("model.safetensors",))
    torch.save({"unused": torch.zeros(1)}, model / "pytorch_model.bin")
    refused(place, model, "Python pickles (pytorch_model.bin)", "can run code", "[pytorch_model.bin]")
    allowed = command("finetune", write_config(place, model, allow_pickle_weights=["pytorch_model.bin"]))
    assert THE_TRAP in allowed.error  # they were read
    shutil.rmtree(place / "runs")

    index = {"weight_map": {"a": "pytorch_model-1.bin"}}
    (model / "pytorch_model.bin").rename(model / "pytorch_model-1.bin")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(place, model, "allow_pickle_weights: [pytorch_model-1.bin]")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama99"}, ("of type llama99", "does not know", "upgrade transformers")),
        ({"model_type": None}, ("config.json has no model_type",)),
        ({"model_type": "vit"}, ("of type vit", "not a causal language model")),
        ({"hidden_size": "wide"}, ("config.json is not that of a llama model", "hidden_size", "'wide'")),
        ({"num_attention_heads": 7}, ("config.json is not that of a llama model", "multiple", "(7)")),
    ],
)
def test_a_config_json_that_cannot_be_used(
    place: Path, broken_model: Callable[..., Path], config: dict, said: tuple[str, ...]
) -> None:
    refused(place, broken_model(config=config), *said)


def test_a_config_json_that_is_no_json(place: Path, broken_model: Callable[..., Path]) -> None:
    model = broken_model(config__json=b'{\n "a": 1,\n oops}')
    refused(place, model, f"{model / 'config.json'}:3: not valid JSON")
    (model / "config.json").write_text("[]")
    refused(place, model, "config.json holds no JSON object")


def test_a_model_without_a_whole_tokenizer(place: Path, broken_model: Callable[..., Path]) -> None:
    model = broken_model(tokenizer__json=b"{}")
    refused(place, model, "the tokenizer of", "cannot be read")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    refused(place, model, "has no tokenizer", "tokenizer.json", model)


def test_weights_of_another_shape(place: Path, model_dir: Path) -> None:
    model = place / "model"
    shutil.copytree(model_dir, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"intermediate_size": 96}))
    outcome = command("finetune", write_config(place, model))
    assert outcome.code == 2
    assert "6 tensors of" in outcome.error
    assert "model.layers.0.mlp.down_proj.weight" in outcome.error
    assert "[32, 64], config.json asks for [32, 96]" in outcome.error


@pytest.mark.parametrize("content", [b"nope", b"GGUF" + bytes(99), b"GGUF\3\0\0\0" + b"\xff" * 99, b""])
def test_a_gguf_file_that_is_none(place: Path, content: bytes) -> None:
    (place / "model.gguf").write_bytes(content)
    refused(place, "model.gguf", "model.gguf", "GGUF", "download it again")


def test_code_of_a_model_runs_only_if_the_config_says_so(place: Path, broken_model: Callable[..., Path]) -> None:
    code = f"""open({str(place / "ran")!r}, "w").close()"""
    named = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    model = broken_model(config=named, mine__py=code.encode())
    refused(place, model, "Python code of its own", "config.json", "trust_remote_code: true")

    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "config.json").write_text((model / "config.json").read_text().replace("mine", "llama"))
    refused(place, model, "Python code of its own", "tokenizer_config.json", "trust_remote_code: true")
    assert not (place / "ran").exists()


# --- places to write to ------------------------------------------------------------------------------------------


def test_an_output_directory_that_cannot_be_made(place: Path, trap: Path) -> None:
    (place / "file").touch()
    error = refused(place, trap, place / "file", "is a file", "output_dir", output_dir=str(place / "file" / "runs"))
    assert "rows" not in error  # it was found before the rows were read


@pytest.mark.usefixtures("permissions_bind")
def test_an_output_directory_without_permission(place: Path, trap: Path) -> None:
    (place / "mine").mkdir(mode=0o500)
    refused(place, trap, place / "mine", "not writable", "output_dir", output_dir=str(place / "mine" / "runs"))


def test_a_run_of_the_same_name_is_never_overwritten(place: Path, trap: Path) -> None:
    run = place / "runs" / "test"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model_id: other\n")
    outcome = command("finetune", write_config(place, trap))
    assert outcome.code == 2
    assert "already holds a run" in outcome.error
    assert "--resume" in outcome.error
    assert (run / "config.yaml").read_text() == "model_id: other\n"


def test_a_disk_without_room(place: Path, trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    outcome = command("finetune", write_config(place, trap))
    assert outcome.code == 2
    assert THE_TRAP not in outcome.error
    assert "this run needs" in outcome.error
    assert "0.0 MB free" in outcome.error
    assert "output_dir" in outcome.error


# A real disk: a file system of its own, in a mount namespace of its own, which most Linux systems let anybody make.
FULL_DISK = """
import json, subprocess, sys
from pathlib import Path

place, config = Path(sys.argv[1]), sys.argv[2]
disk = place / "disk"
disk.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)

from llmforge.checkpoint import list_checkpoints
from llmforge.config import load_config
from llmforge.errors import OutputError
from llmforge.jobs.finetune import finetune, resume


class Filler:
    "Fills the disk once the first checkpoint is written."

    def event(self, event, **fields):
        if event != "checkpoint":
            return
        with open(disk / "filler", "wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError:
                    pass

    def note(self, text): pass

    def progress(self, rows_done): pass


result = {}
try:
    finetune(load_config(config), Filler())
except OutputError as error:
    result["error"] = str(error)
run = next((disk / "runs").iterdir())
result["checkpoints"] = [checkpoint.step for checkpoint in list_checkpoints(run / "checkpoints")]
result["left"] = sorted(path.name for path in (run / "checkpoints").iterdir())
(disk / "filler").unlink()
Filler.event = lambda *_, **__: None
result["finished"] = resume(run, Filler()).metrics is not None
result["artifact"] = (run / "artifact" / "adapter_model.safetensors").is_file()

subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
try:
    finetune(load_config(config, ["custom_model_tag=other"]), Filler())
except OutputError as error:
    result["read_only"] = str(error)
print(json.dumps(result))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint_good(place: Path, model_dir: Path) -> None:
    script = place / "full_disk.py"
    script.write_text(FULL_DISK)
    config = write_config(
        place,
        model_dir,
        output_dir=str(place / "disk" / "runs"),
        checkpoint_and_evaluation_frequency={"unit": "steps", "frequency": 1},
        num_checkpoints_to_keep=9,
    )
    unshare = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or os.system(" ".join([*unshare, "true", "2>/dev/null"])) != 0:
        pytest.skip("this system does not let users make mount namespaces")
    outcome = program(script, place, config, prefix=unshare)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out.splitlines()[-1])
    assert "is full" in result["error"]
    assert result["checkpoints"] == [1]
    assert result["left"] == ["step-000001"]
    assert result["finished"]
    assert result["artifact"]
    assert "read-only file system" in result["read_only"]


# --- runs -----------------------------------------------------------------------------------------------------


def test_commands_say_what_is_no_run(place: Path, trap: Path) -> None:
    config = write_config(place, trap)
    (place / "empty").mkdir()
    for path, said in (
        (place / "nope", "does not exist"),
        (place / "empty", "is not the directory of a run"),
        (place, "is not the directory of a run"),  # although it holds a config.yaml
        (config, "is a file; give the directory of a run"),
    ):
        for arguments in (
            ("finetune", "--resume", path),
            ("chat", path),
            ("generate", path, "--input", place / "train.jsonl", "--output", place / "out.jsonl"),
        ):
            outcome = command(*arguments)
            assert outcome.code == 2
            assert str(path) in outcome.error
            assert said in outcome.error


def test_an_unfinished_run_has_no_model_to_talk_to(place: Path, trap: Path) -> None:
    command("finetune", write_config(place, trap))
    run = place / "runs" / "test"
    for arguments in (
        ("chat", run),
        ("generate", run, "--input", place / "train.jsonl", "--output", place / "out.jsonl"),
    ):
        outcome = command(*arguments)
        assert outcome.code == 2
        assert f"{run} has not finished" in outcome.error
        assert f"llmforge finetune --resume {run}" in outcome.error


# --- Python ---------------------------------------------------------------------------------------------------


def test_python_gets_the_same_errors(place: Path, trap: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.jsonl"):
        llmforge.finetune(write_config(place, trap, train_path="nope.jsonl"))
    with pytest.raises(ConfigError, match="context_length") as caught:
        llmforge.finetune(write_config(place, trap), ["context_length=0"])
    assert isinstance(caught.value, ValueError)
