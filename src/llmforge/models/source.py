"""Finds a model's files: a local directory, a GGUF file, a place in a bucket or a hub repository.

It checks them and loads no weights.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmforge.bucket import bucket_url, origin_of_copy
from llmforge.config import derive
from llmforge.errors import ModelError
from llmforge.models.bucket_models import download_from_bucket
from llmforge.models.hub import download

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16  # of a large file, for its hash
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    `name` is what the user wrote; `directory` holds config, tokenizer and weights, of which `gguf_file` is the only one
    where the model is still a GGUF file. `converted_from` is the GGUF file that the directory was made from.
    """

    name: str
    directory: Path
    gguf_file: str | None = None
    pickles: tuple[str, ...] = ()
    is_local: bool = True
    converted_from: Path | None = None

    @property
    def path(self) -> Path:
        """The directory or file that the user meant."""
        if self.gguf_file is not None:
            return self.directory / self.gguf_file
        return self.converted_from or self.directory

    @property
    def url(self) -> str | None:
        """The place in a bucket that the files were downloaded from; None where they came from elsewhere."""
        return bucket_url(self.name)

    @property
    def load_options(self) -> dict[str, Any]:
        """Give the keyword arguments that transformers' `from_pretrained` needs to read these files."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    def content_hash(self) -> str:
        """Hash names, sizes and samples of the files, for the manifest.

        Weights are gigabytes: of a large file, 64 pieces are read that lie evenly from its beginning, where a
        safetensors file names its tensors, to its end; fine-tuned weights differ from their base in all of them.
        """
        digest = hashlib.blake2b(digest_size=16)
        files = [self.path] if self.path.is_file() else sorted(self.directory.glob("*"))
        for path in files:
            if path.is_file() and path.suffix in {".json", ".safetensors", ".gguf", ".model", ".bin", ".jinja"}:
                size = path.stat().st_size
                digest.update(f"{path.name} {size}\n".encode())
                with path.open("rb") as file:
                    if size <= _SAMPLES * _SAMPLE_BYTES:
                        digest.update(file.read())
                        continue
                    for number in range(_SAMPLES):
                        file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                        digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def find_model(
    model_id: str,
    *,
    key: str = "model_id",
    relative_to: Path,
    revision: str | None = None,
    allow_pickle_weights: Sequence[str] = (),
    trust_remote_code: bool = False,
    weights: bool = True,
    cache_dir: Path | None = None,
) -> ModelSource:
    """Find a model's files, downloading them if `model_id` names a repository on the hub or a place in a bucket.

    Args:
        model_id: a directory, a `.gguf` file, either of them in a bucket, or a hub id such as `org/name`.
        key: the config key that the name came from, for errors.
        relative_to: the config file's directory; relative paths are looked for there, then in the working directory.
        revision: branch, tag or commit on the hub.
        allow_pickle_weights: names of pickle files that the config allows to be loaded.
        trust_remote_code: whether the repository's own Python files are wanted.
        weights: whether weights are wanted; without them a directory may hold a tokenizer alone.
        cache_dir: where files from buckets are kept; None is the platform's cache.

    Raises:
        ModelError: nothing usable is there; says what was found and what to change.
    """
    url, digest = bucket_url(model_id), None
    for directory in () if url else (relative_to, Path.cwd()):
        path = (directory / Path(model_id).expanduser()).resolve()
        if path.is_file():
            return _gguf_source(model_id, path, key)
        if path.is_dir():
            pickles = check_weights(path, key=key, allow_pickle_weights=allow_pickle_weights) if weights else ()
            return ModelSource(model_id, path, pickles=pickles)
    if url is None and (origin := origin_of_copy(Path(model_id))) is not None:
        url, digest = origin  # the copy of another machine, or one that was deleted
    if url is not None:
        path = download_from_bucket(
            url,
            key=key,
            cache_dir=cache_dir or Path(derive.cache_dir().value),
            code=trust_remote_code,
            pickles=allow_pickle_weights,
            weights=weights,
            digest=digest,
        )
        if path.is_file():
            return _gguf_source(model_id, path, key)
        pickles = check_weights(path, key=key, allow_pickle_weights=allow_pickle_weights) if weights else ()
        return ModelSource(model_id, path, pickles=pickles)
    if model_id.startswith((".", "/", "~")) or model_id.endswith(".gguf") or not HUB_ID.fullmatch(model_id):
        raise ModelError(
            f"{key}: there is no file or directory {model_id} (looked in {relative_to} and in the working directory). "
            "Give a local directory, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    directory = download(
        model_id,
        key=key,
        revision=revision,
        code=trust_remote_code,
        pickles=allow_pickle_weights,
        weights=weights,
    )
    pickles = check_weights(directory, key=key, allow_pickle_weights=allow_pickle_weights) if weights else ()
    return ModelSource(model_id, directory, pickles=pickles, is_local=False)


def _gguf_source(name: str, path: Path, key: str) -> ModelSource:
    if path.suffix != ".gguf":
        raise ModelError(f"{key}: {name} is a file; give a directory, a .gguf file or a hub id")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{key}: {name} is not a GGUF file (it does not begin with GGUF); download it again")
    return ModelSource(name, path.parent, gguf_file=path.name)


def check_weights(directory: Path, *, key: str, allow_pickle_weights: Sequence[str] = ()) -> tuple[str, ...]:
    """Check that a model directory holds a config and whole weight files; return the pickle files in use.

    Raises:
        ModelError: no config, no weights, missing or corrupt safetensors files, or pickles that are not allowed.
    """
    if not (directory / "config.json").is_file():
        if (directory / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"{key}: {directory} is an adapter, not a base model; give it as initial_adapter_model_ckpt_path and "
                "its base model as model_id"
            )
        raise ModelError(f"{key}: {directory} has no config.json; give the directory that save_pretrained wrote")
    _read_object(directory / "config.json", key)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        check_safetensors(_shards(index, key), key=key)
        return ()
    if (directory / "model.safetensors").is_file():
        check_safetensors([directory / "model.safetensors"], key=key)
        return ()
    if (directory / PICKLE).is_file():
        pickles = [PICKLE]
    elif (directory / PICKLE_INDEX).is_file():
        pickles = _shard_names(directory / PICKLE_INDEX, key)
    else:
        raise ModelError(
            f"{key}: {directory} has no weights; expected model.safetensors or model.safetensors.index.json, found "
            f"{', '.join(sorted(path.name for path in directory.iterdir())[:12]) or 'nothing'}. Give a directory that "
            f"has them. (Pickled ones, {PICKLE}, are taken only where allow_pickle_weights names them)"
        )
    refused = [name for name in pickles if name not in allow_pickle_weights]
    if refused:
        raise ModelError(
            f"{key}: the weights of {directory} are Python pickles ({', '.join(refused)}), which can run code when "
            "loaded. Convert them to safetensors (model.save_pretrained does), or, if you trust where they come from, "
            f"allow them by name: allow_pickle_weights: [{', '.join(refused)}]"
        )
    if pickles != [PICKLE]:
        _shards(directory / PICKLE_INDEX, key)  # from the hub they come only where they are allowed
    return tuple(pickles)


def _shard_names(index: Path, key: str) -> list[str]:
    """Give the names of the weight files in an index. Raises ModelError when it is damaged."""
    weight_map = _read_object(index, key).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{key}: {index} has no weight_map from tensors to files; copy or download the model again")
    return sorted(set(weight_map.values()))


def _shards(index: Path, key: str) -> list[Path]:
    """Give the weight files that an index names. Raises ModelError when one is missing or the index is damaged."""
    names = _shard_names(index, key)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{key}: {index.parent} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:5])}; "
            "copy or download the model again"
        )
    return [index.parent / name for name in names]


def _read_object(path: Path, key: str) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError, with the line, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{key}: {path}:{error.lineno}: not valid JSON ({error.msg}); copy or download it again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{key}: {path} cannot be read ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{key}: {path} holds no JSON object; copy or download it again")
    return content


def check_safetensors(paths: Iterable[Path], *, key: str) -> None:
    """Check that each file's header is whole and that the file is as long as the header says.

    Raises:
        ModelError: a file is truncated or is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    for path in paths:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{key}: {path} is not a whole safetensors file ({error}); copy or download it again"
            ) from error


def check_adapter(directory: Path, key: str = "initial_adapter_model_ckpt_path") -> None:
    """Check that a directory holds a whole PEFT adapter, before any weights load.

    Raises:
        ModelError: files are missing or damaged.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise ModelError(f"{key}: {directory} has no {name}; give a directory that PEFT's save_pretrained wrote")
    _read_object(directory / ADAPTER_CONFIG, key)
    check_safetensors([directory / ADAPTER_WEIGHTS], key=key)
