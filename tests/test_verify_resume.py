"""`llmforge verify-resume` proves resuming on a config, and finds it out when resuming changes a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from commands import llmforge as command
from llmforge.errors import InputError
from llmforge.jobs.run_directory import RunDirectory
from llmforge.jobs.verify_resume import compare_runs, verify_resume
from tiny_runs import LORA, run_here, start, write_config

KEYS: dict[str, Any] = {"lora_config": {**LORA, "lora_dropout": 0.2}, "learning_rate": 1e-2, "num_epochs": 20}


def test_resuming_is_proven_and_nothing_is_left(data_dir: Path, model_dir: Path) -> None:
    config = write_config(data_dir, model_dir, **KEYS, valid_path=str(data_dir / "valid.jsonl"))
    before = {path.name for path in data_dir.iterdir()}
    outcome = command("verify-resume", config, "--json", "--set", "max_num_checkpoints=3")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["identical"] is True
    assert report["steps"] == 6
    (kill,) = report["kills"]
    assert kill["killed"] == "everything"
    assert 2 <= kill["resumed_from"] <= kill["after_step"] < 6
    assert {check["name"]: check["count"] for check in report["checks"]} == {
        "parameters": 24,
        "optimizer state": 72,
        "losses": 6,
        "data order": 6,
        "evaluations": 3,
    }
    assert all(check["different"] == [] for check in report["checks"])
    assert (report["repeatable"], report["kept"]) == (None, None)
    assert {path.name for path in data_dir.iterdir()} - before <= {"cache"}


def test_on_two_devices_a_worker_and_then_everything_is_killed(data_dir: Path, model_dir: Path) -> None:
    rows = {"valid_path": str(data_dir / "valid.jsonl"), "train_batch_size_per_device": 2, "num_epochs": 4}
    config = write_config(data_dir, model_dir, learning_rate=1e-2, num_devices=2, parallel="fsdp2", **rows)
    # Enough steps that few runs are over before they are killed, and time for three of them: each starts Ray.
    process = start("verify-resume", config, "--steps", "24", "--json")
    out, err = process.communicate(timeout=800)
    assert process.returncode == 0, out + err
    report = json.loads(out)
    assert report["steps"] == 24
    assert [kill["killed"] for kill in report["kills"]] == ["a worker", "everything"]
    assert all(8 <= kill["resumed_from"] <= kill["after_step"] < 24 for kill in report["kills"])
    counts = {check["name"]: check["count"] for check in report["checks"]}
    assert [counts[name] for name in ("losses", "data order", "evaluations")] == [24, 24, 3]
    assert all(check["different"] == [] for check in report["checks"])


def test_a_resume_that_changes_the_run_is_found_out(data_dir: Path, model_dir: Path) -> None:
    config = write_config(data_dir, model_dir, **KEYS)

    def sabotage(text: str) -> None:
        if text == "resuming it":
            (run,) = data_dir.glob("runs/.verify-resume-*/killed-*")
            resolved = (run / "resolved_config.yaml").read_text()
            assert "learning_rate: 0.01" in resolved
            (run / "resolved_config.yaml").write_text(resolved.replace("learning_rate: 0.01", "learning_rate: 0.02"))

    found = verify_resume(config, ["train_batch_size_per_device=4"], steps=4, keep=True, say=sabotage)
    assert not found.identical
    assert found.repeatable is True
    different = {check.name: check.different for check in found.checks}
    assert different["losses"][-1] == "step 4"
    assert len(different["parameters"]) > 0
    assert different["data order"] == []
    assert "NOT the same: resuming changed the run" in found.lines()
    assert found.kept is not None
    assert (found.kept / "uninterrupted" / "events.jsonl").is_file()


def test_errors_are_those_of_the_run(data_dir: Path, model_dir: Path) -> None:
    config = write_config(data_dir, model_dir, **KEYS)
    with pytest.raises(InputError, match=r"lora_config\.target_modules.*up_project|up_project"):
        verify_resume(config, ["lora_config.target_modules=[up_project]"])
    assert not (data_dir / "runs").exists()
    assert command("verify-resume", config, "--steps", "1").code == 2
    assert command("verify-resume", data_dir / "none.yaml").code == 2


def test_every_difference_is_named(data_dir: Path, model_dir: Path) -> None:
    run, _ = run_here(data_dir, model_dir, lora_config=LORA, valid_path=str(data_dir / "valid.jsonl"))
    weights = run.artifact_dir / "adapter_model.safetensors"
    whole = RunDirectory.open(run.run_dir)
    other = RunDirectory.open(Path(shutil.copytree(run.run_dir, data_dir / "other")))
    assert not any(check.different for check in compare_runs(whole, other))

    tensors = load_file(weights)
    save_file(tensors | {min(tensors): -tensors[min(tensors)]}, other.artifact / weights.name)
    checkpoint = other.checkpoints / "step-000006"
    for name in ("parameters", "optimizer"):
        tensors = load_file(checkpoint / f"{name}.safetensors")
        first = min(tensors)
        tensors[first] = -tensors[first] * 0 if name == "optimizer" else tensors[first].double()
        save_file(tensors, checkpoint / f"{name}.safetensors")
    lines = [json.loads(line) for line in other.events.read_text().splitlines()]
    for event in lines:
        if event["event"] == "step" and event["step"] == 2:
            event["grad_norm"] *= 1 + 2**-52
        if event["event"] == "step" and event["step"] == 5:
            event["tokens"] += 1
        if event["event"] == "evaluation":
            event["eval_loss"] += 1
    other.events.write_text("".join(json.dumps(event) + "\n" for event in lines))
    different = {check.name: check.different for check in compare_runs(whole, other)}
    assert [len(different[name]) for name in ("parameters", "optimizer state", "artifact")] == [1, 1, 1]
    assert different["losses"] == ["step 2"]
    assert different["data order"] == ["step 5"]
    assert different["evaluations"] == ["step 6"]
