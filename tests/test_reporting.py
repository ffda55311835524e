"""What a person sees of a run and what it records: events, display, tracking services, manifest."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmforge.errors import ConfigError, DataError, OutputError
from llmforge.jobs.display import (
    LiveDisplay,
    PlainDisplay,
    clock_time,
    count,
    duration,
    loss,
    memory,
    number,
    open_display,
    perplexity,
)
from llmforge.jobs.events import EventLog, Reporters, read_events, redact
from llmforge.jobs.loggers import check_logger, make_logger
from llmforge.jobs.manifest import build_manifest, write_manifest

STARTED: dict[str, Any] = {
    "tag": "org/m:alice:abcde",
    "task": "instruction_tuning",
    "devices": "cpu",
    "rows": 1200,
    "samples": 1188,
    "tokens": 182_344,
    "trained_tokens": 31_234,
    "steps": 30,
    "epochs": 2.0,
    "parameters": 134_515_008,
    "trainable_parameters": 921_600,
}


def step_fields(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 15,
        "train_loss": 3 / step,
        "learning_rate": 1e-4,
        "grad_norm": 1.5,
        "examples": 8,
        "tokens": 1000,
        "trained_tokens": 100,
        "tokens_per_second": 500.0,
        "step_seconds": 2.0,
    }


def whole_run() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "started", STARTED
    for step in range(1, 31):
        yield "step", step_fields(step)
        if step % 10 == 0:
            eval_loss = {10: 1.0, 20: 0.5, 30: 0.75}[step]
            yield (
                "evaluation",
                {"step": step, "eval_loss": eval_loss, "perplexity": 2.5, "seconds": 4.0, "accuracy": 0.5},
            )
            yield "checkpoint", {"step": step, "path": f"runs/r/checkpoints/step-{step:06}", "best": step < 30}
    yield "finished", {"best_step": 20, "metrics": {}, "artifact_path": "runs/r/artifact", "run_dir": "runs/r"}


# events.jsonl


def test_events_are_one_json_object_a_line_with_a_utc_time(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.event("started", tag="m", path=tmp_path, devices=["cpu"], n=np.int64(3), x=np.float32(0.5), flag=True)
        assert len(path.read_bytes().splitlines()) == 1  # on disk before the next one
        log.note("two\nlines ü \udc80")
    first, second = read_events(path)
    assert datetime.fromisoformat(first.pop("time")).utcoffset().total_seconds() == 0
    assert first == {
        "event": "started",
        "tag": "m",
        "path": str(tmp_path),
        "devices": ["cpu"],
        "n": 3,
        "x": 0.5,
        "flag": True,
    }
    assert second["event"] == "note"
    assert second["text"].startswith("two\nlines ü")


def test_values_that_json_lacks_are_null_and_named(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e") as log:
        log.event("step", train_loss=float("nan"), metrics={"f1": float("-inf"), "n": 1})
    event = json.loads((tmp_path / "e").read_text())
    assert event["train_loss"] is None
    assert event["metrics"] == {"f1": None, "n": 1}
    assert event["non_finite"] == {"train_loss": "nan", "metrics.f1": "-inf"}
    (read,) = read_events(tmp_path / "e")
    assert math.isnan(read["train_loss"])
    with EventLog(tmp_path / "e") as log, pytest.raises(TypeError, match=r"step_seconds: object"):
        log.event("step", step_seconds=object())


@given(st.binary(max_size=200).filter(lambda tail: b"\n" not in tail))
def test_a_half_written_line_is_removed_on_opening(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    path = tmp_path_factory.mktemp("events") / "e"
    with EventLog(path) as log:
        log.event("step", step=1, text="x" * 5000)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert [event["step"] for event in read_events(path)] == [1]
    with EventLog(path) as log:
        assert path.read_bytes() == whole
        log.event("step", step=2)
    assert [event["step"] for event in read_events(path)] == [1, 2]


def test_a_kill_in_the_first_line_leaves_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"x" * 10_000)
    EventLog(tmp_path / "e").close()
    assert (tmp_path / "e").read_bytes() == b""


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "e").write_text('{"event": "a"}\n{oops\n{"event": "b"}\n')
    with pytest.raises(DataError, match=r"e:2: not a JSON object"):
        read_events(tmp_path / "e")
    (tmp_path / "e").write_text("[1]\n")
    with pytest.raises(DataError, match=r"e:1: .*list"):
        read_events(tmp_path / "e")


def test_an_event_log_needs_its_directory(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        EventLog(tmp_path / "missing" / "e")


class Recorder:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def event(self, event: str, **fields: Any) -> None:
        self.seen.append(event)

    def note(self, text: str) -> None:
        self.seen.append(text)


class Failing(Recorder):
    def event(self, event: str, **fields: Any) -> None:
        super().event(event, **fields)
        raise ConnectionError("server gone")


def test_a_tracking_service_that_fails_is_dropped_and_the_run_goes_on() -> None:
    person, service, healthy = Recorder(), Failing(), Recorder()
    reporters = Reporters([person], [service, healthy])
    for event in ("started", "step", "finished"):
        reporters.event(event)
    reporters.note("bye")
    assert service.seen == ["started"]
    assert healthy.seen == ["started", "step", "finished"]
    assert person.seen[0] == "started"
    assert "Failing failed" in person.seen[1]
    assert "server gone" in person.seen[1]
    assert person.seen[2:] == ["step", "finished", "bye"]
    with pytest.raises(ConnectionError):
        Reporters([Failing()]).event("started")


# secrets


def test_secrets_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_PASSWORD", "0123456789abcdef-longer")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUt/K7MDENG")
    monkeypatch.setenv("SHORT_TOKEN", "run")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM_", "harmless-value")
    text = "a run 0123456789abcdef-longer, 0123456789abcdef, wJalrXUt/K7MDENG, harmless-value"
    assert redact(text) == "a run [MY_PASSWORD], [WANDB_API_KEY], [AWS_SECRET_ACCESS_KEY], harmless-value"


def test_tokens_and_credentials_are_redacted_wherever_they_come_from() -> None:
    assert redact(f"Bearer hf_{'aB3' * 11}x.") == "Bearer [a Hugging Face token]."
    assert redact("see https://me:pa55@host/x and s3://b/k@v") == "see https://[credentials]@host/x and s3://b/k@v"


def test_no_secret_reaches_a_file_or_a_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "topsecret-" + "x" * 20
    monkeypatch.setenv("HF_TOKEN", secret)
    with EventLog(tmp_path / "e") as log:
        log.note(f"403 for {secret}")
        log.event("failed", error=f"bad {secret}", detail={"headers": [f"Bearer {secret}"]})
    manifest = build_manifest(
        config_hash="1",
        data={"train": {"file": f"https://x/?t={secret}"}},
        base_model={"name": os.path.expanduser("~/models/m")},
        tokenizer_hash="2",
        prompt_format_hash="3",
    )
    write_manifest(tmp_path / "m", manifest)
    stream = io.StringIO()
    PlainDisplay(stream).note(f"403 for {secret}")
    written = (tmp_path / "e").read_text() + (tmp_path / "m").read_text() + stream.getvalue()
    assert secret not in written
    assert written.count("[HF_TOKEN]") == 5
    assert manifest["base_model"]["name"] == "~/models/m"


# manifest


def test_the_manifest_holds_versions_platform_and_hashes(tmp_path: Path) -> None:
    write_manifest(
        tmp_path / "manifest.json",
        build_manifest(
            config_hash="c",
            data={"train": {"hash": "d", "rows": 3}},
            base_model={"name": "org/m", "hash": "w"},
            tokenizer_hash="t",
            prompt_format_hash="p",
            more={"seed": 0},
        ),
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "peft", "tokenizers", "safetensors"} <= set(manifest["versions"])
    assert manifest["data"] == {"train": {"hash": "d", "rows": 3}}
    assert manifest["tokenizer"] == {"hash": "t"}
    assert manifest["seed"] == 0


# display


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(seconds_per_step: float, steps: int = 30) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    display = PlainDisplay(stream, clock)
    with display:
        display.event("started", **{**STARTED, "steps": steps})
        for step in range(1, steps + 1):
            clock.now += seconds_per_step
            display.event("step", **step_fields(step))
    return [line for line in stream.getvalue().splitlines() if line.startswith("step ")]


def test_piped_output_is_plain_lines() -> None:
    stream = io.StringIO()
    with open_display(stream) as display:
        display.progress(0)
        display.note("a note")
        for event, fields in whole_run():
            display.event(event, **fields)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert all(len(line) <= 80 for line in text.splitlines()), text
    for line in (
        "preparing   0 rows",
        "note        a note",
        "run         org/m:alice:abcde",
        "model       134.5M parameters, 921,600 trained (0.69%)",
        "data        1,200 rows, 1,188 samples",
        "steps       30 in 2 epochs",
        "evaluation  step 20  loss 0.5000  perplexity 2.50  accuracy 0.5  4.0 s  best",
        "checkpoint  step 20  checkpoints/step-000020  best",
        "train loss  3.0000 → 0.1000",
        "eval loss   1.0000 → 0.5000, perplexity 2.50 (best, step 20)",
        "tokens      30,000, of which 3,000 trained; 500 tokens/s",
        "artifact    runs/r/artifact",
        "next        llmforge chat runs/r",
    ):
        assert line in text.splitlines()


def test_plain_output_keeps_a_readable_pace() -> None:
    fast = shown(seconds_per_step=0.001, steps=1000)
    assert [line.split()[1] for line in fast] == ["1/1,000", "1,000/1,000"]
    slow = shown(seconds_per_step=70.0, steps=300)
    assert len(slow) == 300
    middling = shown(seconds_per_step=1.0, steps=1000)
    assert len(middling) == 101  # the first, then every hundredth part
    assert "15:49 left" in middling[5]


def test_the_last_step_before_an_error_is_shown() -> None:
    stream = io.StringIO()
    with contextlib.suppress(ValueError), PlainDisplay(stream, Clock()) as display:
        display.event("started", **STARTED)
        for step in (1, 2, 3):
            display.event("step", **step_fields(step))
        raise ValueError("boom")
    assert stream.getvalue().splitlines()[-1].startswith("step         3/30  loss 1.0000")


def test_a_failed_run_says_how_to_go_on() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, Clock())
    display.event("started", **STARTED)
    display.event("step", **step_fields(1))
    display.event("failed", error="the loss is NaN", run_dir="runs/my run")
    *_, stopped, resume = stream.getvalue().splitlines()
    assert stopped == "stopped     at step 1 of 30 after 0.0 s"
    assert resume == "continue    llmforge finetune --resume 'runs/my run'"


def test_a_resumed_run_judges_its_pace_by_its_own_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    display = PlainDisplay(stream, clock)
    display.event("started", **STARTED, resumed_from=20)
    clock.now = 10.0
    display.event("step", **step_fields(21))
    assert "1:30 left" in stream.getvalue()
    assert "resumed     from step 20" in stream.getvalue()


def test_an_evaluation_that_is_not_a_number_is_never_the_best() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, Clock())
    display.event("started", **STARTED)
    for step, eval_loss in enumerate((float("nan"), 2.0, float("nan"), 1.0, 3.0), 1):
        display.event("step", **step_fields(step))
        display.event("evaluation", step=step, eval_loss=eval_loss, perplexity=2.0, seconds=1.0)
    display.event("finished", best_step=4, metrics={}, artifact_path="a", run_dir="r")
    assert "1.0000, perplexity 2.00 (best, step 4)" in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_stream_decides_on_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(open_display(Terminal()), LiveDisplay)
    assert isinstance(open_display(io.StringIO()), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display(Terminal()), PlainDisplay)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("ends_with", ["summary", "exception"])
def test_the_live_display_fits_and_gives_the_terminal_back(
    monkeypatch: pytest.MonkeyPatch, columns: int, ends_with: str
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    terminal = Terminal()
    try:
        with open_display(terminal) as display:
            display.progress(500)
            display.progress(600)
            display.note("[bold]a note[/bold] " + "word " * 30)
            for event, fields in whole_run():
                display.event(event, **fields)
                if ends_with == "exception" and event == "evaluation":
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    text = terminal.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", re.sub(r"\r|\x1b\[\d*[AK]", "\n", text)).splitlines()
    assert max(map(len, lines)) <= columns
    assert any(line.startswith("note        [bold]a note[/bold] word") for line in lines)
    assert any(re.search(r"step 10/30 +\d+:\d\d left$", line) for line in lines)
    assert any(line.startswith("evaluation  step 10  loss 1.0000") for line in lines)
    if ends_with == "summary":
        assert next(line for line in reversed(lines) if line) == "next        llmforge chat runs/r"
    else:
        assert any(re.match(r"epoch +loss +learn. rate +tokens/s +memory +eval loss +best", line) for line in lines)


def test_numbers_are_written_for_reading() -> None:
    assert [duration(s) for s in (0.44, 12.4, 59.9, 185, 7500)] == [
        "0.4 s",
        "12 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 05 min",
    ]
    assert [clock_time(s) for s in (7, 192, 3723)] == ["0:07", "3:12", "1:02:03"]
    assert [count(n) for n in (921_600, 134_515_008, 8_030_261_248)] == ["921,600", "134.5M", "8.03B"]
    assert [memory(n) for n in (2**20 * 512, 2**30 * 3 // 2)] == ["512 MiB", "1.5 GiB"]
    assert [loss(x) for x in (0.12345, 12_345.6, float("nan"), None)] == ["0.1235", "1.235e+04", "nan", "–"]
    assert [number(x) for x in (2.0, 0.12345, 1200, "x")] == ["2", "0.1235", "1,200", "x"]
    assert [perplexity(x) for x in (2.0, 1e6, float("inf"))] == ["2.00", "1e+06", "inf"]


# tracking services


def open_logger(provider: Any, options: Mapping[str, Any], run_dir: Path) -> Any:
    resolved = {"learning_rate": 1e-4, "lora_config": {"r": 8, "target_modules": ["q_proj"]}}
    return make_logger(provider, options, tag="org/m:alice:abcde", model_id="org/m", resolved=resolved, run_dir=run_dir)


def send_whole_run(logger: Any) -> None:
    for event, fields in whole_run():
        logger.event(event, **fields)


def test_tensorboard_gets_every_number_by_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = open_logger("tensorboard", {}, tmp_path)
    send_whole_run(logger)
    assert logger.place == str(tmp_path / "tensorboard")
    events = EventAccumulator(logger.place, size_guidance={"tensors": 0})
    events.Reload()
    names = events.Tags()["tensors"]
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "eval/perplexity"} <= set(names)
    read = [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors("train/loss")]
    assert read == [(step, pytest.approx(3 / step)) for step in range(1, 31)]
    assert [e.step for e in events.Tensors("eval/loss")] == [10, 20, 30]


def test_mlflow_gets_parameters_and_every_number_by_step(tmp_path: Path) -> None:
    import mlflow

    options = {"tracking_uri": f"file:{tmp_path}/ml", "experiment_name": "mine"}
    with pytest.raises(ConfigError, match=r"'mine' does not exist.*create_experiment_if_not_exists"):
        open_logger("mlflow", {**options, "create_experiment_if_not_exists": False}, tmp_path)
    send_whole_run(open_logger("mlflow", options, tmp_path))
    client = mlflow.MlflowClient(tracking_uri=options["tracking_uri"])
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "org/m:alice:abcde"
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "learning_rate": "0.0001",
        "lora_config.r": "8",
        "lora_config.target_modules": "['q_proj']",
    }
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 3 / step) for step in range(1, 31)]
    assert run.data.metrics["eval/accuracy"] == 0.5

    failed = open_logger("mlflow", options, tmp_path)
    failed.event("failed", error="x")
    assert client.get_run(failed._run_id).info.status == "FAILED"


def test_an_mlflow_server_that_is_not_there_is_an_error_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"mlflow could not start a run: .*refused.*provider_config"):
        open_logger("mlflow", {"tracking_uri": "http://127.0.0.1:9"}, tmp_path)


def read_leveldb_log(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, which wandb's offline runs have: blocks of 32 KiB, with fragments
    that start with a checksum (4 bytes), a length (2) and a kind (1 whole, 2 first, 3 middle, 4 last)."""
    position, record = 7, b""  # behind the file's own header
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_gets_every_number_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = open_logger("wandb", {"tags": ["t"]}, tmp_path)
    assert logger.place.startswith(str(tmp_path / "wandb"))
    send_whole_run(logger)
    wandb.teardown()  # waits until its service, another process, has written everything
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows, run = [], None
    for data in read_leveldb_log(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            rows.append(items)
    assert run is not None
    assert (run.project, run.run_group, run.display_name) == ("llmforge", "org/m", "org/m:alice:abcde")
    assert list(run.tags) == ["t"]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, 3 / step) for step in range(1, 31)]
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == [1.0, 0.5, 0.75]


