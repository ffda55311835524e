"""Rows encoded on a Ray cluster: the same as those encoded here, whoever dies on the way."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmforge.errors import DataError, OutputError, RunError
from test_data_prepare import Bytes, broken, dies, is_running, rows_of_words, run, samples_of, write_rows

COLUMNS = ("row_file", "row_line", "sample_row", "sample_shard", "sample_index", "lengths", "trained_tokens")


@pytest.fixture(scope="module")
def on_ray(ray_cluster):
    """Prepare as `run` does, with this process connected to the cluster."""
    from llmforge.jobs import ray_rows
    from llmforge.jobs.ray_cluster import connected
    from llmforge.jobs.ray_rows import encode_on_cluster

    def prepare(files, cache, encode=None, **options):
        return run(files, cache, encode, **{"workers": 2, "executor": encode_on_cluster, **options})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setattr(ray_rows, "MINUTES_WITHOUT_PROGRESS", 3)  # so that a test that hangs says what it waits for
        with connected(ray_cluster["address"], note=print):
            yield prepare


def test_the_result_is_that_of_this_machine(tmp_path, on_ray):
    rows = rows_of_words(1500)
    texts = [json.dumps(row) for row in rows]
    texts[700] = ""
    texts[701] = "{"
    plain = tmp_path / "x.jsonl"
    plain.write_text("\ufeff" + "\n".join(texts))  # no newline at its end
    packed = tmp_path / "y.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows_of_words(900)).encode()))
    pq.write_table(pa.Table.from_pylist(rows[:700]), tmp_path / "z.parquet", row_group_size=300)
    files = [str(plain), str(packed), str(tmp_path / "z.parquet")]
    for chosen in (files[:1], files):
        options = {"on_bad_row": "skip", "block_bytes": 10_000}
        here = run(chosen, tmp_path / f"here{len(chosen)}", **options)
        there = on_ray(chosen, tmp_path / f"there{len(chosen)}", **options)
        for column in COLUMNS:
            assert np.array_equal(getattr(here, column), getattr(there, column)), column
        assert (here.content_hash, here.files, here.reasons) == (there.content_hash, there.files, there.reasons)
        assert [shard.name for shard in here.shards] == [shard.name for shard in there.shards]
        for shard, other in zip(here.shards, there.shards, strict=True):
            assert shard.read_bytes() == other.read_bytes()
        assert samples_of(here) == samples_of(there)
        assert not list((tmp_path / f"there{len(chosen)}").glob(".*"))


def test_a_second_run_encodes_nothing(tmp_path, on_ray):
    encode = Bytes(str(tmp_path / "log"))
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(1000))
    run(file, tmp_path / "cache", block_bytes=10_000)
    assert on_ray(file, tmp_path / "cache", encode, block_bytes=10_000).statistics.rows == 1000
    assert encode.rows_encoded() == 0


def test_few_rows_are_encoded_by_this_process(tmp_path, on_ray):
    encode = Bytes(str(tmp_path / "log"))
    on_ray(write_rows(tmp_path / "x.jsonl", rows_of_words(20)), tmp_path / "cache", encode)
    assert {int(line.split()[0]) for line in Path(encode.log).read_text().splitlines()} == {os.getpid()}


def test_the_first_bad_row_is_the_first_in_the_file(tmp_path, on_ray):
    rows = [json.dumps(row) for row in rows_of_words(1000)]
    for number in (400, 402, 900):
        rows[number - 1] = "{"
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError) as error:
        on_ray(str(tmp_path / "x.jsonl"), tmp_path / "cache", block_bytes=10_000)
    assert (error.value.file, error.value.line) == (str(tmp_path / "x.jsonl"), 400)


def test_a_file_that_breaks_off_is_named(tmp_path, on_ray):
    content = gzip.compress("\n".join(json.dumps(row) for row in rows_of_words(2000)).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: damaged or cut short"):
        on_ray(str(tmp_path / "x.jsonl.gz"), tmp_path / "cache", block_bytes=10_000)


def test_a_bug_in_an_encoder_surfaces_with_its_place(tmp_path, on_ray):
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(1000))
    with pytest.raises(KeyError, match="a bug") as error:
        on_ray(file, tmp_path / "cache", broken, block_bytes=10_000)
    assert f"while encoding {file}, lines 1 to " in "".join(error.value.__notes__)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a path that means another place in each process")
def test_a_cache_that_nodes_do_not_share(tmp_path, on_ray, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(1000))
    with pytest.raises(OutputError, match=r"the node \S+ of the Ray cluster does not share .* set cache_dir to"):
        on_ray(file, Path("/proc/self/cwd/cache"), block_bytes=10_000)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cluster_that_stands_still_is_given_up(tmp_path, on_ray, monkeypatch):
    import ray

    from llmforge.jobs import ray_rows

    if not ray_rows._STANDSTILL:
        pytest.skip("this Ray waits for ever")
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(1000))
    group = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])  # all that there is
    try:
        ray.get(group.ready(), timeout=150)  # until what the tests before had is free
        with monkeypatch.context() as patch:
            patch.setattr(ray_rows, "MINUTES_WITHOUT_PROGRESS", 0.05)
            with pytest.raises(RunError, match=r"has encoded nothing for 0\.05 minutes"):
                on_ray(file, tmp_path / "cache", block_bytes=10_000)
    finally:
        ray.util.remove_placement_group(group)
    assert on_ray(file, tmp_path / "cache", block_bytes=10_000).statistics.rows == 1000


KILLED = """
import sys
from pathlib import Path
from llmforge.jobs.ray_cluster import connected
from test_data_prepare import Bytes, run
with connected(sys.argv[1], note=print):
    from llmforge.jobs.ray_rows import encode_on_cluster
    options = {"block_bytes": 10_000, "executor": encode_on_cluster, "workers": 2}
    run(sys.argv[2], Path(sys.argv[3]), Bytes(sys.argv[4], 0.3), **options)
