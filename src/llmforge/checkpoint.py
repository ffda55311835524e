"""Saves and restores training state, so that a resumed run equals one that never stopped.

A checkpoint is a directory `step-NNNNNN` of safetensors and JSON, no pickles. It holds what changes during training and
cannot be computed again: trainable parameters, optimizer state and the step. Data order, learning rate and random
numbers are functions of the step. Where ranks hold parts of the parameters (DTensors), each writes its own, by
torch.distributed.checkpoint in its safetensors format; any number of ranks can read them, one included.

`state.json` is written last, and holds the size and a checksum of every other file and of itself. A checkpoint is read
against them before it is used. One that a disk or a copy has damaged is moved aside, to `.step-NNNNNN.damaged`, and the
one before it is used; nothing here deletes it.
"""

import copy
import errno
import json
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmforge.atomic import atomic_directory, output_error, partial_name
from llmforge.errors import NonFiniteLossError, RunError

STATE = "state.json"
NAME = re.compile(r"step-(\d{6,})")
_PARAMETERS, _OPTIMIZER = "parameters.safetensors", "optimizer.safetensors"
_DAMAGED = ".damaged"
_KEPT_TO_RESUME = 2  # the last one, and the one before it should the last be damaged
_READ_AT_ONCE = 1 << 22  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint.

    `metrics` is empty where the run has no validation data; `only_to_resume` marks one written because the run was
    interrupted, which an uninterrupted run would not have; `matmul` is how fp32 matrices were multiplied
    (`models/arithmetic.py`).
    """

    step: int
    path: Path
    metrics: dict[str, float]
    only_to_resume: bool = False
    matmul: str | None = None


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: trainable parameters by name, and the optimizer's values under `name/key`.

    Tensors are whole, or DTensors, of which this rank has its part; `scalars` are what is no tensor. `is_copy` says
    that training does not go on in these very tensors.
    """

    parameters: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    scalars: Mapping[str, Any]
    is_copy: bool = False

    @property
    def in_parts(self) -> bool:
        """Whether each rank has only its part."""
        return any(_is_part(tensor) for tensor in self.parameters.values())

    @property
    def bytes_here(self) -> int:
        """The bytes that this rank has."""
        return sum(_local(t).numel() * t.element_size() for t in (*self.parameters.values(), *self.optimizer.values()))

    def copy(self) -> "State":
        """Copy it to the host's memory."""
        if self.is_copy:
            return self
        parameters, optimizer = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (self.parameters, self.optimizer)
        )
        return State(parameters, optimizer, copy.deepcopy(dict(self.scalars)), is_copy=True)


Total = Callable[[float], float]
"""Sums a number over all ranks, and waits for them."""


class _Damage(Exception):  # noqa: N818 - found and reported, never raised to a caller
    """What is wrong with a checkpoint, in words."""


def check_finite(state: State, step: int, total: Total) -> None:
    """Raise NonFiniteLossError where a parameter is NaN or infinite: such a state is not to be kept."""
    broken = next((name for name, t in state.parameters.items() if not torch.isfinite(_local(t)).all()), None)
    if total(float(broken is not None)):
        raise NonFiniteLossError(
            f"the update of step {step} made {broken or 'a parameter'} NaN or infinite, and no checkpoint was written "
            "of it. Lower learning_rate; the run's last checkpoint is from before it"
        )


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    state: State,
    metrics: dict[str, float],
    only_to_resume: bool = False,
    rank: int = 0,
    total: Total = float,
    group: Any = None,
) -> Checkpoint:
    """Write the state after `step` updates to `directory/step-NNNNNN`, in one piece or not at all.

    Every rank that has a part of the state calls it; the first one writes what is whole, each writes its parts.

    Args:
        total: sums over those ranks, and waits for them.
        group: their process group for writing parts; None is the one that all ranks train in.

    Raises:
        OutputError: the disk is full or cannot be written to.
    """
    path = directory / f"step-{step:06d}"
    with _directory_of_all(path, rank, total) as temporary:
        if state.in_parts:
            _write_parts(temporary, {**state.parameters, **state.optimizer}, group)
        elif rank == 0:
            for name, tensors in ((_PARAMETERS, state.parameters), (_OPTIMIZER, state.optimizer)):
                save_file({key: t.contiguous() for key, t in tensors.items()}, temporary / name)
        total(0.0)  # every part is there
        if rank == 0:
            content = {"step": step, "metrics": metrics, "only_to_resume": only_to_resume}
            matmul = torch.get_float32_matmul_precision()
            seal(temporary, {**content, "matmul": matmul, "optimizer": dict(state.scalars)})
    return Checkpoint(step, path, metrics, only_to_resume)


