"""Saves and restores training state, so that a resumed run equals one that never stopped.

A checkpoint is a directory `step-NNNNNN` of safetensors and JSON, no pickles. It holds what changes during training and
cannot be computed again: trainable parameters, optimizer state and the step. Data order, learning rate and random
numbers are functions of the step.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmforge.atomic import atomic_directory
from llmforge.errors import NonFiniteLossError, RunError

STATE = "state.json"
NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint.

    `metrics` is empty where the run has no validation data; `only_to_resume` marks one written because the run was
    interrupted, which an uninterrupted run would not have.
    """

    step: int
    path: Path
    metrics: dict[str, float]
    only_to_resume: bool = False


def save_checkpoint(
    directory: Path,
    *,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    metrics: dict[str, float],
    only_to_resume: bool = False,
) -> Checkpoint:
    """Write the state after `step` updates to `directory/step-NNNNNN`, in one piece or not at all.

    Raises:
        NonFiniteLossError: a parameter is NaN or infinite; nothing was written.
        OutputError: the disk is full or cannot be written to.
    """
    path = directory / f"step-{step:06d}"
    names = _trainable(model)
    for name, parameter in names.items():
        if not torch.isfinite(parameter.detach()).all():
            raise NonFiniteLossError(
                f"the update of step {step} made {name} NaN or infinite, and no checkpoint was written of it. Lower "
                "learning_rate; the run's last checkpoint is from before it"
            )
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for position, name in enumerate(_optimizer_order(optimizer, names)):
        for key, value in state["state"].get(position, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.contiguous()
            else:
                scalars[f"{name}/{key}"] = value
    with atomic_directory(path) as temporary:
        save_file({name: p.detach().contiguous() for name, p in names.items()}, temporary / "parameters.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        content = {"step": step, "metrics": metrics, "only_to_resume": only_to_resume, "optimizer": scalars}
        (temporary / STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return Checkpoint(step, path, metrics, only_to_resume)


def load_checkpoint(checkpoint: Checkpoint, *, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
    """Restore trainable parameters and, if an optimizer is given, its state.

    Raises:
        RunError: the checkpoint is damaged or belongs to another model.
    """
    names = _trainable(model)
    try:
        parameters = load_file(checkpoint.path / "parameters.safetensors")
        tensors = load_file(checkpoint.path / "optimizer.safetensors") if optimizer is not None else {}
        content = json.loads((checkpoint.path / STATE).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(checkpoint.path, error) from error
    ours = {name: tuple(parameter.shape) for name, parameter in names.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if ours != theirs:
        different = sorted({name for name, _ in ours.items() ^ theirs.items()})
        raise RunError(
            f"{checkpoint.path} was written for another model: {len(different)} parameters differ in name or shape, "
            f"for example {different[0]}; restore the resolved_config.yaml that the run started with"
        )
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(parameters[name])
    if optimizer is None:
        return
    state: dict[int, dict[str, Any]] = {}
    positions = {name: position for position, name in enumerate(_optimizer_order(optimizer, names))}
    for full_name, value in [*tensors.items(), *content["optimizer"].items()]:
        name, _, key = full_name.rpartition("/")
        if name not in positions:
            raise RunError(f"{checkpoint.path} holds optimizer state of {name}, which is not trained here")
        state.setdefault(positions[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """List the finished checkpoints of a run, oldest first.

    Raises:
        RunError: one of them is damaged.
    """
    found = []
    for path in directory.glob("step-*"):
        if NAME.fullmatch(path.name) and (path / STATE).is_file():
            try:
                content = json.loads((path / STATE).read_text(encoding="utf-8"))
                found.append(Checkpoint(content["step"], path, content["metrics"], content["only_to_resume"]))
            except (ValueError, KeyError) as error:
                raise _damaged(path, error) from error
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """Give the checkpoint with the lowest validation loss, the last one where there is none."""
    measured = [checkpoint for checkpoint in checkpoints if "eval_loss" in checkpoint.metrics]
    return min(measured, key=lambda checkpoint: checkpoint.metrics["eval_loss"]) if measured else checkpoints[-1]


def delete_superseded(checkpoints: list[Checkpoint], keep: int) -> None:
    """Delete all but the `keep` best checkpoints and the last one, which resuming needs; they come oldest first."""
    kept = {checkpoints[-1].step}
    remaining = [checkpoint for checkpoint in checkpoints if not checkpoint.only_to_resume]
    for _ in range(min(keep, len(remaining))):
        best = best_checkpoint(remaining)
        remaining.remove(best)
        kept.add(best.step)
    for checkpoint in checkpoints:
        if checkpoint.step not in kept:
            _delete(checkpoint.path)


def sweep(directory: Path) -> None:
    """Delete what a kill left half written or half deleted; call when no run is writing there."""
    for path in directory.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _delete(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.deleted")  # a kill half-way must not leave half a checkpoint under its name
    path.rename(hidden)
    shutil.rmtree(hidden)


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(
        f"the checkpoint {path} is damaged: {error}; delete that directory, and the run resumes from the checkpoint "
        "before it, or from its start"
    )


def state_bytes(model: Any, optimizer_values_per_parameter: int = 2) -> int:
    """Estimate the size of one checkpoint in bytes: parameters and, for each, the optimizer's values in fp32."""
    return sum(p.numel() * (p.element_size() + 4 * optimizer_values_per_parameter) for p in _trainable(model).values())


def _trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer_order(optimizer: torch.optim.Optimizer, names: dict[str, torch.nn.Parameter]) -> list[str]:
    """Name the optimizer's parameters in the order in which its state dict numbers them."""
    by_identity = {id(parameter): name for name, parameter in names.items()}
    return [by_identity[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
