"""Preparing data: the same samples whatever the route, every row accounted for, and nothing done twice."""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.data import RowLayout, RowProblem, Sample
from llmforge.data.prepare import prepare
from llmforge.data.shards import is_whole
from llmforge.errors import DataError, OutputError, RunError


@dataclass(frozen=True)
class Bytes:
    """An encoder without a tokenizer: UTF-8 bytes are the ids, assistant turns carry loss. It logs its calls."""

    log: str | None = None
    seconds_per_call: float = 0.0
    ballast: bytes = b""  # tokenizers are large

    def __call__(self, rows):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {len(rows)}\n")
        time.sleep(self.seconds_per_call)
        return [self.encode(row) for row in rows]

    def encode(self, row):
        if any("refuse" in message["content"] for message in row["messages"]):
            return RowProblem("the format cannot express 'refuse'")
        sample = Sample([], [])
        for message in row["messages"]:
            ids = list(message["content"].encode())
            weight = message.get("weight", 1) * 0.1 if message["role"] == "assistant" else 0.0
            sample.input_ids.extend(ids)
            sample.loss_weights.extend([weight] * len(ids))
        sample.loss_weights[0] = 0.0
        unrolled = any("unroll" in message["content"] for message in row["messages"])
        return [sample, Sample(sample.input_ids[:6], [0.0] * 5 + [0.5])] if unrolled else [sample]

    def rows_encoded(self):
        if not os.path.exists(self.log):
            return 0
        return sum(int(line.split()[1]) for line in Path(self.log).read_text().splitlines())


def broken(rows):
    raise KeyError("a bug")


def noisy(rows):
    print("this must not disturb the pipe", flush=True)
    return Bytes()(rows)


def dies(rows):
    os.kill(os.getpid(), signal.SIGKILL)


def chat(user, assistant, **assistant_keys):
    return {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant, **assistant_keys}]
    }