"""


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, on_ray, ray_cluster):
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(3000))
    encode, cache = Bytes(str(tmp_path / "log")), tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, ray_cluster["address"], file, str(cache), encode.log], env=environment
    )
    wait_for(lambda: len(list(cache.glob("*.arrow"))) >= 4, process)
    process.kill()
    process.wait()
    encoders = {int(line.split()[0]) for line in Path(encode.log).read_text().splitlines()}
    assert process.pid not in encoders
    wait_for(lambda: not any(map(is_running, encoders)))

    finished = {shard: shard.stat().st_mtime_ns for shard in cache.glob("*.arrow")}
    (tmp_path / "log").unlink()
    prepared = on_ray(file, cache, encode, block_bytes=10_000)
    assert {shard: shard.stat().st_mtime_ns for shard in finished} == finished
    blocks = len(list(cache.glob("*.arrow")))
    assert 4 <= len(finished) < blocks
    assert encode.rows_encoded() == pytest.approx(3000 * (1 - len(finished) / blocks), abs=150)
    assert samples_of(prepared) == samples_of(run(file, tmp_path / "fresh"))


def test_a_process_that_is_killed_is_replaced(tmp_path, on_ray):
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(2000))
    encode = Bytes(str(tmp_path / "log"), 0.1, bytes(2**20))
    killed = []

    def kill_one():
        wait_for(lambda: len(list((tmp_path / "cache").glob("*.arrow"))) >= 2)
        killed.append(int(Path(encode.log).read_text().split()[0]))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    prepared = on_ray(file, tmp_path / "cache", encode, block_bytes=10_000)
    thread.join()
    assert killed
    assert killed[0] != os.getpid()
    assert samples_of(prepared) == samples_of(run(file, tmp_path / "fresh"))


def test_a_process_that_always_dies_is_given_up(tmp_path, on_ray, monkeypatch):
    monkeypatch.setattr("llmforge.jobs.ray_rows.RETRIES", 0)
    file = write_rows(tmp_path / "x.jsonl", rows_of_words(1000))
    with pytest.raises(RunError, match=r"died while they encoded rows .* set a smaller data_workers"):
        on_ray(file, tmp_path / "cache", dies, block_bytes=10_000)


def wait_for(condition, process=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "it ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.02)