def seal(directory: Path, content: dict[str, Any]) -> None:
    """Write `state.json`: the given content, and size and checksum of every file that lies below `directory` by now."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "crc32": _checksum(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / STATE
    }
    sealed = {**content, "files": files}
    (directory / STATE).write_text(json.dumps({**sealed, "crc32": _content_checksum(sealed)}, indent=1), "utf-8")


class Saved:
    """The tensors of a checkpoint: their names and shapes, and the way to read them.

    Raises:
        RunError: the checkpoint cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file_of: dict[str, Path | None] = {}  # None: in parts
        try:
            self.scalars: dict[str, Any] = _read_state(self.path)["optimizer"]
            for file in sorted(self.path.glob("*.safetensors")):
                self._list(file)
        except (OSError, SafetensorError, ValueError, KeyError, _Damage) as error:
            raise _unreadable(self.path, error) from error

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters."""
        return {name: shape for name, shape in self.shapes.items() if "/" not in name}

    @property
    def optimizer(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the optimizer's values, by `name/key`."""
        return {name: shape for name, shape in self.shapes.items() if "/" in name}

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors with what was saved under their names; of a DTensor, this rank's part."""
        try:
            if any(_is_part(t) for t in targets.values()) or any(self._file_of[name] is None for name in targets):
                _read_parts(self.path, targets)
                return
            for file in {self._file_of[name] for name in targets}:
                assert file is not None
                with safe_open(file, framework="pt") as tensors:
                    for name in targets:
                        if self._file_of[name] == file:
                            targets[name].copy_(tensors.get_tensor(name))
        except (OSError, SafetensorError, ValueError) as error:
            raise _unreadable(self.path, error) from error

    def check_parameters(self, ours: Mapping[str, tuple[int, ...]]) -> None:
        """Raise RunError unless the checkpoint was written for parameters of these names and shapes."""
        theirs = self.parameters
        if ours != theirs:
            different = sorted({name for name, _ in ours.items() ^ theirs.items()})
            raise RunError(
                f"{self.path} was written for another model: {len(different)} parameters differ in name or shape, "
                f"for example {different[0]}; restore the resolved_config.yaml that the run started with"
            )

    def _list(self, file: Path) -> None:
        with safe_open(file, framework="pt") as tensors:
            parts = json.loads((tensors.metadata() or {}).get(_PARTS, "{}"))
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                self.dtypes[name] = _DTYPES[part.get_dtype()]
                self._file_of[name] = None if parts else file
                shape = tuple(part.get_shape())
                offsets = parts.get(name, {}).get("saved_offsets", [0] * len(shape))
                reach = tuple(offset + length for offset, length in zip(offsets, shape, strict=True))
                known = self.shapes.get(name, reach)
                self.shapes[name] = tuple(max(pair) for pair in zip(known, reach, strict=True))


def load_parameters(checkpoint: Checkpoint, model: Any) -> None:
    """Restore the trainable parameters of a model.

    Raises:
        RunError: the checkpoint is damaged or belongs to another model.
    """
    saved = Saved(checkpoint)
    names = trainable(model)
    saved.check_parameters({name: tuple(parameter.shape) for name, parameter in names.items()})
    with torch.no_grad():
        saved.read({name: parameter.detach() for name, parameter in names.items()})


