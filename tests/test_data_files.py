"""Finding and opening data files, and what each kind of wrong path says."""

import gzip
import json
import os
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmforge.data import RowLayout, RowProblem
from llmforge.data.blocks import read_blocks, read_rows
from llmforge.data.files import find_files, without_secrets
from llmforge.errors import DataError

ROW = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, with a config's directory `configs` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    return tmp_path


def write(path: Path, text: str = ROW) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def find(paths, relative_to="configs"):
    return find_files(paths, Path(relative_to))


def test_relative_to_the_config_first_then_to_the_working_directory(here):
    write(here / "both.jsonl")
    write(here / "configs/both.jsonl")
    write(here / "only_here.jsonl")
    assert find("both.jsonl") == ["configs/both.jsonl"]
    assert find("only_here.jsonl") == ["only_here.jsonl"]
    assert find(str(here / "both.jsonl")) == [str(here / "both.jsonl")]
    assert find(f"file://{here}/both.jsonl") == [str(here / "both.jsonl")]


def test_globs_are_sorted_and_lists_keep_their_order(here):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl"):
        write(here / "configs" / name)
    write(here / "z.jsonl")
    assert find(["../z.jsonl", "*.jsonl"]) == ["z.jsonl", "configs/a.jsonl", "configs/b.jsonl"]
    assert find("**/*.jsonl") == ["configs/a.jsonl", "configs/b.jsonl", "configs/deep/er/c.jsonl"]


def test_a_name_with_brackets_is_a_name(here):
    write(here / "data[1].jsonl")
    assert find("data[1].jsonl") == ["data[1].jsonl"]


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        ("missing.jsonl", ["missing.jsonl", "does not exist", "configs/missing.jsonl", ".parquet"]),
        ("no/such/dir/x.jsonl", ["does not exist"]),
        ("q*.jsonl", ["no file matches this glob"]),
        ("empty.jsonl", ["empty.jsonl", "is empty"]),
        ("table.csv", ["'.csv'", ".jsonl", ".parquet"]),
        ("README", ["ending ''"]),
        ("folder", ["is a directory", "folder/*.jsonl"]),
        ([], ["empty list"]),
        (["x.jsonl", "./x.jsonl"], ["given twice", "'./x.jsonl'"]),
        ("x" * 5000 + ".jsonl", ["does not exist"]),
        ("ftpx://host/x.jsonl", ["ftpx://", "s3://"]),
    ],
)
def test_what_cannot_be_read_says_what_was_given_and_what_is_allowed(here, paths, says):
    write(here / "empty.jsonl", "")
    write(here / "table.csv")
    write(here / "README")
    write(here / "x.jsonl")
    (here / "folder").mkdir()
    with pytest.raises(DataError) as error:
        find(paths)
    for part in says:
        assert part in str(error.value)


@pytest.mark.usefixtures("permissions_bind")
def test_no_permission(here):
    write(here / "x.jsonl").chmod(0)
    with pytest.raises(DataError, match=r"x\.jsonl: no permission to read this file"):
        find("x.jsonl")
    write(here / "closed/x.jsonl")
    (here / "closed").chmod(0)
    with pytest.raises(DataError, match="no permission"):
        find("closed/x.jsonl")
    (here / "closed").chmod(0o700)


def test_urls_go_through_fsspec(here):
    memory = fsspec.filesystem("memory")
    for name in ("/urls/b.jsonl", "/urls/a.jsonl"):
        memory.pipe(name, ROW.encode())
    memory.pipe("/urls/empty.jsonl", b"")
    assert find("memory://urls/[ab].jsonl") == ["memory:///urls/a.jsonl", "memory:///urls/b.jsonl"]
    (row,) = read_rows(find("memory://urls/a.jsonl"), RowLayout())
    assert row.content == json.loads(ROW)
    for url, says in (
        ("memory://urls/c.jsonl", "does not exist"),
        ("memory://urls/*.parquet", "no file matches"),
        ("memory://urls/empty.jsonl", "is empty"),
        ("memory://urls", "is a directory"),
    ):
        with pytest.raises(DataError, match=says):
            find(url)


@pytest.mark.parametrize(
    ("url", "module", "extra"), [("s3://b/x.jsonl", "s3fs", "s3"), ("gs://b/x.jsonl", "gcsfs", "gcs")]
)
def test_a_missing_package_names_the_extra(here, monkeypatch, url, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url[:2], raising=False)
    with pytest.raises(DataError, match=rf"pip install 'llmforge\[{extra}\]'"):
        find(url)


