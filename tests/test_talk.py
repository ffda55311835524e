"""Talking to a model and to its base, side by side; and files of conversations, whoever kills the command."""

import io
import json
import os
import pty
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import conversation_rows, save_model, write_jsonl
from llmforge.errors import DataError, InputError
from llmforge.jobs.generate import Answerer, Work, generate
from llmforge.jobs.run import Run, load_run
from llmforge.jobs.talk import _Columns
from tiny_runs import LORA, command, environment, run_here, start

TOKENS = {"max_new_tokens": 5, "temperature": 0.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("talk")
    write_jsonl(directory / "train.jsonl", conversation_rows(48))
    return run_here(directory, save_model(directory / "model"), lora_config=LORA, learning_rate=2e-2, num_epochs=2)[0]


# --- chat -------------------------------------------------------------------------------------------------------------


def test_the_base_model_answers_the_same_messages(run: Run) -> None:
    options = ("--max-new-tokens", "5", "--temperature", "0", "--compare", "base")
    outcome = command("chat", run.run_dir, *options, stdin="What does red mean?\nand blue?\n")
    assert outcome.returncode == 0, outcome.stderr
    shown = []
    for name, model in (("base", run.base), ("tuned", run.model)):
        messages = []
        for number, text in enumerate(("What does red mean?", "and blue?")):
            messages.append({"role": "user", "content": text})
            answer = "".join(piece.text for piece in model.answer(model.encode(messages), model.options(**TOKENS)))
            messages.append({"role": "assistant", "content": answer})
            shown.append((number, f"{name}: {answer}\n"))
    assert outcome.stdout == "".join(text for _, text in sorted(shown, key=lambda item: item[0]))
    refused = command("chat", run.run_dir, "--compare", "other")
    assert refused.returncode == 2
    assert "--compare: given other; allowed is base" in refused.stderr


class Terminal(io.StringIO):
    """A terminal that keeps what a reader of it sees in the end."""

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.text("ab \n日", max_size=12)), max_size=30),
    st.integers(20, 60),
    st.booleans(),
)
def test_columns_show_all_of_both_texts_whatever_comes_first(
    pieces: list[tuple[int, str]], width: int, is_ended: bool
) -> None:
    out = Terminal()
    columns = _Columns(out, width, ("base", "tuned"))
    texts = ["", ""]
    for place, text in pieces:
        texts[place] += text
        columns.add(place, text)
    if is_ended:
        columns.end(1)
        columns.end(0)
    columns.close()
    rows = [row.split(" │") for row in out.rows()[1:-1]]
    assert all(len(row) == 2 for row in rows)
    for place, text in enumerate(texts):
        shown = "".join("".join(row[place] for row in rows).split())
        assert shown == "".join(text.split())


def test_in_a_wide_terminal_both_answers_stand_side_by_side(run: Run) -> None:
    """Talks through a pseudo-terminal, as a person does."""
    program = [sys.executable, "-m", "llmforge", "chat", str(run.run_dir), "--max-new-tokens", "5", "--compare", "base"]
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, program, {**environment(), "COLUMNS": "100", "LINES": "40", "TERM": "xterm"})
    shown = b""
    asked = False
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the program has ended
            break
        if not asked and b"> " in shown:
            os.write(terminal, b"What does red mean?\n/exit\n")
            asked = True
    assert os.waitpid(process, 0)[1] == 0
    lines = shown.decode().replace("\r\n", "\n").split("\n")
    assert any(line.rpartition("\x1b[K")[2].split() == ["base:", "│", "tuned:"] for line in lines)
    tuned = run.chat([{"role": "user", "content": "What does red mean?"}], max_new_tokens=5)
    assert any(line.endswith(f"│ {tuned.splitlines()[0].rstrip()}") for line in lines)


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "asked.jsonl", conversation_rows(60, seed=5))


def answer(run: Run, asked: Path, target: Path, **options: Any) -> list[dict[str, Any]]:
    """Answer a file; give the rows that were written."""
    options = {"batch_size": 4, "base": False, "options": TOKENS, **options}
    count = generate(run.run_dir, str(asked), target, **options)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(rows) == count
    return rows


