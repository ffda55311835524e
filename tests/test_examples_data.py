"""The quickstart's data is what its generator writes, balanced, and validation asks what training did not show."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SAFETY = Path(__file__).parent.parent / "examples" / "safety"
FILES = ("train.jsonl", "valid.jsonl")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAFETY / name).read_text(encoding="utf-8").splitlines()]


def answer(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def message(row: dict[str, Any]) -> str:
    """Return what the classifier judges, without the policy and the chat markers around it."""
    return row["messages"][0]["content"].split("Message: ")[1].split("<|im_end|>")[0]


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", SAFETY / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generator_writes_the_committed_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SAFETY / "make_data.py", "--output-dir", tmp_path], check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (SAFETY / name).read_bytes()


def test_another_seed_writes_other_rows(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SAFETY / "make_data.py", "--output-dir", tmp_path, "--seed", "1"], check=True)
    assert (tmp_path / "train.jsonl").read_bytes() != (SAFETY / "train.jsonl").read_bytes()


def test_ask_prints_a_row_without_an_answer(make_data: ModuleType) -> None:
    question = "Who needs {braces} and “quotes”?"
    printed = subprocess.run(
        [sys.executable, SAFETY / "make_data.py", "--ask", question],
        check=True,
        capture_output=True,
        encoding="utf-8",
        env={"PYTHONIOENCODING": "utf-8"},
    ).stdout
    row = json.loads(printed)
    assert row == make_data.row(question)
    assert [turn["role"] for turn in row["messages"]] == ["user"]
    assert message(row) == question


@pytest.mark.parametrize("name", FILES)
def test_rows_are_conversations_in_the_chat_format_of_smollm2(name: str, make_data: ModuleType) -> None:
    answers = {"safe"} | {f"unsafe\n{code}" for code in make_data.CATEGORIES}
    for row in read(name):
        assert set(row) == {"messages"}
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert answer(row) in answers
        prompt = row["messages"][0]["content"]
        assert prompt.startswith("<|im_start|>user\n")
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.count("<|im_start|>") == 2


@pytest.mark.parametrize("name", FILES)
def test_labels_and_categories_are_balanced(name: str, make_data: ModuleType) -> None:
    counts = Counter(answer(row) for row in read(name))
    unsafe = [counts[f"unsafe\n{code}"] for code in make_data.CATEGORIES]
    assert len(set(unsafe)) == 1
    assert counts["safe"] == sum(unsafe)


@pytest.mark.parametrize("name", ["TRAIN", "VALID"])
def test_every_style_is_asked_under_both_labels_and_in_every_category(name: str, make_data: ModuleType) -> None:
    unsafe, safe = getattr(make_data, f"{name}_UNSAFE"), getattr(make_data, f"{name}_SAFE")
    phrasings = getattr(make_data, f"{name}_PHRASINGS")
    for wishes in [safe, *unsafe.values()]:
        assert len(make_data.lines(wishes)) >= len(phrasings)


def test_no_message_occurs_twice() -> None:
    messages = [message(row).lower() for name in FILES for row in read(name)]
    assert [text for text, count in Counter(messages).items() if count > 1] == []


def test_validation_shares_neither_wishes_nor_phrasings_with_training(make_data: ModuleType) -> None:
    def wishes(unsafe: dict[str, str], safe: str) -> set[str]:
        return {wish for text in [safe, *unsafe.values()] for wish in make_data.lines(text)}

    trained = wishes(make_data.TRAIN_UNSAFE, make_data.TRAIN_SAFE)
    held_out = wishes(make_data.VALID_UNSAFE, make_data.VALID_SAFE)
    assert not [(a, b) for a in trained for b in held_out if a in b or b in a]

    trained_phrasings = {text for style in make_data.TRAIN_PHRASINGS.values() for text in style}
    held_out_phrasings = {text for style in make_data.VALID_PHRASINGS.values() for text in style}
    assert not trained_phrasings & held_out_phrasings

    messages = [message(row) for row in read("train.jsonl")]
    assert not [wish for wish in held_out if any(wish in text for text in messages)]
