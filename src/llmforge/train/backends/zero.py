"""DeepSpeed's ZeRO (https://arxiv.org/abs/1910.02054), stages 1 to 3, with the user's JSON.

The engine sums gradients, clips and steps in one call, so `clip` does all of that here and `step` nothing. Checkpoints
are ours, tensor by tensor: they hold no pickles, and any backend and number of ranks goes on from them.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmforge.checkpoint import Checkpoint, Saved, State, trainable
from llmforge.errors import ConfigError, RunError
from llmforge.train.backends.ranks import RanksInStep

_STEP = "step"
# Sections that would say again what the run's own keys say.
_OURS = ("optimizer", "scheduler", "data_types", "fp16", "amp")
_BUCKET = 500_000_000


def read_config(path: Path) -> dict[str, Any]:
    """Read DeepSpeed's JSON.

    Raises:
        ConfigError: it is missing, no JSON, or has no ZeRO stage that there is.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed.config_path: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"no JSON: {error}", file=str(path)) from error
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (1, 2, 3):
        raise ConfigError(
            "expected DeepSpeed's config, an object with zero_optimization: {stage: 1, 2 or 3}; where nothing is to be "
            "shared out, remove deepspeed and set parallel: ddp",
            file=str(path),
        )
    return config


def filled(
    config: Mapping[str, Any],
    *,
    world_size: int,
    micro_batch: int,
    max_grad_norm: float,
    hidden_size: int,
    bf16: bool,
) -> dict[str, Any]:
    """Give every "auto" a value, and leave out what the run's own keys decide (optimizer, schedule, number format).

    Micro-batches of a step are counted by the loop, so for DeepSpeed each step is one.
    """
    values = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "train_batch_size": micro_batch * world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        # Hugging Face's integration fills them in the same way.
        "reduce_bucket_size": max(hidden_size * hidden_size, 1),
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "allgather_bucket_size": _BUCKET,
    }

    def fill(section: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in section.items():
            if isinstance(value, Mapping):
                result[key] = fill(value)
            elif value != "auto":
                result[key] = value
            elif key in values:
                result[key] = values[key]
        return result

    full = fill({key: value for key, value in config.items() if key not in _OURS})
    full |= {key: values[key] for key in tuple(values)[:4]}
    full["bf16"] = {"enabled": bf16}
    if full["zero_optimization"]["stage"] < 3:
        # With it, DeepSpeed 0.19 gives parts of the parameters back in the wrong places when asked for them.
        full["zero_optimization"].pop("round_robin_gradients", None)
    # The optimizer is torch's, which DeepSpeed has not tried with every setting; its own would have to be compiled.
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **full}