def load_optimizer(checkpoint: Checkpoint, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Restore the state of an optimizer of torch's over a model's trainable parameters.

    Raises:
        RunError: the checkpoint is damaged or belongs to another model.
    """
    saved = Saved(checkpoint)
    names = trainable(model)
    positions = {name: position for position, name in enumerate(_optimizer_order(optimizer, names))}
    state: dict[int, dict[str, Any]] = {}
    targets: dict[str, torch.Tensor] = {}
    for full_name, shape in saved.optimizer.items():
        name, _, key = full_name.rpartition("/")
        if name not in positions:
            raise RunError(f"{checkpoint.path} holds optimizer state of {name}, which is not trained here")
        like, dtype = names[name].detach(), saved.dtypes[full_name]
        # As the parameter lies: of one in parts, in the same parts.
        target = torch.empty_like(like, dtype=dtype) if shape == tuple(like.shape) else torch.empty(shape, dtype=dtype)
        targets[full_name] = state.setdefault(positions[name], {})[key] = target
    saved.read(targets)
    for full_name, value in saved.scalars.items():
        name, _, key = full_name.rpartition("/")
        state.setdefault(positions[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> State:
    """Take the state of a model and an optimizer of torch's."""
    names = trainable(model)
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    state = optimizer.state_dict()["state"]
    for position, name in enumerate(_optimizer_order(optimizer, names)):
        for key, value in state.get(position, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                scalars[f"{name}/{key}"] = value
    return State({name: parameter.detach() for name, parameter in names.items()}, tensors, scalars)


# What torch.distributed.checkpoint calls the entry of a file's metadata that says which part of a tensor it has, and
# safetensors' names of number formats.
_PARTS = "DCP_SHARDING_INFO"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@contextmanager
def _directory_of_all(path: Path, rank: int, total: Total) -> Iterator[Path]:
    """Let all ranks write into one `atomic_directory`, which the first one makes and completes."""
    if rank:
        total(0.0)
        yield path.with_name(partial_name(path))
    else:
        with atomic_directory(path) as temporary:
            total(0.0)
            yield temporary
    total(0.0)  # nobody goes on before it is complete


def _write_parts(directory: Path, tensors: Mapping[str, torch.Tensor], group: Any) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    save(dict(tensors), storage_writer=writer, process_group=group)


def _read_parts(directory: Path, targets: Mapping[str, torch.Tensor]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it reads alone, which is what is wanted: each rank its parts
        load(dict(targets), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)


def _is_part(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if _is_part(tensor) else tensor  # type: ignore[attr-defined]


def read_parameters(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read the trainable parameters by name. Raises RunError when they cannot be read."""
    saved = Saved(checkpoint)
    return _whole(saved, saved.parameters)


def read_optimizer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read the optimizer's tensors and numbers by `parameter/key`. Raises RunError when they cannot be read."""
    saved = Saved(checkpoint)
    return {**_whole(saved, saved.optimizer), **saved.scalars}


def _whole(saved: Saved, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(shape, dtype=saved.dtypes[name]) for name, shape in shapes.items()}
    saved.read(tensors)
    return tensors


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """List the finished checkpoints of a run, oldest first, without those whose `state.json` cannot be read."""
    return [found for _, found in _look_at(directory) if isinstance(found, Checkpoint)]


def last_sound(directory: Path, note: Callable[[str], None]) -> Checkpoint | None:
    """Give the last checkpoint that is whole, for resuming; None where there is none.

    Damaged ones behind it are moved aside, and `note` is told of each, why, and what is used instead.

    Raises:
        RunError: a file cannot be read for a reason that says nothing about its content, such as missing permission.
        OutputError: a damaged one cannot be moved.
    """
    damaged: list[tuple[Path, str]] = []
    sound: Checkpoint | None = None
    for path, found in reversed(_look_at(directory)):
        reason = str(found) if isinstance(found, _Damage) else find_damage(path)
        if reason is None:
            assert isinstance(found, Checkpoint)
            sound = found
            break
        damaged.append((path, reason))
    instead = "no other one is left, and the run starts again at its beginning"
    _set_aside(damaged, instead if sound is None else f"the run continues from {sound.path.name}", note)
    return sound


def best_sound(directory: Path, *, in_memory: int, note: Callable[[str], None]) -> Checkpoint:
    """Give the best checkpoint that is whole, as `best_checkpoint` judges.

    That of the step `in_memory`, whose parameters the model holds, is not read and so never found damaged. Damaged ones
    are moved aside, and `note` is told of each, why, and what is used instead.

    Raises:
        RunError, OutputError: as `last_sound`.
    """
    looked_at = _look_at(directory)
    damaged = [(path, str(found)) for path, found in looked_at if isinstance(found, _Damage)]
    left = [found for _, found in looked_at if isinstance(found, Checkpoint)]
    while left:
        best = best_checkpoint(left)
        reason = None if best.step == in_memory else find_damage(best.path)
        if reason is None:
            break
        damaged.append((best.path, reason))
        left.remove(best)
    else:
        best = Checkpoint(in_memory, directory / f"step-{in_memory:06d}", {})
    _set_aside(damaged, f"the artifact is made of {best.path.name}, the best of what is left", note)
    return best


def find_damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, reading all of it; None where nothing is.

    Of one without checksums, as older versions wrote them, the files must open.

    Raises:
        RunError: a file cannot be read for a reason that says nothing about its content, such as missing permission.
    """
    name = STATE
    try:
        files = _read_state(path).get("files")
        for name, expected in (dict.fromkeys((_PARAMETERS, _OPTIMIZER)) if files is None else files).items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if expected is None:
                with safe_open(file, "pt"):
                    continue
            if (size := file.stat().st_size) != expected["bytes"]:
                return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
            if _checksum(file) != expected["crc32"]:
                return f"bytes of {name} have changed since it was written"
    except _Damage as damage:
        return str(damage)
    except SafetensorError as error:
        return f"{name} cannot be read: {error}"
    except OSError as error:
        if error.errno == errno.EIO:  # the disk itself gave up on it
            return f"{name} cannot be read: {error.strerror}"
        raise _unreadable(path, error) from error
    return None


def best_checkpoint(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Give the checkpoint with the lowest validation loss, the last one where there is none."""
    measured = [checkpoint for checkpoint in checkpoints if "eval_loss" in checkpoint.metrics]
    return min(measured, key=lambda checkpoint: checkpoint.metrics["eval_loss"]) if measured else checkpoints[-1]


def delete_superseded(checkpoints: Sequence[Checkpoint], keep: int) -> None:
    """Delete all but the `keep` best checkpoints and those that resuming needs; they come oldest first.

    Resuming needs the last two: should one be damaged, there is one before it. Those of an interruption count only
    until there is a regular one behind them, so that a resumed run leaves what a run leaves that never stopped.
    """
    regular = [checkpoint for checkpoint in checkpoints if not checkpoint.only_to_resume]
    newest = regular[-1].step if regular else -1
    interrupted = [checkpoint for checkpoint in checkpoints if checkpoint.step > newest]
    kept = {checkpoint.step for checkpoint in (*regular[-_KEPT_TO_RESUME:], *interrupted[-_KEPT_TO_RESUME:])}
    for _ in range(min(keep, len(regular))):
        best = best_checkpoint(regular)
        regular.remove(best)
        kept.add(best.step)
    for checkpoint in checkpoints:
        if checkpoint.step not in kept:
            _delete(checkpoint.path)


def most_on_disk(keep: int) -> int:
    """Give how many checkpoints there are at once at most: the best, those that resuming needs, and one being written.

    Not counted are those of interruptions.
    """
    return keep + _KEPT_TO_RESUME + 1


def sweep(directory: Path) -> None:
    """Delete what a kill left half written or half deleted; call when no run is writing there.

    What was set aside as damaged stays: it is the user's to look at and to delete.
    """
    for path in directory.glob(".step-*"):
        if path.suffix != _DAMAGED:
            shutil.rmtree(path, ignore_errors=True)


def _look_at(directory: Path) -> list[tuple[Path, Checkpoint | _Damage]]:
    """Read every `state.json` of a run, oldest first."""

    def look(path: Path) -> Checkpoint | _Damage:
        try:
            content = _read_state(path)
        except _Damage as damage:
            return damage
        except OSError as error:
            raise _unreadable(path, error) from error
        return Checkpoint(content["step"], path, content["metrics"], content["only_to_resume"], content.get("matmul"))

    paths = [path for path in directory.glob("step-*") if NAME.fullmatch(path.name)]
    return [(path, look(path)) for path in sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))]


def _read_state(path: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint. Raises _Damage, or OSError where that says nothing about the content."""
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _Damage(f"{STATE} is missing") from None
    except ValueError as error:
        raise _Damage(f"{STATE} cannot be read: {error}") from error
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise _Damage(f"{STATE} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict) or not {"step", "metrics", "only_to_resume", "optimizer"} <= content.keys():
        raise _Damage(f"{STATE} lacks what it should hold")
    checksum = content.pop("crc32", None)
    if (checksum is not None or "files" in content) and checksum != _content_checksum(content):
        raise _Damage(f"the content of {STATE} has changed since it was written")
    return content


def _set_aside(damaged: Sequence[tuple[Path, str]], instead: str, note: Callable[[str], None]) -> None:
    """Move damaged checkpoints to names that no run reads, writes or sweeps away, and say so."""
    for path, reason in damaged:
        aside = next(name for name in _names_aside(path) if not name.exists())
        try:
            path.rename(aside)
        except OSError as error:
            raise output_error(error, path) from error
        note(
            f"the checkpoint {path.name} is damaged ({reason}); {instead}. The damaged one was moved to {aside.name} "
            "beside it and may be deleted"
        )


def _names_aside(path: Path) -> Iterator[Path]:
    yield path.with_name(f".{path.name}{_DAMAGED}")
    number = 2
    while True:
        yield path.with_name(f".{path.name}-{number}{_DAMAGED}")
        number += 1


def _checksum(path: Path) -> str:
    """Give the CRC-32 of a file: it finds every burst of up to 32 changed bits, and misses one in 2³² of the rest."""
    value, buffer = 0, bytearray(_READ_AT_ONCE)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:count], value)
    return f"{value:08x}"


def _content_checksum(content: dict[str, Any]) -> str:
    """Give the CRC-32 of what `state.json` says, however it is laid out."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _delete(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.deleted")  # a kill half-way must not leave half a checkpoint under its name
    path.rename(hidden)
    shutil.rmtree(hidden)


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"the checkpoint {path} cannot be read: {error}; make it readable, or move it away and resume: the checkpoint "
        "before it is used then"
    )


def state_bytes(model: Any, optimizer_values_per_parameter: int = 2) -> int:
    """Estimate the size of one checkpoint in bytes: parameters and, for each, the optimizer's values in fp32."""
    return sum(p.numel() * (p.element_size() + 4 * optimizer_values_per_parameter) for p in trainable(model).values())


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """Give the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer_order(optimizer: torch.optim.Optimizer, names: dict[str, torch.nn.Parameter]) -> list[str]:
    """Name the optimizer's parameters in the order in which its state dict numbers them."""
    by_identity = {id(parameter): name for name, parameter in names.items()}
    return [by_identity[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
