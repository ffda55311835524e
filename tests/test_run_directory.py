"""The run directory, atomic writing, and what happens where nothing can be written."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmforge.atomic import atomic_directory, restore_replaced, write_atomically
from llmforge.errors import InputError, OutputError
from llmforge.jobs.run_directory import RunDirectory, safe_name


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("meta-llama/Llama-3-8B:alice:kfwqz", "meta-llama--Llama-3-8B-alice-kfwqz"),
        ("my run #3", "my_run__3"),
        ("../../etc/passwd", "etc--passwd"),
        ("./models/tiny:bob:abcde", "models--tiny-bob-abcde"),
        ("--rf", "rf"),
        ("naïve-模型", "naïve-模型"),
    ],
)
def test_a_tag_becomes_one_safe_path_component(tag: str, name: str) -> None:
    assert safe_name(tag) == name


@pytest.mark.parametrize("tag", ["", "..", "...", "/", "::", "x" * 201, "é" * 101])
def test_a_tag_that_cannot_name_a_directory_is_refused(tag: str) -> None:
    with pytest.raises(InputError, match="custom_model_tag"):
        safe_name(tag)


@given(st.text(max_size=60))
def test_no_tag_escapes_its_directory(tag: str) -> None:
    try:
        name = safe_name(tag)
    except InputError:
        return
    place = Path("/runs") / name
    assert Path(os.path.normpath(place)).parent == Path("/runs")
    assert not name.startswith((".", "-"))
    assert "\0" not in name


def test_create_makes_the_directory_and_open_finds_it_again(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a" / "runs", "org/m:al:abcde")
    assert run.path == tmp_path / "a" / "runs" / "org--m-al-abcde"
    assert list(run.path.iterdir()) == []
    run.config.write_text("model_id: m\n")
    assert RunDirectory.open(run.path) == run
    assert (run.resolved_config.name, run.manifest.name, run.events.name, run.rows.name) == (
        "resolved_config.yaml",
        "manifest.json",
        "events.jsonl",
        "rows.jsonl",
    )
    assert (run.checkpoints.name, run.artifact.name) == ("checkpoints", "artifact")


def test_create_accepts_an_empty_directory_and_refuses_another_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    run = RunDirectory.create(tmp_path, "mine")
    run.config.write_text("")
    with pytest.raises(OutputError, match=r"already holds a run.*--resume .*mine.*custom_model_tag"):
        RunDirectory.create(tmp_path, "mine")


def test_create_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(OutputError, match=r"runs is a file.*output_dir"):
        RunDirectory.create(tmp_path / "runs", "mine")
    with pytest.raises(OutputError, match=r"runs is a file.*output_dir"):
        RunDirectory.create(tmp_path / "runs" / "deeper", "mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="broken link"):
        RunDirectory.create(tmp_path / "link", "mine")


@pytest.mark.usefixtures("permissions_bind")
def test_create_refuses_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="not writable"):
            RunDirectory.create(tmp_path, "mine")
    finally:
        tmp_path.chmod(0o700)


def test_open_says_what_is_wrong_and_which_runs_there_are(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "one")
    run.config.write_text("")
    run.artifact.mkdir()
    with pytest.raises(InputError, match=r"two does not exist.*there are .*one"):
        RunDirectory.open(tmp_path / "two")
    with pytest.raises(InputError, match=r"artifact lies inside a run.*one"):
        RunDirectory.open(run.artifact)
    with pytest.raises(InputError, match=r"not the directory of a run.*there are .*one"):
        RunDirectory.open(tmp_path)
    with pytest.raises(InputError, match="lies inside a run"):
        RunDirectory.open(run.config)


def test_free_space_is_required_with_numbers(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "mine")
    run.require_free_space(1)
    with pytest.raises(OutputError, match=r"needs 1,000,000,000.0 GB .*mine.* has .* free; .*output_dir"):
        run.require_free_space(10**18)


# Locks a run, says so, and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from llmforge.jobs.run_directory import RunDirectory

with RunDirectory(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_who_has_it_and_goes_with_the_process(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=rf"being trained by process {holder.pid} on .*"), run.lock():
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    with run.lock(), pytest.raises(OutputError, match=rf"process {os.getpid()} on"), run.lock():
        pass
    assert list(tmp_path.iterdir()) == []


def test_never_do_two_have_the_lock(tmp_path: Path) -> None:
    run, holding, had = RunDirectory(tmp_path), [0], [0]

    def compete() -> None:
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            with contextlib.suppress(OutputError), run.lock():
                holding[0] += 1
                time.sleep(0)  # lets another thread run
                assert holding[0] == 1
                holding[0] -= 1
                had[0] += 1

    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(compete) for _ in range(6)]:
            done.result()
    assert had[0] > 10
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunDirectory(tmp_path).lock():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_reader_leaves_a_run_at_work_alone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "mine")
    run.config.write_text("")
    replaced = run.path / ".artifact.replaced"
    replaced.mkdir()
    with run.lock():  # its holder may be between the two renames
        RunDirectory.open(run.path)
        assert replaced.is_dir()
    RunDirectory.open(run.path)
    assert not replaced.exists()
    assert run.artifact.is_dir()


def test_what_a_kill_left_before_there_is_anything_to_continue_is_no_run(tmp_path: Path) -> None:
    """Kill a start behind each of its files: the same command must go on, and not tell a person to tidy up."""
    run = RunDirectory.create(tmp_path, "mine")
    for path in (run.path / "run.lock", run.manifest, run.config, run.rows):
        path.write_text("process 1 on nowhere\n")
        half_written = run.path / f".{path.name}.1a2b3c4d.partial"
        half_written.write_text("hal")
        assert RunDirectory.create(tmp_path, "mine") == run
    with run.lock():
        assert list(run.path.glob(".*")) == []
    RunDirectory.check(tmp_path, "mine")
    run.resolved_config.write_text("")
    with pytest.raises(OutputError, match="already holds a run"):
        RunDirectory.check(tmp_path, "mine")


def test_a_directory_of_the_users_own_is_taken(tmp_path: Path) -> None:
    for name, content in (("config.yaml", "mine"), (".notes", "mine"), (".notes.partial/x", "mine")):
        path = tmp_path / name.partition("/")[0].strip(".") / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
        with pytest.raises(OutputError, match="already holds a run"):
            RunDirectory.create(tmp_path, name.partition("/")[0].strip("."))
        assert path.read_text() == content


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    write_atomically(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
    with pytest.raises(OutputError):
        write_atomically(tmp_path / "f" / "g", "")


def test_atomic_directory_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "artifact"
    with atomic_directory(path) as partial:
        (partial / "old").write_text("1")
        assert partial.parent == path.parent
        assert not path.exists()
    with atomic_directory(path) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "new").write_text("2")
        assert (path / "old").exists()
    assert [str(entry.relative_to(path)) for entry in sorted(path.rglob("*"))] == ["sub", "sub/new"]
    assert [entry.name for entry in path.parent.iterdir()] == ["artifact"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_that_a_library_made_private_get_the_mode_of_new_files(umask: int, mode: int, tmp_path: Path) -> None:
    """Such as safetensors' own. Links keep pointing at what is not ours to change."""
    program = (
        "import os, sys\nfrom pathlib import Path\nimport numpy\nfrom safetensors.numpy import save_file\n"
        "from llmforge.atomic import atomic_directory\n"
        f"os.umask({umask})\n"
        "with atomic_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'sub').mkdir()\n"
        "    save_file({'a': numpy.zeros(3)}, partial / 'sub' / 'model.safetensors')\n"
        "    (partial / 'text').write_text('1')\n"
        "    (partial / 'script').touch(mode=0o700)\n"
        "    (partial / 'link').symlink_to(sys.argv[2])\n"
    )
    path, private = tmp_path / "artifact", tmp_path / "private"
    private.touch(mode=0o600)
    subprocess.run([sys.executable, "-c", program, str(path), str(private)], check=True)
    modes = {entry.name: entry.lstat().st_mode & 0o777 for entry in path.rglob("*") if entry.is_file()}
    assert modes == {"model.safetensors": mode, "text": mode, "script": mode | 0o100 | 0o600, "link": 0o777}
    assert private.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failed_block_leaves_the_old_directory(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "artifact"
    with atomic_directory(path) as partial:
        (partial / "old").write_text("1")

    def fail() -> None:
        with atomic_directory(path) as partial:
            (partial / "new").write_text("2")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]
    assert (path / "old").read_text() == "1"