class DeepSpeed(RanksInStep):
    """The backend `deepspeed`.

    Args:
        config: DeepSpeed's, with a value for everything that was "auto".
    """

    shards = True
    undoes = False

    def __init__(self, device: torch.device, config: Mapping[str, Any]) -> None:
        super().__init__(device)
        self._config = dict(config)
        self._engine: Any = None

    def prepare(self, model: Any) -> Any:
        return model  # the engine places it: at stage 3 it may be larger than the device

    def equip(self, model: Any, optimizer: torch.optim.Optimizer) -> Any:
        import deepspeed  # type: ignore[import-untyped]

        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._config)
        self._make_state()
        self._check_places()
        return self._engine

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size)  # it takes the mean over ranks, and shares are to be summed

    def clip(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32).detach().cpu()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def state(self, model: Any, optimizer: torch.optim.Optimizer) -> State:
        from deepspeed.utils import (  # type: ignore[import-untyped]
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
        )

        parameters: dict[str, torch.Tensor] = {}
        moments: dict[str, torch.Tensor] = {}
        keys, steps = self._keys(), self._steps()
        for name, parameter in trainable(self._engine.module).items():
            # One after the other: never more than one of them is whole on a device.
            whole = safe_get_full_fp32_param(parameter)
            states = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            if self.rank == 0:
                parameters[name] = _copy(whole)
                moments |= {f"{name}/{key}": _copy(tensor) for key, tensor in states.items()}
                moments[f"{name}/{_STEP}"] = torch.tensor(steps, dtype=torch.float32)
        return State(parameters, moments, {}, is_copy=True)

    def load(self, checkpoint: Checkpoint, model: Any, optimizer: torch.optim.Optimizer) -> None:
        saved = Saved(checkpoint)
        for name, parameter in trainable(self._engine.module).items():
            for key in (None, *self._keys()):
                full_name = name if key is None else f"{name}/{key}"
                whole = torch.empty(saved.shapes[full_name], dtype=torch.float32)
                saved.read({full_name: whole})
                self._set(parameter, whole, key)
        steps = torch.zeros(())
        saved.read({next(name for name in saved.optimizer if name.endswith(f"/{_STEP}")): steps})
        for state in self._states():
            state[_STEP] = torch.full_like(torch.as_tensor(state[_STEP]), float(steps))

    def _make_state(self) -> None:
        """Make the optimizer's state before the first step, so that there is something to load a checkpoint into.

        It is made by a step with gradients and a learning rate of 0, which is not to count as one. Stage 3 gives the
        optimizer its parameters part by part; stages 1 and 2 tell a parameter where its state lies during the first
        step, when only a part of it is there yet.
        """
        zero = self._engine.optimizer
        base = zero.optimizer
        if not self._states():
            by_part = [
                (base.param_groups[zero.sub_group_to_group_id[part]], [flat])
                for part, flat in enumerate(getattr(zero, "fp32_partitioned_groups_flat", ()))
            ]
            for group, parameters in by_part or [(group, group["params"]) for group in base.param_groups]:
                given, group["params"] = group["params"], parameters
                had = [parameter.grad for parameter in parameters]  # of offloaded parts, DeepSpeed keeps them
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                base.step()
                for parameter, gradient in zip(parameters, had, strict=True):
                    parameter.grad = gradient
                group["params"] = given
            if not by_part:
                zero._lazy_init_hp_params_optimizer_state()
        for state in self._states():
            state[_STEP] = torch.zeros_like(torch.as_tensor(state[_STEP]))

    def _check_places(self) -> None:
        """Check that DeepSpeed gives parameters back as they are: checkpoints and artifact are made of these.

        Raises:
            RunError: it does not, as with settings that take parts of them to other places than it remembers.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in trainable(self._engine.module).items():
            whole = safe_get_full_fp32_param(parameter)
            if not hasattr(parameter, "ds_tensor") and not torch.equal(whole.to(parameter.dtype), parameter.detach()):
                raise RunError(
                    f"DeepSpeed does not give {name} back as it is, so that no checkpoint would be right. Remove "
                    "settings of zero_optimization that are not needed, or set parallel: fsdp2"
                )

    def _states(self) -> list[dict[str, Any]]:
        return [state for state in self._engine.optimizer.optimizer.state.values() if _STEP in state]

    def _keys(self) -> list[str]:
        """Name the moments that the optimizer keeps."""
        return sorted(key for key in next(iter(self._states()), {}) if key != _STEP)

    def _steps(self) -> float:
        return float(next((state[_STEP] for state in self._states()), 0.0))

    def _set(self, parameter: torch.nn.Parameter, whole: torch.Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        whole = whole.to(self.device)
        if not hasattr(parameter, "ds_tensor"):
            if key is None:
                safe_set_full_fp32_param(parameter, whole)
            else:
                safe_set_full_optimizer_state(parameter, whole, key)
            return
        size = parameter.ds_tensor.ds_numel  # of a rank's part; the last one is padded
        flat = torch.nn.functional.pad(whole.flatten(), (0, size * self.world_size - whole.numel()))
        part = flat[self.rank * size : (self.rank + 1) * size]
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
