"""Runs a command of ours as a Ray job, and follows it. The job lives on the cluster, whatever becomes of this process.

The job gets the working directory, zipped here, and the few environment variables that its config cannot do without.
"""

import asyncio
import fnmatch
import logging
import os
import shlex
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmforge.bucket import bucket_url
from llmforge.config import LoadedConfig, load_config, refuse_unavailable
from llmforge.config.section import RepoId
from llmforge.errors import ConfigError, InputError, Interrupted, RunError
from llmforge.jobs.ray_cluster import ADDRESS_VARIABLES, START, ray_address, require_answer, require_ray

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PACKAGE_LIMIT = 100 * 2**20  # bytes; Ray's job server takes no larger request
LEFT_OUT = (
    ".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", ".ipynb_checkpoints", ".cache", ".*_cache",
    ".hypothesis", "*.egg-info", ".env", "runs", "wandb", "mlruns",
)  # fmt: skip
STOP_SECONDS = 600  # time for a step to end and a checkpoint to be written
SECONDS_TO_START = 60
SECONDS_BETWEEN_LOOKS = 0.5
_READ_BYTES = 2**20

# What a config makes necessary → environment variables that go with the job where they are set.
_VARIABLES = {
    "hub": ("HF_TOKEN", "HF_ENDPOINT"),
    "s3": (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
    ),
    "wandb": ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT", "WANDB_MODE"),
    "mlflow": (
        "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    ),
    "trackio": ("HF_TOKEN",),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A job on a cluster; `address` is how the cluster was named, if it was."""

    id: str
    client: "JobSubmissionClient"
    address: str | None = None

    def details(self) -> "JobDetails":
        """Ask how the job stands. Raises RunError when the cluster does not answer."""
        try:
            return self.client.get_job_info(self.id)
        except (RuntimeError, OSError) as error:
            raise RunError(f"the Ray cluster does not say how {self.id} stands: {_last_line(error)}") from error

    def command(self, verb: str) -> str:
        """Return the command that does something with the job later."""
        address = [] if self.address is None else ["--address", self.address]
        return shlex.join(["llmforge", "anyscale", verb, self.id, *address])


def submit_finetune(
    config: Path | None,
    overrides: Sequence[str],
    default: bool,
    resume: str | None,
    flags: Sequence[str],
    *,
    address: str | None = None,
    exclude: Sequence[str] = (),
    variables: Sequence[str] = (),
    note: Callable[[str], None],
) -> Job:
    """Submit `llmforge anyscale finetune` with these options, in the working directory, once the config is checked.

    Args:
        variables: names of environment variables that the job gets, beside those that the config needs.
        note: is told what the job is called, and which variables go with it.

    Raises:
        InputError: the config is wrong or cannot run elsewhere; and what `submit` raises.
    """
    directory = Path.cwd()
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise InputError(f"--env {missing[0]}: this variable is not set here")
    if config is None:
        if resume is None or not (bucket_url(resume) or Path(resume).is_absolute()):
            raise InputError(f"--resume {resume}: a job runs elsewhere; give the absolute path of the run's directory")
        arguments = ["--resume", resume]
    else:
        loaded = load_config(config, overrides, default)
        refuse_unavailable(loaded)
        arguments = [check_config(loaded, directory), *(f"--set={override}" for override in overrides)]
        arguments += ["--default"] * default
        variables = [*needed_variables(loaded), *variables]
    names = sorted({name for name in variables if name in os.environ})
    job = submit(
        ["anyscale", "finetune", *arguments, *flags],
        address=address,
        directory=directory,
        exclude=exclude,
        variables=names,
    )
    note(f"submitted as {job.id}; it goes on when you press ctrl-C here. Watch it again: {job.command('logs')}")
    if names:
        note(f"goes with it from this environment, where the cluster's other users can read it: {', '.join(names)}")
    return job


def submit(
    arguments: Sequence[str],
    *,
    address: str | None = None,
    directory: Path,
    exclude: Sequence[str] = (),
    variables: Sequence[str] = (),
) -> Job:
    """Submit `llmforge ARGUMENTS` as a Ray job that runs in a copy of `directory`.

    Args:
        address: of the cluster; None means RAY_ADDRESS, or the cluster that runs on this machine.
        exclude: patterns of names or of relative paths that stay out of the copy, beside `LEFT_OUT`.
        variables: names of environment variables that the job gets; those that are not set here are passed over.

    Raises:
        InputError: no cluster answers, it refuses, or the directory is larger than Ray takes.
    """
    client = _client(address)
    # On this machine, this Python; elsewhere, the one that the cluster's machines call python.
    is_here = address in (None, "auto") and not any(os.environ.get(name) for name in ADDRESS_VARIABLES)
    python = sys.executable if is_here else "python"
    environment = {name: os.environ[name] for name in variables if name in os.environ}
    # `llmforge anyscale stop` then works as ctrl-C does: the step ends and a checkpoint is written.
    environment |= {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary, "working_dir.zip")
        pack(directory, package, exclude)
        entrypoint = "exec " + shlex.join([python, "-m", "llmforge", *arguments])
        job_id = _submit(client, entrypoint, {"working_dir": str(package), "env_vars": environment})
    return Job(job_id, client, address)


def find_job(job_id: str, address: str | None = None) -> Job:
    """Find a job on a cluster. Raises InputError when no cluster answers or it knows no such job."""
    job = Job(job_id, _client(address), address)
    try:
        job.client.get_job_info(job_id)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            raise InputError(f"the cluster knows no job {job_id}; `ray job list` shows those it knows") from None
        raise InputError(f"the Ray cluster does not say what became of {job_id}: {_last_line(error)}") from error
    return job


def follow(job: Job, log: IO[str]) -> "JobDetails":
    """Write a job's log from its start until the job ends, and return how it ended.

    Raises:
        Interrupted: ctrl-C was pressed here; the job goes on.
        RunError: the cluster no longer answers.
    """
    import aiohttp

    try:
        asyncio.run(_copy_log(job, log))
        return _wait(job)
    except KeyboardInterrupt:
        raise Interrupted(
            f"no longer watching; {job.id} goes on.\n  watch it again: {job.command('logs')}\n"
            f"  how it stands:  {job.command('status')}\n  stop it:        {job.command('stop')}"
        ) from None
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise RunError(
            f"the Ray cluster stopped answering ({_last_line(error)}). The job may go on; watch it again: "
            f"{job.command('logs')}"
        ) from error


def stop(job: Job) -> bool:
    """Ask a job to stop after the step it is in, with a checkpoint; return False where it has ended already.

    It is killed if it has not ended after `STOP_SECONDS`. Raises RunError when the cluster does not answer.
    """
    try:
        return job.client.stop_job(job.id)
    except (RuntimeError, OSError) as error:
        raise RunError(f"the Ray cluster did not stop {job.id}: {_last_line(error)}") from error


def exit_code(details: "JobDetails") -> int:
    """Return what a command ends with that did what the job did: 0, 1 failed, 2 the input is wrong, 130 stopped."""
    match str(details.status):
        case "SUCCEEDED":
            return 0
        case "STOPPED":
            return Interrupted.exit_code
        case _:
            return details.driver_exit_code if details.driver_exit_code in (2, 130) else 1


def describe(details: "JobDetails") -> dict[str, Any]:
    """Return what is worth knowing of a job, for a person or as JSON; times in seconds since 1970."""
    return {
        "job_id": details.submission_id,
        "status": str(details.status),
        # Of a command that failed, the message repeats the log.
        "message": None if details.driver_exit_code else details.message,
        "exit_code": details.driver_exit_code,
        "command": details.entrypoint.removeprefix("exec "),
        "started": details.start_time and details.start_time / 1000,
        "ended": details.end_time and details.end_time / 1000,
    }


def check_config(loaded: LoadedConfig, directory: Path) -> str:
    """Check what a config must fulfil to run elsewhere; return its path as the job will know it.

    Raises ConfigError when it lies outside of `directory`, or would leave its run in the job's working directory.
    """
    path = loaded.path.resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ConfigError(
            f"{loaded.path} is outside of the working directory {directory}, which is what the job gets; run the "
            f"command in {path.parent} or above"
        )
    output = loaded.config.output_dir
    if "://" not in output and not output.startswith(("/", "~")):
        raise loaded.error(
            "output_dir",
            f"{output!r} would lie in the working directory of the job, which Ray deletes after it; set it to a place "
            "that stays, on storage that the cluster's machines share: --set output_dir=/mnt/cluster_storage/runs",
        )
    return path.relative_to(directory.resolve()).as_posix()


def needed_variables(loaded: LoadedConfig) -> list[str]:
    """Name the environment variables that a config may need where it runs: keys of the services that it uses."""
    config = loaded.config
    needs: set[str] = set() if config.logger is None else {config.logger.provider}
    initial = (config.initial_base_model_ckpt_path, config.initial_adapter_model_ckpt_path)
    places = [config.model_id, config.output_dir, config.cache_dir, *initial]
    for paths in (config.train_path, config.valid_path):
        places += [paths] if isinstance(paths, str) else paths or []
    for place in places:
        if isinstance(place, RepoId) or (isinstance(place, str) and place.startswith("hf://")):
            needs.add("hub")
        elif isinstance(place, str) and place.startswith(("s3://", "s3a://")):
            needs.add("s3")
    if "://" not in config.model_id and not (loaded.path.parent / Path(config.model_id).expanduser()).exists():
        needs.add("hub")
    return sorted({name for need in needs for name in _VARIABLES.get(need, ())})


def pack(directory: Path, package: Path, exclude: Sequence[str] = ()) -> None:
    """Zip the files of a directory, but for those that match `LEFT_OUT` or `exclude`.

    The same files make the same zip, so that Ray takes it once. Links to directories are not followed. Raises
    InputError when it would be larger than `PACKAGE_LIMIT`.
    """
    files = sorted(_files(directory, (*LEFT_OUT, *exclude)))
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.relative_to(directory).as_posix())
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (file.stat().st_mode & 0o777) << 16
            with open(file, "rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while piece := source.read(_READ_BYTES):
                    target.write(piece)
                    if package.stat().st_size > PACKAGE_LIMIT:
                        raise _too_large(directory, files)
    if package.stat().st_size > PACKAGE_LIMIT:
        raise _too_large(directory, files)


def _files(directory: Path, patterns: Sequence[str]) -> Iterator[Path]:
    def is_left_out(path: Path) -> bool:
        inside = path.relative_to(directory).as_posix()
        return any(fnmatch.fnmatch(path.name, pattern) or fnmatch.fnmatch(inside, pattern) for pattern in patterns)

    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not is_left_out(Path(folder, name))]
        for path in (Path(folder, name) for name in names):
            if path.is_file() and not is_left_out(path):
                yield path


def _too_large(directory: Path, files: Sequence[Path]) -> InputError:
    largest = sorted(((file.stat().st_size, file) for file in files), reverse=True)[:3]
    named = ", ".join(f"{file.relative_to(directory)} ({size / 1e6:,.0f} MB)" for size, file in largest)
    return InputError(
        f"the working directory {directory} is more than the {PACKAGE_LIMIT // 2**20} MB, zipped, that Ray takes with "
        f"a job; the largest of its files: {named}. Put data and models on storage that the cluster's machines share "
        "and give their absolute paths or URLs, and leave them out here: --exclude 'PATTERN'"
    )


def _client(address: str | None) -> "JobSubmissionClient":
    """Reach the job server of a cluster."""
    require_ray()
    given = address or next((os.environ[name] for name in reversed(ADDRESS_VARIABLES) if os.environ.get(name)), None)
    if given is not None:
        require_answer(given)
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        with ray_address(address):
            return JobSubmissionClient(address)
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        place = "no Ray cluster" if given is None else f"no job server of a Ray cluster at {given}"
        raise InputError(
            f"{place}: {_last_line(error)}; {START}. Jobs need Ray's dashboard (`pip install 'ray[default]'` where the "
            "cluster was started), by default at port 8265"
        ) from error


def _submit(client: "JobSubmissionClient", entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Submit a job; a cluster that has only just started is given the time to become ready."""
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint, runtime_env=runtime_env, metadata={"submitted_by": "llmforge"}
            )
        except (RuntimeError, ValueError, OSError) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise InputError(f"the Ray cluster did not take the job: {_last_line(error)}") from error
        time.sleep(SECONDS_BETWEEN_LOOKS)


async def _copy_log(job: Job, log: IO[str]) -> None:
    async for text in job.client.tail_job_logs(job.id):
        log.write(text)
        log.flush()


def _wait(job: Job) -> "JobDetails":
    """Wait for a job to end; its log ends a little sooner."""
    while True:
        details = job.client.get_job_info(job.id)
        if details.status.is_terminal():
            return details
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _last_line(error: BaseException) -> str:
    """Return the line of an error that says what happened; Ray passes on whole traces of its server."""
    lines = [line for line in str(error).replace("\\n", "\n").splitlines() if line.strip()]
    return lines[-1].strip(" .'\"}") if lines else type(error).__name__
