"""Downloads a model's files from the Hugging Face hub, with a sentence of its own for each reason why that fails.

Hub access follows the usual variables: `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`. Nothing is loaded here.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmforge.errors import ModelError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
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

    Args:
        key: the config key that names the repository, for errors.
        revision: branch, tag or commit.
        code: whether the repository's own Python files are wanted.
        pickles: names of pickle files that are wanted.
        weights: whether weights are wanted at all.

    Raises:
        ModelError: not logged in, no access, no such model, hub not reached, or no place for the files.
    """
    import httpx2  # huggingface_hub's HTTP client, whose errors come through
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        FileMetadataError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    endpoint = re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)  # without the password of a mirror
    files = [pattern for pattern in WANTED if weights or pattern != "*.safetensors"]
    wanted = [*files, *pickles] + ([CODE] if code else [])
    try:
        with _bars_only_on_terminals():
            return Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=list(UNWANTED))
            )
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
        raise ModelError(
            f"{key}: {repo_id} cannot be stored in the hub cache {constants.HF_HUB_CACHE} "
            f"({error.strerror or type(error).__name__}); free some space, or set HF_HOME to a directory that can be "
            "written to"
        ) from error


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