def test_a_url_that_cannot_be_reached_keeps_its_secret(here):
    class Failing(fsspec.AbstractFileSystem):
        protocol = "failing"

        cachable = False

        def info(self, path, **options):
            raise ConnectionError(f"refused: {path}?signature=abc")

    fsspec.register_implementation("failing", Failing, clobber=True)
    with pytest.raises(DataError) as error:
        find("failing://me:pass@host/x.jsonl?signature=abc")
    assert "failing://host/x.jsonl" in str(error.value)
    assert "ConnectionError" in str(error.value)
    assert "abc" not in str(error.value)
    assert "pass" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing.jsonl?key=abc", "does not exist"),
        ("forbidden.jsonl?key=abc", "cannot be read: ClientResponseError: 403, message='Forbidden'"),
    ],
)
def test_web_servers(here, path, says):

    class Files(SimpleHTTPRequestHandler):
        def send_head(self):
            return self.send_error(403) if "forbidden" in self.path else super().send_head()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(DataError, match=says) as error:
            find(f"{url}/{path}")
        assert "abc" not in str(error.value)
        write(here / "x.jsonl", ROW * 3)
        assert len(list(read_rows(find(f"{url}/x.jsonl?key=abc"), RowLayout()))) == 3
        server.shutdown()
    with pytest.raises(DataError, match="cannot be read: ClientConnectorError"):
        find(f"{url}/y.jsonl")


def test_without_secrets_leaves_paths_alone():
    assert without_secrets("https://me:pw@host:80/a/b.jsonl?X-Amz-Signature=1#x") == "https://host:80/a/b.jsonl"
    assert without_secrets("a?b@c.jsonl") == "a?b@c.jsonl"


def test_compressed_files(here):
    with gzip.open(here / "x.jsonl.gz", "wb") as file:
        file.write(ROW.encode() * 1000)
    with pa.CompressedOutputStream(str(here / "x.jsonl.zst"), "zstd") as file:
        file.write(ROW.encode() * 1000)
    for name in ("x.jsonl.gz", "x.jsonl.zst"):
        rows = list(read_rows(find(name), RowLayout()))
        assert [row.line for row in rows] == list(range(1, 1001))
        assert rows[-1].content == json.loads(ROW)


def test_damaged_files_say_so(here):
    whole = gzip.compress(os.urandom(100_000))
    (here / "cut.jsonl.gz").write_bytes(whole[:50_000])
    (here / "plain.jsonl.gz").write_text(ROW)
    (here / "plain.jsonl.zst").write_text(ROW)
    (here / "plain.parquet").write_text(ROW)
    pq.write_table(pa.table({"text": ["a" * 10_000]}), here / "cut.parquet")
    (here / "cut.parquet").write_bytes((here / "cut.parquet").read_bytes()[:-20])
    for name in ("cut.jsonl.gz", "plain.jsonl.gz", "plain.jsonl.zst", "plain.parquet", "cut.parquet"):
        with pytest.raises(DataError, match=rf"{name}: (damaged|cannot be read)"):
            list(read_blocks(*find(name)))


def test_blocks_are_cut_at_newlines_and_nothing_is_lost(here):
    text = "".join(
        f'{{"text": "{"x" * (n * 7 % 90)}"}}' + ("\r\n" if n % 3 else "\n") + "\n" * (n % 2) for n in range(300)
    )
    write(here / "x.jsonl", text.rstrip("\n"))
    for block_bytes in (1, 50, 1000, 10**6):
        blocks = list(read_blocks("x.jsonl", block_bytes))
        assert b"".join(block.content for block in blocks) == (here / "x.jsonl").read_bytes()
        line = 1
        for block in blocks:
            assert block.first_line == line
            line += block.content.count(b"\n")


def test_blocks_of_a_file_that_grew_stay_the_same(here):
    write(here / "x.jsonl", ROW * 500)
    before = [block.digest for block in read_blocks("x.jsonl", 10_000)]
    write(here / "x.jsonl", ROW * 900)
    after = [block.digest for block in read_blocks("x.jsonl", 10_000)]
    assert after[: len(before) - 1] == before[:-1]
    assert len(after) > len(before)


def test_a_line_beyond_all_measure_is_an_error(here, monkeypatch):
    monkeypatch.setattr("llmforge.data.blocks.MAX_LINE_BYTES", 2 * 2**20)
    write(here / "x.jsonl", ROW * 3 + "x" * (3 * 2**20))
    with pytest.raises(DataError, match=r"x\.jsonl:4: this line is longer than 2 MB"):
        list(read_blocks("x.jsonl", 2**20))


def test_what_files_may_begin_and_end_with(here):
    layout = RowLayout("text", needs_assistant=False)
    row = b'{"text": "\xc3\xa9\xe2\x80\xa8"}'  # U+2028 is no line break here
    (here / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n" + row + b"\n  \n" + b'{"text": "\xff"}\n' + row)
    rows = list(read_rows(["x.jsonl"], layout))
    assert [row.line for row in rows] == [1, 3, 5, 6]
    for good in (rows[0], rows[1], rows[3]):
        assert good.content == {"messages": [{"role": "user", "content": "é\u2028"}]}
    assert rows[2].content == RowProblem("not UTF-8: byte 0xff at position 11, expected UTF-8 text")


def test_a_file_with_only_a_byte_order_mark_has_no_blocks_with_rows(here):
    (here / "x.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert list(read_rows(["x.jsonl"], RowLayout())) == []
