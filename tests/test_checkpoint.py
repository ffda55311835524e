"""Checkpoints on disk: damage of any kind is found and told, and nothing damaged is used or deleted."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import build_model
from llmforge.checkpoint import (
    Checkpoint,
    best_sound,
    delete_superseded,
    find_damage,
    last_sound,
    list_checkpoints,
    load_parameters,
    save_checkpoint,
    seal,
    state_of,
    sweep,
)
from llmforge.errors import RunError
from llmforge.train.optimization import build_optimizer


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a model that was updated once; the second is the best."""
    directory = tmp_path_factory.mktemp("checkpoints")
    model = build_model(40)
    optimizer = build_optimizer("adamw", model.named_parameters(), weight_decay=0.0)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    for step, loss in ((10, 0.5), (20, 0.4), (30, 0.6)):
        state = state_of(model, optimizer)
        save_checkpoint(directory, step=step, state=state, metrics={"eval_loss": loss})
    return directory


@pytest.fixture
def checkpoints(written: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def flip(file: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << bit
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: truncate(path / "parameters.safetensors"), r"parameters\.safetensors has .* instead of"),
    "longer": (lambda path: (path / "optimizer.safetensors").open("ab").write(b"\0"), r"optimizer\.safetensors has "),
    "empty": (lambda path: (path / "optimizer.safetensors").write_bytes(b""), r"optimizer\.safetensors has 0 bytes"),
    "flipped": (lambda path: flip(path / "optimizer.safetensors", 5000), r"bytes of optimizer\.safetensors have chang"),
    "missing": (lambda path: (path / "parameters.safetensors").unlink(), r"parameters\.safetensors is missing"),
    "no state": (lambda path: (path / "state.json").unlink(), r"state\.json is missing"),
    "state truncated": (lambda path: truncate(path / "state.json"), r"state\.json cannot be read"),
    "state zeroed": (lambda path: (path / "state.json").write_bytes(bytes(900)), r"state\.json cannot be read"),
    "state of another kind": (lambda path: (path / "state.json").write_text("[]"), r"state\.json lacks"),
    "state of another step": (
        lambda path: (path / "state.json").write_text((path / "state.json").read_text().replace("30", "31", 1)),
        r"the content of state\.json has changed",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(kind: str, checkpoints: Path) -> None:
    damage, reason = DAMAGES[kind]
    damage(checkpoints / "step-000030")
    before = {path.name: path.read_bytes() for path in (checkpoints / "step-000030").iterdir()}
    notes: list[str] = []
    found = last_sound(checkpoints, notes.append)
    assert found is not None
    assert found.step == 20
    assert len(notes) == 1
    assert re.search(rf"step-000030 is damaged \({reason}.*continues from step-000020", notes[0])
    aside = checkpoints / ".step-000030.damaged"
    assert aside.name in notes[0]
    sweep(checkpoints)
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before  # nothing of it is lost
    assert [checkpoint.step for checkpoint in list_checkpoints(checkpoints)] == [10, 20]


@settings(max_examples=60)
@given(st.sampled_from(("parameters.safetensors", "optimizer.safetensors", "state.json")), st.data())
def test_any_flipped_bit_is_found(written: Path, name: str, data: st.DataObject) -> None:
    path = written / "step-000010"
    content = (path / name).read_bytes()
    flip(path / name, data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7)))
    try:
        if find_damage(path) is None:  # only what changes nothing, such as 1e-05 written 1E-05
            assert name == "state.json"
            assert json.loads((path / name).read_text()) == json.loads(content)
    finally:
        (path / name).write_bytes(content)