def test_what_a_kill_left_is_swept_away_or_restored(tmp_path: Path) -> None:
    kill_before_the_last_rename = (
        "import os, sys\nfrom pathlib import Path\nfrom llmforge.atomic import atomic_directory\n"
        "rename = os.rename\n"
        "os.rename = lambda a, b: os._exit(9) if str(a).endswith('.partial') else rename(a, b)\n"
        "with atomic_directory(Path(sys.argv[1])) as partial:\n    (partial / 'new').write_text('2')\n"
    )
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "old").write_text("1")
    assert subprocess.run([sys.executable, "-c", kill_before_the_last_rename, str(path)]).returncode == 9
    assert not path.exists()
    restore_replaced(tmp_path)
    assert (path / "old").read_text() == "1"
    with atomic_directory(path) as partial:
        assert list(partial.iterdir()) == []
        (partial / "new").write_text("3")
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]
    assert (path / "new").read_text() == "3"


def test_a_full_disk_is_an_output_error_whoever_noticed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"full .*MB free.*output_dir"), atomic_directory(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OutputError, match="full"), atomic_directory(tmp_path / "a"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "a"):
        (tmp_path / "not there").read_text()


MOUNTED = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from llmforge.atomic import atomic_directory, write_atomically
from llmforge.errors import OutputError
from llmforge.jobs.run_directory import RunDirectory

disk = Path(sys.argv[1])
def attempt(do):
    try:
        do()
        print("written")
    except OutputError as error:
        print(error)

def fill():
    with atomic_directory(disk / "checkpoint") as partial:
        (partial / "weights").write_bytes(bytes(10**6))

if sys.argv[2] == "full":
    write_atomically(disk / "config", "small")
    attempt(lambda: write_atomically(disk / "config", bytes(10**6)))
    attempt(fill)
    print(sorted(path.name for path in disk.iterdir()), (disk / "config").read_text())
else:
    attempt(lambda: RunDirectory.create(disk / "runs", "mine"))
    attempt(lambda: write_atomically(disk / "config", "small"))
"""


@pytest.mark.parametrize(("options", "case"), [("size=256k", "full"), ("ro", "read-only")])
def test_a_real_full_or_read_only_disk(tmp_path: Path, options: str, case: str) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    script = f'mount -t tmpfs -o {options} none "$1" || exit 77; exec "$2" -c "$3" "$1" {case}'
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, MOUNTED],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0 and "llmforge" not in done.stderr:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    if case == "full":
        assert "full" in lines[0]
        assert "full" in lines[1]
        assert lines[2] == "['config'] small"
    else:
        assert all("read-only file system" in line for line in lines)
        assert len(lines) == 2