@pytest.mark.parametrize(
    ("provider", "options", "message"),
    [
        ("comet", {}, r"'comet'; allowed are wandb, mlflow, tensorboard, trackio"),
        ("wandb", {"projekt": "x"}, r"provider_config\.projekt .* allowed are project, group"),
        ("wandb", {"tags": "x"}, r"provider_config\.tags is 'x'; it must be a list"),
        ("mlflow", {"create_experiment_if_not_exists": "yes"}, r"it must be true or false"),
    ],
)
def test_a_wrong_logger_section_is_refused(provider: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_logger(provider, options)


def test_wandb_needs_a_key_a_login_or_another_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY.*wandb login.*offline"):
        check_logger("wandb", {})
    check_logger("wandb", {"mode": "offline"})
    with pytest.raises(ConfigError, match="'sometimes'"):
        check_logger("wandb", {"mode": "sometimes"})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    (tmp_path / ".netrc").chmod(0o600)
    check_logger("wandb", {})
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_logger("wandb", {})


def test_mlflow_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="tracking_uri"):
        check_logger("mlflow", {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    check_logger("mlflow", {})


def run_python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_a_missing_package_names_the_extra() -> None:
    program = (
        "import sys\nfrom llmforge.jobs.loggers import check_logger\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "for name in ('wandb', 'mlflow', 'tensorboard', 'trackio'):\n"
        "    try: check_logger(name, {})\n    except ValueError as error: print(error)\n"
    )
    lines = run_python(program).splitlines()
    assert [re.findall(r"pip install '(.*)'`", line) for line in lines] == [
        ["llmforge[wandb]"],
        ["llmforge[mlflow]"],
        ["llmforge[tensorboard]"],
        ["llmforge[trackio]"],
    ]


def test_reporting_imports_neither_torch_nor_transformers_nor_a_service() -> None:
    program = (
        "import sys\nfrom llmforge.jobs import display, events, loggers, manifest, run_directory\n"
        "manifest.build_manifest(config_hash='', data={}, base_model={}, tokenizer_hash='', prompt_format_hash='')\n"
        "heavy = ('torch', 'transformers', 'rich', 'wandb', 'mlflow', 'tensorboard', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run_python(program).strip() == "[]"