def rows_of_words(count):
    return [chat(f"question {number}", f"answer {'x' * (number % 40)}") for number in range(count)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(files, cache_dir, encode=None, **options):
    options = {"layout": RowLayout(), "fingerprint": "bytes", "workers": 1, **options}
    return prepare(
        [files] if isinstance(files, str) else files, encode=encode or Bytes(), cache_dir=cache_dir, **options
    )


def samples_of(prepared):
    dataset = prepared.fit(10**6, "error")
    return [dataset[index] for index in range(len(dataset))]


def ledger_rows(ledger, path):
    ledger.write(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the same samples whatever the route


def test_samples_are_what_the_encoder_gave(tmp_path):
    rows = [chat("hi", "ho"), chat("é", "unroll", weight=0), chat("a", "b")]
    samples = samples_of(run(write_rows(tmp_path / "x.jsonl", rows), tmp_path / "cache"))
    assert samples == [
        Sample([104, 105, 104, 111], [0, 0, 0.1, 0.1]),
        Sample([195, 169, 117, 110, 114, 111], [0, 0, 0, 0, 0, 0.5]),
        Sample([97, 98], [0, 0.1]),
    ]  # the weightless sample of row 2 is gone


def test_blocks_workers_and_file_kinds_change_nothing(tmp_path):
    rows = rows_of_words(2000)
    jsonl = write_rows(tmp_path / "x.jsonl", rows)
    parquet = str(tmp_path / "x.parquet")
    pq.write_table(pa.Table.from_pylist(rows), parquet, row_group_size=300)
    expected = [Bytes().encode(row)[0] for row in rows]
    for name, file, workers, block_bytes in (
        ("one block", jsonl, 1, 2**22),
        ("many blocks", jsonl, 1, 5000),
        ("workers", jsonl, 2, 20_000),
        ("parquet", parquet, 1, 2**22),
        ("parquet, workers", parquet, 2, 2000),
    ):
        prepared = run(file, tmp_path / name, noisy, workers=workers, block_bytes=block_bytes)
        assert samples_of(prepared) == expected, name
        assert prepared.row_line.tolist() == list(range(1, 2001)), name


def test_prepared_data_can_be_sent_to_another_process(tmp_path):
    dataset = run(write_rows(tmp_path / "x.jsonl", rows_of_words(50)), tmp_path / "cache").fit(20, "truncate")
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == 50
    assert copy[-1] == dataset[49] == dataset[np.int64(49)]
    assert copy.place(49) == (str(tmp_path / "x.jsonl"), 50)
    with pytest.raises(IndexError):
        copy[50]


def test_statistics(tmp_path):
    rows = [chat("12345", "x" * length) for length in range(1, 101)]
    statistics = run(write_rows(tmp_path / "x.jsonl", rows), tmp_path / "cache").statistics
    assert (statistics.rows, statistics.samples, statistics.rejected) == (100, 100, 0)
    assert (statistics.tokens, statistics.trained_tokens) == (5550, 5050)
    assert (statistics.min_tokens, statistics.max_tokens) == (6, 105)
    assert (statistics.mean_tokens, statistics.median_tokens) == (55.5, 55.5)
    assert statistics.p95_tokens == pytest.approx(100.05)


def test_content_hash_follows_the_content_and_its_order_not_the_names(tmp_path):
    first, second = (
        write_rows(tmp_path / "a.jsonl", rows_of_words(3)),
        write_rows(tmp_path / "b.jsonl", rows_of_words(4)),
    )
    same = write_rows(tmp_path / "c.jsonl", rows_of_words(3))
    hashes = [
        run(files, tmp_path / "cache").content_hash for files in ([first, second], [same, second], [second, first])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


# ---- the ledger

good_row = st.builds(
    lambda user, assistant: json.dumps(chat(user, assistant), ensure_ascii=False),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
)
special_row = st.sampled_from([json.dumps(chat("please unroll", "x" * n)) for n in (1, 30)])
weightless_row = st.just(json.dumps(chat("question", "answer", weight=0)))
bad_row = st.sampled_from(
    ["{", "[]", "17", '{"messages": []}', json.dumps(chat("", "x")), json.dumps(chat("refuse", "x"))]
)
garbage = (
    st.binary(min_size=1, max_size=20).map(lambda data: data.replace(b"\n", b"")).filter(lambda data: data.strip())
)
blank = st.sampled_from([b"", b"  ", b"\t"])
line = (good_row | special_row | weightless_row | bad_row).map(str.encode) | garbage | blank


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(line, max_size=25),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    ends_with_newline=st.booleans(),
    block_bytes=st.sampled_from([1, 100, 700, 2**22]),
    context_length=st.integers(1, 40),
    overlong=st.sampled_from(["truncate", "drop"]),
)
def test_every_row_is_accounted_for(lines, newline, ends_with_newline, block_bytes, context_length, overlong):
    content = newline.join([json.dumps(chat("q", "a")).encode(), *lines]) + newline * ends_with_newline
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "x.jsonl")
        file.write_bytes(content)
        prepared = run(str(file), Path(directory, "cache"), on_bad_row="skip", block_bytes=block_bytes)
        try:
            dataset = prepared.fit(context_length, overlong)
        except DataError:  # nothing is left; the row in front makes sure that there was something
            assert context_length < prepared.lengths.max()
            return
        rows = ledger_rows(dataset.ledger, Path(directory, "rows.jsonl"))
        trained = sum(sum(weight != 0 for weight in dataset[index].loss_weights) for index in range(len(dataset)))

    ledger = dataset.ledger
    numbers = [number for number, text in enumerate(content.split(b"\n"), 1) if text.strip()]
    assert [row["line"] for row in rows] == numbers
    assert sum(ledger.counts.values()) == ledger.rows == len(rows) == prepared.statistics.rows
    for status, count in ledger.counts.items():
        assert count == sum(row["status"] == status for row in rows)
    assert all(("reason" in row) == (row["status"] != "kept") for row in rows)
    assert sum(row["tokens"] for row in rows) == prepared.statistics.tokens
    assert sum(row["tokens"] - row["tokens_lost"] for row in rows) == dataset.lengths.sum()
    assert (
        sum(row["trained_tokens"] - row["trained_tokens_lost"] for row in rows)
        == dataset.trained_tokens.sum()
        == trained
    )
    assert ledger.tokens_lost == sum(row["tokens_lost"] for row in rows)
    assert ledger.trained_tokens_lost == sum(row["trained_tokens_lost"] for row in rows)
    assert dataset.lengths.max() <= context_length
    assert dataset.trained_tokens.min() > 0


def test_what_becomes_of_long_rows(tmp_path):
    rows = [
        chat("12345", "abc"),  # 8 tokens fit
        chat("12345", "abcdef"),  # 11: three cut
        chat("1234567890", "abc"),  # 13: all trained tokens are behind the cut
        chat("12345", "abc", weight=0),  # nothing to train
        chat("unroll", "a" * 94),  # two samples, of 100 and 6 tokens
    ]
    prepared = run(write_rows(tmp_path / "x.jsonl", rows), tmp_path / "cache")

    dataset = prepared.fit(8, "truncate")
    assert dataset.lengths.tolist() == [8, 8, 8, 6]
    assert dataset[1] == Sample(list(b"12345abc"), [0] * 5 + [0.1] * 3)
    assert dataset.ledger.counts == {"kept": 1, "truncated": 2, "dropped": 2, "rejected": 0}
    assert (dataset.ledger.tokens_lost, dataset.ledger.trained_tokens_lost) == (3 + 13 + 8 + 92, 3 + 3 + 0 + 92)
    written = ledger_rows(dataset.ledger, tmp_path / "rows.jsonl")
    assert written[1] == {
        "file": str(tmp_path / "x.jsonl"),
        "line": 2,
        "status": "truncated",
        "reason": "longer than context_length 8: 3 of 11 tokens cut",
        "tokens": 11,
        "trained_tokens": 6,
        "tokens_lost": 3,
        "trained_tokens_lost": 3,
    }
    assert [row.get("reason") for row in written[2:4]] == [
        "no trained token within context_length 8",
        "no trained token",
    ]

    dataset = prepared.fit(8, "drop")
    assert dataset.lengths.tolist() == [8, 6]
    assert [row["status"] for row in ledger_rows(dataset.ledger, tmp_path / "rows.jsonl")] == ["kept"] + ["dropped"] * 4

    with pytest.raises(DataError) as error:
        prepared.fit(8, "error")
    assert str(error.value).startswith(
        f"{tmp_path}/x.jsonl:2: 11 tokens, more than context_length 8 (and 2 more like it"
    )
    assert "overlong: truncate" in str(error.value)
    assert "overlong: drop" in str(error.value)


def test_a_data_set_of_which_nothing_is_left(tmp_path):
    prepared = run(
        write_rows(tmp_path / "x.jsonl", [chat("12345", "abc"), chat("12345", "abcdef")]), tmp_path / "cache"
    )
    with pytest.raises(
        DataError, match=r"nothing is left .* context_length 4 and `overlong: drop`: the rows have 8 to 11"
    ):
        prepared.fit(4, "drop")
    with pytest.raises(DataError, match="nothing is left"):
        prepared.fit(5, "truncate")
    weightless = run(write_rows(tmp_path / "y.jsonl", [chat("a", "b", weight=0)]), tmp_path / "cache")
    with pytest.raises(DataError, match="no row has a token to train on"):
        weightless.fit(100, "truncate")


def test_a_ledger_that_cannot_be_written(tmp_path):
    ledger = run(write_rows(tmp_path / "x.jsonl", [chat("a", "b")]), tmp_path / "cache").fit(10, "drop").ledger
    with pytest.raises(OutputError, match="No such file or directory"):
        ledger.write(tmp_path / "missing" / "rows.jsonl")


# ---- bad rows


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_row_stops_the_run_and_is_the_first_in_the_file(tmp_path, workers):
    rows = [json.dumps(row) for row in rows_of_words(1000)]
    for number in (400, 402, 405, 406, 407, 408, 900):
        rows[number - 1] = "{"
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError) as error:
        run(str(tmp_path / "x.jsonl"), tmp_path / "cache", workers=workers, block_bytes=10_000)
    text = str(error.value)
    assert (error.value.file, error.value.line) == (str(tmp_path / "x.jsonl"), 400)
    assert text.startswith(f"{tmp_path}/x.jsonl:400: not JSON")
    assert re.findall(r"x\.jsonl:(\d+)", text) == ["400", "402", "405", "406", "407"]
    assert "6 of the " in text
    assert "`on_bad_row: skip`" in text


