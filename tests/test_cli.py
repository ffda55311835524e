"""The console script: what each command prints and where, its exit codes, and the same from Python."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llmforge as package
from commands import llmforge as command
from commands import program, write_config
from conftest import conversation_rows, write_jsonl
from llmforge.config.yaml_source import read_source
from llmforge.errors import InputError

CONFIGS = Path(__file__).parent / "configs"
COMMANDS = (
    "finetune",
    "validate",
    "schema",
    "prove",
    "verify-resume",
    "chat",
    "generate",
    "serve",
    "export",
    "data",
    "prompt",
    "anyscale",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, dict, str]:
    """A small run, made by `finetune --json` in this process: its directory, the JSON it printed, and its stderr."""
    place = tmp_path_factory.mktemp("cli")
    write_jsonl(place / "train.jsonl", conversation_rows(32))
    write_jsonl(place / "valid.jsonl", conversation_rows(8, seed=1))
    outcome = command("finetune", write_config(place, model_dir, valid_path="valid.jsonl", num_epochs=2), "--json")
    assert outcome.code == 0, outcome.err
    return place, json.loads(outcome.out), outcome.err


# --- the script itself -------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    outcome = command("--help")
    assert outcome.code == 0
    assert [line.split()[0] for line in outcome.out.split("Commands:\n")[1].splitlines()] == list(COMMANDS)
    for name in COMMANDS:
        assert command(name, "--help").code == 0


def test_version() -> None:
    assert command("--version").out == f"llmforge {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("finetun", "x.yaml"), "Did you mean 'finetune'"),
        (("finetune", "--dry"), "--dry-run"),
        (("finetune",), "either CONFIG"),
        (("finetune", "x.yaml", "--resume", "runs/x"), "either CONFIG"),
        (("finetune", "--resume", "runs/x", "--set", "seed=1"), "--resume goes without --set"),
        (("validate",), "CONFIG"),
        (("generate", "runs/x", "--input", "x.jsonl"), "--output"),
        (("data", "show", "x.yaml", "-n", "0"), "'-n': Input should be greater"),
        (("chat", "runs/x", "--temperature", "-1"), "'--temperature': Input should be greater"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_what_is_meant(arguments: tuple[str, ...], said: str) -> None:
    outcome = command(*arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.out == ""


def test_python_m_llmforge_is_the_console_script_and_ctrl_c_exits_with_130(finished: tuple, tmp_path: Path) -> None:
    _, result, _ = finished
    with subprocess.Popen(
        [sys.executable, "-m", "llmforge", "chat", result["run_dir"], "--max-new-tokens", "3", "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("What does red mean?\n")
        process.stdin.flush()
        process.stdout.readline()  # it is loaded and answers
        time.sleep(1)  # and waits: during an answer, ctrl-C ends only that
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error


# --- finetune ----------------------------------------------------------------------------------------------------


def test_finetune_prints_one_json_object_and_nothing_else_on_stdout(finished: tuple) -> None:
    place, result, err = finished
    assert list(result) == ["run_dir", "artifact_dir", "tag", "metrics"]
    assert result["run_dir"] == str(place / "runs" / "test")
    assert result["artifact_dir"] == str(place / "runs" / "test" / "artifact")
    assert result["tag"] == "test"
    assert result["metrics"]["eval_loss"] > 0
    assert (Path(result["artifact_dir"]) / "adapter_model.safetensors").is_file()
    assert "Traceback" not in err


def test_finetune_in_a_pipe_writes_plain_lines(tmp_path: Path, model_dir: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(16))
    config = write_config(tmp_path, model_dir)
    outcome = program("-m", "llmforge", "finetune", config, "--set", "num_epochs=3", environment={"TERM": "xterm"})
    assert outcome.code == 0, outcome.err
    assert outcome.out == ""
    assert not {"\x1b", "\r"} & set(outcome.err)
    lines = outcome.err.splitlines()
    assert any(line.startswith("finished    6 steps") for line in lines)
    assert f"next        llmforge chat {tmp_path / 'runs' / 'test'}" in lines


def test_a_dry_run_leaves_nothing(tmp_path: Path, model_dir: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(16))
    config = write_config(tmp_path, model_dir)
    outcome = command("finetune", config, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == {"dry_run": True}
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "train.jsonl", "cache"}
    shown = command("finetune", config, "--dry-run")
    assert "2 in 1 epoch" in shown.err  # the steps that there would be


def test_default_needs_only_model_and_data(tmp_path: Path, model_dir: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(8))
    config = tmp_path / "config.yaml"
    config.write_text(f"model_id: {model_dir}\ntrain_path: train.jsonl\nnum_epochs: 1\n")
    there = Path.cwd()
    os.chdir(tmp_path)
    try:
        outcome = command("finetune", config, "--default", "--json")
    finally:
        os.chdir(there)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert Path(result["run_dir"]).parent == tmp_path / "runs"
    assert (Path(result["artifact_dir"]) / "adapter_config.json").is_file()


def test_finetune_refuses_in_plain_words_what_it_cannot_do_yet() -> None:
    wanted = ("--set", "quantization=4bit", "--set", "task=vision_language")
    outcome = command("finetune", CONFIGS / "lora_wandb.yaml", *wanted)
    assert outcome.code == 2
    for key in ("quantization", "task"):
        assert f"{key}: " in outcome.error
    assert "this version" in outcome.error
    assert all(len(line) < 240 for line in outcome.err.splitlines())


# --- validate, schema, data show ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_only_accepts_every_valid_config_and_names_what_is_not_there_yet(config: Path) -> None:
    outcome = command("validate", config, "--config-only")
    assert outcome.code == 0, outcome.err
    assert f"{config} is valid" in outcome.out
    machine = command("validate", config, "--config-only", "--json")
    report = json.loads(machine.out)
    assert report["valid"] is True
    assert [f"note: {note}" for note in report["notes"]] == outcome.err.splitlines()
    if "quantization: 4bit" in config.read_text():
        assert any(note.startswith("quantization: given 4bit") for note in report["notes"])


def test_validate_counts_rows_tokens_and_steps(tmp_path: Path, model_dir: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(16))
    config = write_config(tmp_path, model_dir)
    report = json.loads(command("validate", config, "--json").out)
    assert (report["rows"], report["kept"], report["steps"], report["epochs"]) == (16, 16, 2, 1)
    assert 0 < report["trained_tokens"] < report["tokens"]
    assert not (tmp_path / "runs").exists()
    shown = command("validate", config)
    assert f"trained tokens   {report['trained_tokens']:,}" in shown.out
    wrong = command("validate", config, "--set", "train_path=nope.jsonl", "--json")
    assert wrong.code == 2
    assert "nope.jsonl" in wrong.error


def test_validate_reads_the_same_overrides_as_finetune(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model_id: m\ntrain_path: t.jsonl\n")
    assert command("validate", config, "--config-only", "--set", "lora_config.r=4").code == 0
    wrong = command("validate", config, "--config-only", "--set", "lora_config.rank=4")
    assert wrong.code == 2
    assert "--set lora_config.rank=4" in wrong.error
    assert "did you mean r?" in wrong.error


def test_yaml_never_makes_python_objects(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_id: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\ntrain_path: !!python/name:os.system\n"
    )
    outcome = command("validate", config, "--config-only")
    assert outcome.code == 2
    assert f"{config}:1: " in outcome.error
    assert "the tag !!python/object/apply:os.mkdir is not allowed" in outcome.error
    assert not (tmp_path / "made").exists()
    outcome = command(
        "validate", config, "--config-only", "--set", f"seed=!!python/object/apply:os.mkdir [{tmp_path}/made]"
    )
    assert outcome.code == 2
    assert not (tmp_path / "made").exists()


def test_schema_is_a_json_schema_that_the_examples_satisfy() -> None:
    schema = json.loads(command("schema").out)
    assert schema["type"] == "object"
    assert {"model_id", "train_path"} <= set(schema["required"])
    assert schema["additionalProperties"] is False
    import jsonschema as validation

    validator = validation.validators.validator_for(schema)
    validator.check_schema(schema)
    root = Path(__file__).parent.parent
    configs = [path for path in root.glob("examples/*/*.yaml") if path.parent.name != "cluster"]
    for example in [*configs, *CONFIGS.glob("*.yaml")]:
        validator(schema).validate(read_source(example).data)


def test_data_show_says_which_tokens_are_trained(tmp_path: Path, model_dir: Path) -> None:
    rows = conversation_rows(3)
    write_jsonl(tmp_path / "train.jsonl", [rows[0], {"text": "no messages"}, rows[2]])
    config = write_config(tmp_path, model_dir)
    outcome = command("data", "show", config, "-n", "2")
    assert outcome.code == 0, outcome.err
    assert f"{tmp_path / 'train.jsonl'}:1\n" in outcome.out
    assert "problem: no column 'messages'" in outcome.out
    assert "\x1b" not in outcome.out
    first, second = [json.loads(line) for line in command("data", "show", config, "-n", "2", "--json").out.splitlines()]
    assert second["line"] == 2
    assert "no column 'messages'" in second["problem"]
    text = {"trained": "", "prompt": ""}
    for piece in first["samples"][0]:
        text[piece["reason"]] += "".join(token["text"] for token in piece["tokens"])
        assert piece["weight"] == (1 if piece["reason"] == "trained" else 0)
    question, answer = (message["content"] for message in rows[0]["messages"])
    assert question in text["prompt"]
    assert text["trained"].startswith(answer)
    assert answer not in text["prompt"]


def test_data_show_refuses_a_task_that_is_not_there_yet() -> None:
    outcome = command("data", "show", CONFIGS / "preference.yaml")
    assert outcome.code == 2
    assert "preference" in outcome.error


# --- chat and generate -----------------------------------------------------------------------------------------------


def test_chat_answers_each_line_and_takes_several_lines_between_quotes(finished: tuple) -> None:
    _, result, _ = finished
    options = ("--max-new-tokens", "4", "--temperature", "0")
    alone = command("chat", result["run_dir"], *options, stdin="What does red mean?\n")
    assert alone.code == 0
    assert alone.err == ""  # instructions are for terminals
    script = (
        'What does red mean?\n\n/clear\nWhat does red mean?\n/clear\n"""What does\nred mean?"""\n/exit\nnever read\n'
    )
    outcome = command("chat", result["artifact_dir"], *options, stdin=script)
    first, second, third = _answers(result, "What does red mean?", "What does red mean?", "What does\nred mean?")
    assert outcome.out == f"{first}\n{second}\n{third}\n"
    assert alone.out == f"{first}\n"


def _answers(result: dict, *questions: str) -> list[str]:
    run = package.load_run(result["run_dir"])
    options = {"max_new_tokens": 4, "temperature": 0.0}
    return [run.chat([{"role": "user", "content": question}], **options) for question in questions]


def test_generate_adds_an_answer_to_every_row(finished: tuple, tmp_path: Path) -> None:
    _, result, _ = finished
    rows = conversation_rows(5, seed=2)
    rows[1]["messages"].pop()  # without the expected answer
    questions = write_jsonl(tmp_path / "in.jsonl", rows)
    output = tmp_path / "out.jsonl"
    options = ("--input", questions, "--output", output, "--max-new-tokens", "4", "--temperature", "0")
    outcome = command("generate", result["run_dir"], *options, "--batch-size", "2")
    assert outcome.code == 0, outcome.err
    assert outcome.out == ""
    assert "5 answers" in outcome.err
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["messages"] for row in written] == [row["messages"] for row in rows]
    asked = [row["messages"][0]["content"] for row in rows]
    assert [row["generated"] for row in written] == _answers(result, *asked)
    assert command("generate", result["run_dir"], *options, "--base").code == 0


def test_generate_checks_files_before_it_loads_the_model(finished: tuple, tmp_path: Path) -> None:
    place, result, _ = finished
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{oops\n')
    good = place / "valid.jsonl"
    for source, target, said in (
        (good, tmp_path / "no" / "out.jsonl", "does not exist; make it first"),
        (good, tmp_path, "is a directory; give the name of a file"),
        (tmp_path / "nope.jsonl", tmp_path / "out.jsonl", "does not exist"),
        (bad, tmp_path / "out.jsonl", f"{bad}:2: not JSON"),
    ):
        outcome = command("generate", result["run_dir"], "--input", source, "--output", target)
        assert outcome.code == 2
        assert said in outcome.error
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_that_the_format_cannot_render_is_named(finished: tuple, tmp_path: Path) -> None:
    _, result, _ = finished
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    tool_row = {
        "messages": [*conversation_rows(1)[0]["messages"][:1], call, {"role": "tool", "content": "1"}],
        "tools": [],
    }
    source = write_jsonl(tmp_path / "in.jsonl", [*conversation_rows(1), tool_row])
    outcome = command("generate", result["run_dir"], "--input", source, "--output", tmp_path / "out.jsonl")
    assert outcome.code == 2
    assert f"{source}:2: " in outcome.error


# --- Python -----------------------------------------------------------------------------------------------------------


def test_python_mirrors_the_commands(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(16))
    config = write_config(tmp_path, model_dir)
    run = package.finetune(package.load_config(config, ["custom_model_tag=from-python"]))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "finished" in shown.err
    assert run.run_dir == tmp_path / "runs" / "from-python"
    assert run.artifact_dir.is_dir()
    again = package.load_run(run.run_dir)
    assert (again.run_dir, again.tag, again.metrics) == (run.run_dir, run.tag, run.metrics)
    question = [{"role": "user", "content": "What does red mean?"}]
    options = {"max_new_tokens": 4, "temperature": 0.0}
    answer = again.chat(question, **options)
    assert answer == run.chat(question, **options)
    assert "".join(again.stream(question, **options)) == answer
    with pytest.raises(InputError, match="does not exist"):
        package.load_run(tmp_path / "nope")


@pytest.mark.parametrize("tag", ["../../escaped", "/escaped", "~/escaped", "a/../../escaped", "..:escaped"])
def test_a_tag_cannot_leave_the_output_directory(tmp_path: Path, model_dir: Path, tag: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(8))
    config = write_config(tmp_path, model_dir, custom_model_tag=tag)
    outcome = command("finetune", config, "--json")
    assert outcome.code == 0, outcome.err
    run = Path(json.loads(outcome.out)["run_dir"])
    assert run.resolve().parent == (tmp_path / "runs").resolve()


def test_secrets_stay_out_of_everything_written(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-NobodyKnowsThisOne"
    monkeypatch.setenv("SOME_API_KEY", secret)
    write_jsonl(tmp_path / f"{secret}.jsonl", conversation_rows(8))  # a secret where it is most likely to be repeated
    config = write_config(tmp_path, model_dir, train_path=f"{secret}.jsonl")
    outcome = command("finetune", config)
    assert outcome.code == 0, outcome.err
    assert secret not in outcome.err
    run = tmp_path / "runs" / "test"
    for file in (file for file in run.rglob("*") if file.is_file()):
        # The configs are the user's own words, which a resumed run needs, and the ledger names the user's files.
        own = file.name in ("config.yaml", "resolved_config.yaml", "rows.jsonl")
        assert own or secret.encode() not in file.read_bytes(), file
    wrong = command("validate", config, "--set", f"train_path=not-{secret}.jsonl")
    assert wrong.code == 2
    assert secret not in wrong.err
    assert "not-[SOME_API_KEY].jsonl" in wrong.err