def partial(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{target.name}.*.partial"))


def test_rows_stand_in_order_with_their_answers(run: Run, asked: Path, tmp_path: Path) -> None:
    rows = answer(run, asked, tmp_path / "out.jsonl")
    given = [json.loads(line) for line in asked.read_text().splitlines()]
    expected = run.generate([row["messages"][:1] for row in given], **TOKENS)
    assert rows == [{**row, "generated": text} for row, text in zip(given, expected, strict=True)]
    assert not partial(tmp_path / "out.jsonl")


def test_a_killed_command_goes_on_where_it_was(run: Run, asked: Path, tmp_path: Path) -> None:
    expected = answer(run, asked, tmp_path / "whole.jsonl")
    target = tmp_path / "out.jsonl"
    options = ("--batch-size", "4", "--max-new-tokens", "5", "--temperature", "0")
    arguments = ("generate", run.run_dir, "--input", asked, "--output", target, *options)
    process = start(*arguments)
    deadline = time.monotonic() + 60
    while not (partial(target) and partial(target)[0].read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    (kept,) = partial(target)
    lines = kept.read_text().splitlines()
    known = json.loads(lines[0])
    lines[0] = json.dumps({**known, "generated": "kept"})
    kept.write_text("\n".join([*lines[:3], '{"row": 5, "gene']))  # and half a line, as a kill may leave it

    assert answer(run, asked, tmp_path / "other.jsonl") == expected  # another output is another command
    for other in ({"options": {**TOKENS, "seed": 1}}, {"base": True}):
        answer(run, asked, target, **other)  # other answers, which are not mixed with these
        assert partial(target) == [kept]
    resumed = command(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "note: 3 of 60 answers are there already" in resumed.stderr
    expected[known["row"]]["generated"] = "kept"  # it was not answered again
    assert [json.loads(line) for line in target.read_text().splitlines()] == expected
    assert not partial(target)


def test_ctrl_c_keeps_what_is_answered(run: Run, tmp_path: Path) -> None:
    asked = write_jsonl(tmp_path / "asked.jsonl", conversation_rows(400, seed=5))
    target = tmp_path / "out.jsonl"
    process = start("generate", run.run_dir, "--input", asked, "--output", target)
    while not (partial(target) and partial(target)[0].stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = partial(target)[0].read_text().count("\n")
    assert f"interrupted; {kept:,} of 400 answers are kept, and the same command continues" in err


def test_two_commands_do_not_answer_the_same_rows(run: Run, asked: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    process = start("generate", run.run_dir, "--input", asked, "--output", target, "--max-new-tokens", 400)
    while not any(file.stat().st_size for file in partial(target)):  # the file is locked before it is written to
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="another command is answering the same rows"):
        answer(run, asked, target, options={"max_new_tokens": 400})
    process.kill()
    process.communicate()


def test_several_devices_give_the_same_file(
    run: Run, asked: Path, tmp_path: Path, ray_cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmforge.jobs.ray_cluster import connected

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    expected = answer(run, asked, tmp_path / "one.jsonl")
    with connected(ray_cluster["address"], note=print):
        assert answer(run, asked, tmp_path / "two.jsonl", num_devices=2) == expected
        with pytest.raises(InputError, match="--num-devices: given 99; the cluster has 4 CPUs"):
            answer(run, asked, tmp_path / "many.jsonl", num_devices=99)
        call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
        rows = conversation_rows(3)
        rows[1]["messages"] = [rows[1]["messages"][0], call, {"role": "tool", "content": "1"}]
        bad = write_jsonl(tmp_path / "bad.jsonl", [*rows[:1], {**rows[1], "tools": []}, *rows[2:]])
        with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
            answer(run, bad, tmp_path / "bad-out.jsonl", num_devices=2)


def test_an_answerer_can_answer_again(run: Run) -> None:
    answerer = Answerer(Work(str(run.run_dir), False, 2, TOKENS))
    for _ in range(2):
        assert len(list(answerer.answer([conversation_rows(1)[0]["messages"][:1]] * 5))) == 5
    answerer.close()
    assert load_run(run.run_dir).tag == run.tag