def test_skipped_rows_are_recorded(tmp_path):
    write_rows(tmp_path / "x.jsonl", [chat("a", "b"), {"text": "x"}, chat("refuse", "b"), chat("c", "d")])
    prepared = run(str(tmp_path / "x.jsonl"), tmp_path / "cache", on_bad_row="skip")
    dataset = prepared.fit(100, "truncate")
    assert prepared.statistics.rejected == dataset.ledger.rejected == 2
    rows = ledger_rows(dataset.ledger, tmp_path / "rows.jsonl")
    assert [row["status"] for row in rows] == ["kept", "rejected", "rejected", "kept"]
    assert rows[1]["reason"] == "no column 'messages' (data_format: messages); the row's columns: 'text'"
    assert rows[2]["reason"] == "the format cannot express 'refuse'"
    assert [dataset.place(index)[1] for index in range(2)] == [1, 4]


def test_files_without_good_rows(tmp_path):
    good = write_rows(tmp_path / "good.jsonl", [chat("a", "b")])
    (tmp_path / "blank.jsonl").write_text("\n\n \n")
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / "none.parquet")
    (tmp_path / "bad.jsonl").write_text("\n{\n{\n")
    for name in ("blank.jsonl", "none.parquet"):
        with pytest.raises(DataError, match=f"{name}: this file holds no row"):
            run([good, str(tmp_path / name)], tmp_path / "cache")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: all 2 rows are bad; the first: not JSON"):
        run(str(tmp_path / "bad.jsonl"), tmp_path / "cache", on_bad_row="skip")