def test_every_file_below_a_checkpoint_is_checked(tmp_path: Path) -> None:
    for name in ("a", "shards/0.bin", "shards/deep/1.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    seal(tmp_path, {"step": 1, "metrics": {}, "only_to_resume": False, "optimizer": {}})
    assert find_damage(tmp_path) is None
    for name in ("a", "shards/0.bin", "shards/deep/1.bin"):
        flip(tmp_path / name, 0)
        assert find_damage(tmp_path) == f"bytes of {name} have changed since it was written"
        flip(tmp_path / name, 0)


def test_with_none_left_the_run_starts_again(checkpoints: Path) -> None:
    for path in checkpoints.iterdir():
        truncate(path / "optimizer.safetensors")
    notes: list[str] = []
    assert last_sound(checkpoints, notes.append) is None
    assert [note.split()[2] for note in notes] == ["step-000030", "step-000020", "step-000010"]
    assert all("starts again at its beginning" in note for note in notes)
    assert sorted(path.name for path in checkpoints.iterdir()) == [f".step-0000{step}.damaged" for step in (10, 20, 30)]
    assert last_sound(checkpoints, notes.append) is None
    assert len(notes) == 3


def test_a_step_that_is_damaged_again_gets_another_name(checkpoints: Path, written: Path) -> None:
    for _ in range(3):
        truncate(checkpoints / "step-000030" / "state.json")
        last_sound(checkpoints, lambda note: None)
        shutil.copytree(written / "step-000030", checkpoints / "step-000030")
    assert sorted(path.name for path in checkpoints.glob(".*")) == [
        ".step-000030-2.damaged",
        ".step-000030-3.damaged",
        ".step-000030.damaged",
    ]


def test_the_next_best_stands_in_for_a_damaged_best(checkpoints: Path) -> None:
    notes: list[str] = []
    flip(checkpoints / "step-000020" / "parameters.safetensors", 5000)
    # What the model holds is not read from disk.
    assert best_sound(checkpoints, in_memory=20, note=notes.append).step == 20
    assert notes == []
    best = best_sound(checkpoints, in_memory=30, note=notes.append)
    assert (best.step, best.metrics) == (10, {"eval_loss": 0.5})
    assert len(notes) == 1
    assert "step-000020 is damaged" in notes[0]
    assert "the artifact is made of step-000010" in notes[0]
    for step in (10, 30):
        truncate(checkpoints / f"step-0000{step}" / "state.json")
    assert best_sound(checkpoints, in_memory=30, note=notes.append).step == 30
    assert len(notes) == 3


def test_checkpoints_of_before_there_were_checksums_are_used(checkpoints: Path) -> None:
    for path in checkpoints.iterdir():
        content = json.loads((path / "state.json").read_text())
        del content["files"], content["crc32"]
        (path / "state.json").write_text(json.dumps(content))
    notes: list[str] = []
    found = last_sound(checkpoints, notes.append)
    assert found is not None
    assert found.step == 30
    assert notes == []
    load_parameters(found, build_model(40))
    truncate(checkpoints / "step-000030" / "parameters.safetensors")
    found = last_sound(checkpoints, notes.append)
    assert found is not None
    assert found.step == 20
    assert "parameters.safetensors cannot be read" in notes[0]


def test_a_file_that_cannot_be_opened_is_no_damage(checkpoints: Path) -> None:
    state = checkpoints / "step-000030" / "state.json"
    state.unlink()
    state.mkdir()
    with pytest.raises(RunError, match=r"step-000030 cannot be read.*Is a directory"):
        last_sound(checkpoints, lambda note: None)
    assert state.is_dir()


@pytest.mark.parametrize(
    ("steps", "keep", "kept"),
    [
        # Steps with their validation losses; an r marks one of an interruption.
        ({"5": 0.5}, 1, ["5"]),
        ({"5": 0.5, "10": 0.4, "15": 0.6, "20": 0.7}, 1, ["10", "15", "20"]),
        ({"5": 0.3, "10": 0.4, "15": 0.6, "20": 0.7}, 2, ["5", "10", "15", "20"]),
        ({"5": None, "10": None, "15": None}, 1, ["10", "15"]),
        ({"1r": None, "3r": None, "4r": None}, 1, ["3r", "4r"]),
        ({"1r": None, "3r": None, "5": 0.5}, 1, ["5"]),
        ({"5": 0.5, "10": 0.6, "15": 0.7, "18r": None}, 1, ["5", "10", "15", "18r"]),
        ({"5": 0.5, "10": 0.6, "15": 0.7, "18r": None, "20": 0.8}, 1, ["5", "15", "20"]),
    ],
)
def test_the_best_and_the_last_two_are_kept(
    steps: dict[str, float | None], keep: int, kept: list[str], tmp_path: Path
) -> None:
    checkpoints = []
    for name, loss in steps.items():
        (tmp_path / name).mkdir()
        metrics = {} if loss is None else {"eval_loss": loss}
        checkpoints.append(Checkpoint(int(name.rstrip("r")), tmp_path / name, metrics, name.endswith("r")))
    delete_superseded(checkpoints, keep)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
