"""Downloads a model's files from the Hugging Face hub, with a sentence of its own for each reason why that fails.

Hub access follows the usual variables: `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`. Nothing is loaded here.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from llmforge.errors import DownloadInterrupted, ModelError
from llmforge.models.hub_cache import fetch_weights, new_blobs_checked, remove_stale, wrong_length

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

WANTED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
WEIGHTS = "*.safetensors"
CODE = "*.py"
# The same weights once more, in the shape of another program.
UNWANTED = ("*/*", "consolidated*.safetensors")


def download(
    repo_id: str,
    *,
    key: str,
    revision: str | None = None,
    code: bool = False,
    pickles: Sequence[str] = (),
    weights: bool = True,
) -> Path:
    """Download a repository's config, tokenizer and safetensors weights; return the local snapshot.

    What comes is checked against the hashes that the hub announces.

    Args:
        key: the config key that names the repository, for errors.
        revision: branch, tag or commit.
        code: whether the repository's own Python files are wanted.
        pickles: names of pickle files that are wanted.
        weights: whether weights are wanted at all.

    Raises:
        ModelError: not logged in, no access, no such model, hub not reached, damaged on the way, or no place for the
            files.
        DownloadInterrupted: ctrl-C.
    """
    import httpx2  # huggingface_hub's HTTP client, whose errors come through
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        FileMetadataError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    endpoint = re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)  # without the password of a mirror
    small = [*WANTED, *([CODE] if code else [])]
    large = [WEIGHTS, *pickles] if weights else []
    try:
        with _bars_only_on_terminals():
            return _until_interrupted(lambda: _snapshot(repo_id, revision, small, large, key))
    except ModelError:  # one of the ValueErrors, and has its own sentence
        raise
    except HfHubHTTPError as error:
        raise ModelError(f"{key}: {_refusal(repo_id, revision, error, endpoint)}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.HTTPError, httpx2.InvalidURL) as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise ModelError(f"{key}: {_refusal(repo_id, revision, error.__cause__, endpoint)}") from error
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{key}: {repo_id} is not a local path, its files are not all in the hub cache "
                f"({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to download them. Unset HF_HUB_OFFLINE, or "
                "give a local directory"
            ) from error
        if isinstance(error, httpx2.TransportError) and not isinstance(
            error, httpx2.ConnectError | httpx2.ConnectTimeout
        ):
            raise ModelError(
                f"{key}: the connection to {endpoint} was lost while files of {repo_id} were downloaded; run again, "
                "and files that are whole are kept"
            ) from error
        raise ModelError(
            f"{key}: {repo_id} is not a local path, and the hub at {endpoint} cannot be reached to download it. Check "
            "the network, set HF_ENDPOINT to a mirror, or give a local directory or .gguf file"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{key}: {repo_id} is neither a local path nor a possible hub id such as org/name") from error
    except (AssertionError, FileMetadataError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{key}: {endpoint} does not answer as a model hub does; set HF_ENDPOINT to the address of a hub or of a "
            "mirror, or unset it"
        ) from error
    except OSError as error:
        if error.errno is None and "Consistency check" in str(error):  # huggingface_hub has no class for it
            raise ModelError(f"{key}: {wrong_length(f'a file of {repo_id}')}") from error
        raise ModelError(
            f"{key}: {repo_id} cannot be stored in the hub cache {constants.HF_HUB_CACHE} "
            f"({error.strerror or type(error).__name__}); free some space, or set HF_HOME to a directory that can be "
            "written to"
        ) from error


def _snapshot(repo_id: str, revision: str | None, small: list[str], large: list[str], key: str) -> Path:
    """Download a revision: the small files, then the large ones, so that those can be continued, then the rest."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined] # exported lazily

    remove_stale(repo_id)
    unwanted = list(UNWANTED)
    with new_blobs_checked(repo_id, key=key):
        snapshot = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=small, ignore_patterns=[*unwanted, *large])
        )
    if not large:
        return snapshot
    try:
        names = [file.path for file in get_cached_repo_tree(repo_id, revision=snapshot.name)]
    except CachedRepoTreeNotFoundError:  # from the cache of an older huggingface_hub, and the hub is not there
        names = []
    weights = list(filter_repo_objects(names, allow_patterns=large, ignore_patterns=unwanted))
    fetch_weights(repo_id, snapshot, weights, key=key)
    with new_blobs_checked(repo_id, key=key):
        return Path(
            snapshot_download(
                repo_id, revision=snapshot.name, allow_patterns=[*small, *large], ignore_patterns=unwanted
            )
        )


def _until_interrupted(work: Callable[[], Path]) -> Path:
    """Do some work in a thread, for ctrl-C: huggingface_hub would wait for the whole of each file before it ends.

    Raises:
        DownloadInterrupted: ctrl-C; the work goes on until the program ends.
    """
    outcome: Future[Path] = Future()

    def do() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=do, daemon=True).start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        raise DownloadInterrupted("interrupted; files that are complete stay in the cache") from None


def _refusal(repo_id: str, revision: str | None, error: "HfHubHTTPError", endpoint: str) -> str:
    """Say why the hub does not give the files, and what to change."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = error.response.status_code
    page = f"{endpoint}/{repo_id}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision or 'main'} ({status}); {page}/tree/main lists what it has"
    if status == 401 and get_token() is not None:
        return (
            f"the hub does not accept the access token that it was given for {repo_id} (401). Set HF_TOKEN to a valid "
            f"one of an account that may read it; {page} is where to ask for access"
        )
    if status == 401:
        return (
            f"the hub does not show {repo_id} to strangers (401): it is gated or private, or its name is wrong. Check "
            f"the name, ask for access on {page}, and set HF_TOKEN to an access token of your account"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated and your account has no access yet (403). Ask for it on {page}; HF_TOKEN has to be an "
            "access token of the account that gets it"
        )
    if status == 403:
        return (
            f"the access token that is set may not read {repo_id} (403). Set HF_TOKEN to one with the permission to "
            "read this repository"
        )
    if status == 404:
        return (
            f"{repo_id} is not a local path, and there is no model of that name on {endpoint} (404). Check its name; "
            "a private one needs an access token in HF_TOKEN"
        )
    return f"the hub at {endpoint} answered {status} for {repo_id}; try again later, or give a local directory"


@contextmanager
def _bars_only_on_terminals() -> Iterator[None]:
    """Keep the download's progress bars, which move the cursor, out of pipes and log files."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