# ---- the cache


def test_a_second_run_encodes_nothing_and_a_changed_one_only_what_changed(tmp_path):
    encode = Bytes(str(tmp_path / "log"))
    rows = rows_of_words(1000)
    file = write_rows(tmp_path / "x.jsonl", rows)
    first = run(file, tmp_path / "cache", encode, block_bytes=10_000)
    assert encode.rows_encoded() == 1000
    again = run(file, tmp_path / "cache", encode, block_bytes=10_000, workers=2)
    assert encode.rows_encoded() == 1000
    assert samples_of(again) == samples_of(first)

    write_rows(tmp_path / "x.jsonl", rows + rows_of_words(10))
    assert run(file, tmp_path / "cache", encode, block_bytes=10_000).statistics.rows == 1010
    assert 1010 <= encode.rows_encoded() <= 1200

    before = encode.rows_encoded()
    run(file, tmp_path / "cache", encode, block_bytes=10_000, fingerprint="another tokenizer")
    assert encode.rows_encoded() == before + 1010
    run(file, tmp_path / "cache", encode, block_bytes=10_000, layout=RowLayout(needs_assistant=False))
    assert encode.rows_encoded() == before + 2020


def test_damaged_shards_are_made_again(tmp_path):
    encode = Bytes(str(tmp_path / "log"))
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(1000))
    expected = samples_of(run(file, tmp_path / "cache", encode, block_bytes=10_000))
    shards = sorted((tmp_path / "cache").glob("*.arrow"))
    content = shards[1].read_bytes()
    for damaged in (
        b"",
        b"ARROW1",
        content[:-1],
        content[: len(content) // 2],
        bytes(len(content)),
        shards[2].read_bytes()[:-9],
    ):
        shards[1].unlink()
        shards[1].write_bytes(damaged)
        assert not is_whole(shards[1])
        assert samples_of(run(file, tmp_path / "cache", encode, block_bytes=10_000)) == expected
        assert is_whole(shards[1])
    for position in range(1000, len(content) - 1000, 997):  # a flipped bit in the arrays
        damaged = bytearray(content)
        damaged[position] ^= 4
        shards[1].unlink()
        shards[1].write_bytes(damaged)
        assert samples_of(run(file, tmp_path / "cache", encode, block_bytes=10_000)) == expected


KILLED = """
import sys
from pathlib import Path
from test_data_prepare import Bytes, run
file, cache, log, workers = sys.argv[1:]
run(file, Path(cache), Bytes(log, 0.05), workers=int(workers), block_bytes=10_000)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_where_it_was(tmp_path, workers):
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(2000))
    encode = Bytes(str(tmp_path / "log"))
    cache = tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    arguments = [file, str(cache), encode.log, str(workers)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], env=environment)
    deadline = time.monotonic() + 60
    while len(list(cache.glob("*.arrow"))) < 4:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()

    encoders = {int(line.split()[0]) for line in Path(encode.log).read_text().splitlines()}
    while any(is_running(encoder) for encoder in encoders) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_running(encoder) for encoder in encoders), "a worker outlived its parent"

    finished = {shard: shard.stat().st_mtime_ns for shard in cache.glob("*.arrow")}
    assert 4 <= len(finished) < 20
    (tmp_path / "log").unlink()
    prepared = run(file, cache, encode, workers=workers, block_bytes=10_000)
    assert {shard: shard.stat().st_mtime_ns for shard in finished} == finished
    blocks = len(list(cache.glob("*.arrow")))
    assert encode.rows_encoded() == pytest.approx(2000 * (1 - len(finished) / blocks), abs=150)
    assert samples_of(prepared) == samples_of(run(file, tmp_path / "fresh"))


def is_running(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process_id}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


def test_half_written_shards_of_killed_runs_are_swept_up(tmp_path):
    (tmp_path / "cache").mkdir()
    old, new = tmp_path / "cache/.a.1.tmp", tmp_path / "cache/.b.2.tmp"
    for leftover in (old, new):
        leftover.write_bytes(b"half")
    os.utime(old, (0, 0))
    run(write_rows(tmp_path / "x.jsonl", [chat("a", "b")]), tmp_path / "cache")
    assert not old.exists()
    assert new.exists()  # it may belong to a run that is alive


def test_a_cache_that_cannot_be_written(tmp_path):
    file = write_rows(tmp_path / "x.jsonl", [chat("a", "b")])
    (tmp_path / "occupied").write_text("")
    with pytest.raises(OutputError, match=r"occupied: prepared rows cannot be written here .*; .* set cache_dir"):
        run(file, tmp_path / "occupied")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "x.jsonl", [chat("a", "b")])
    (tmp_path / "cache").mkdir()
    path = tmp_path / "cache" / "shard.arrow"
    (tmp_path / "cache" / f".shard.arrow.{socket.gethostname()}.{os.getpid()}.tmp").symlink_to("/dev/full")
    from llmforge.data.blocks import read_blocks
    from llmforge.data.shards import encode_block

    with pytest.raises(OutputError, match="No space left on device"):
        encode_block(*read_blocks(file), path, RowLayout(), Bytes())
    assert list((tmp_path / "cache").iterdir()) == []


# ---- workers


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bug_in_an_encoder_surfaces_with_its_place(tmp_path, workers):
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(1000))
    with pytest.raises(KeyError, match="a bug") as error:
        run(file, tmp_path / "cache", broken, workers=workers, block_bytes=10_000)
    notes = "".join(error.value.__notes__)
    assert f"while encoding {file}, lines 1 to " in notes
    assert ("in a worker process" in notes) == (workers > 1)


def test_a_worker_that_dies_is_said_to_have_died(tmp_path):
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(1000))
    with pytest.raises(
        RunError, match="a worker process was ended by signal 9; if memory ran out, set a smaller data_workers"
    ):
        run(file, tmp_path / "cache", dies, workers=2, block_bytes=10_000)


def test_a_script_without_a_main_guard_may_use_workers(tmp_path):
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(1000))
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from pathlib import Path\n"
        "from test_data_prepare import Bytes, run\n"
        f"print(run({file!r}, Path({str(tmp_path / 'cache')!r}), workers=2, block_bytes=10_000).statistics.rows)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    output = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["started", "1000"]


def test_ctrl_c_ends_a_run_with_workers_at_once(tmp_path):
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(2000))
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    code = KILLED.replace("0.05", "5")
    process = subprocess.Popen(
        [sys.executable, "-c", code, file, str(tmp_path / "cache"), str(log), "2"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
    started = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 3
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1  # the parent's own; the workers say nothing
    assert not any(is_running(int(line.split()[0])) for line in log.read_text().splitlines())


def test_progress_counts_rows(tmp_path):
    seen = []
    run(
        write_rows(tmp_path / "x.jsonl", rows_of_words(1000)),
        tmp_path / "cache",
        block_bytes=10_000,
        progress=seen.append,
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1000
    assert len(seen) > 5


# ---- chunks, for executors that read a file in many places at once


@given(
    content=st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b'{"b": 1}\n', b"\xef\xbb\xbf", b"x" * 90]), max_size=40),
    block_bytes=st.sampled_from([1, 2, 7, 50, 2**22]),
    step_back=st.sampled_from([1, 5, 2**16]),
    longest=st.sampled_from([100, 2**26]),
)
def test_chunks_hold_the_blocks_of_a_file(content, block_bytes, step_back, longest):
    from llmforge.data import blocks

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "STEP_BACK", step_back)
        patch.setattr(blocks, "MAX_LINE_BYTES", longest)
        file = Path(directory, "x.jsonl")
        file.write_bytes(b"".join(content))
        count = blocks.count_chunks(str(file), block_bytes)
        try:
            expected = list(blocks.read_blocks(str(file), block_bytes))
        except DataError:
            with pytest.raises(DataError, match="one JSON object a line"):
                [blocks.read_chunk(str(file), number, block_bytes) for number in range(count)]
            return
        chunks = [blocks.read_chunk(str(file), number, block_bytes) for number in range(count)]
    found = [block for block in chunks if block is not None]
    assert [(block.content, block.digest) for block in found] == [(block.content, block.digest) for block in expected]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet", "https://host/x.jsonl"])
def test_files_that_must_be_read_from_their_start(name):
    from llmforge.data.blocks import count_chunks

    assert count_chunks(name) is None
