"""LoRA adapters of several runs over one copy of the base model: each token of a batch is computed with its own.

An adapter is no part of the model here, as it is for PEFT: its matrices lie beside it, and a hook on each layer that an
adapter knows adds what they compute. So one is added or removed without touching what is being computed, and costs
nothing but its own matrices.

Shapes: N tokens, I and O features that go into and come out of a layer, R rank.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmforge.errors import ModelError
from llmforge.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


class NotShareableError(ModelError):
    """A sound adapter that changes more of the base model than products beside its linear layers."""


@dataclass(frozen=True)
class _Low:
    """What an adapter adds to a layer: `scale` · x · A^T · B^T."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # In fp32, as it was trained and as PEFT computes it, unless an autocast says otherwise.
        hidden = torch.nn.functional.linear(x.to(self.a_RI.dtype), self.a_RI)
        return torch.nn.functional.linear(hidden, self.b_OR) * self.scale


class Adapters:
    """The adapters over one base model.

    Args:
        model: the base model, without any.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._of_layer: dict[str, dict[str, _Low]] = {}
        self._bytes: dict[str, int] = {}
        self._versions: dict[str, int] = {}
        self._groups: Sequence[tuple[str, torch.Tensor | None]] = ()

    def __contains__(self, name: object) -> bool:
        return name in self._bytes

    @property
    def bytes_of(self) -> Mapping[str, int]:
        """The bytes that each adapter takes, by name."""
        return dict(self._bytes)

    def version(self, name: str) -> int:
        """Count how often an adapter was added under a name."""
        return self._versions.get(name, 0)

    def read(self, directory: Path) -> dict[str, Any]:
        """Read an adapter and check that it fits; from any thread. What it gives is for `add`.

        Raises:
            NotShareableError: it needs a base model of its own.
            ModelError: it is damaged, or belongs to another base model.
        """
        check_adapter(directory, key="adapter")
        settings = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if why := needs_own_base(settings):
            raise NotShareableError(f"the adapter in {directory} cannot share its base model: {why}")
        config = peft.LoraConfig.from_pretrained(directory)
        try:
            tensors = load_file(directory / ADAPTER_WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{directory / ADAPTER_WEIGHTS} cannot be read: {error}") from error
        found: dict[str, Any] = {}
        for name, a_RI in tensors.items():
            if not name.endswith((_A, _B)) or not name.startswith(_PREFIX):
                raise NotShareableError(f"the adapter in {directory} cannot share its base model: it holds {name}")
            if name.endswith(_B):
                continue
            path = name[len(_PREFIX) : -len(_A)]
            b_OR = tensors.get(_PREFIX + path + _B)
            module = self._modules.get(path)
            if b_OR is None or module is None:
                raise ModelError(
                    f"the adapter in {directory} was trained on another base model: "
                    + (f"this one has no {path}" if module is None else f"{path} has no lora_B")
                )
            if not isinstance(module, torch.nn.Linear) or a_RI.ndim != 2:
                raise NotShareableError(
                    f"the adapter in {directory} cannot share its base model: {path} is a {type(module).__name__}"
                )
            shape = (b_OR.shape[0], a_RI.shape[1])
            if shape != (module.out_features, module.in_features):
                raise ModelError(
                    f"the adapter in {directory} was trained on another base model: its {path} is {shape[1]} to "
                    f"{shape[0]} features, and this one's {module.in_features} to {module.out_features}"
                )
            device = module.weight.device
            found[path] = _Low(a_RI.to(device), b_OR.to(device), _scale(config, path, len(a_RI)))
        if not found:
            raise ModelError(f"the adapter in {directory} is empty")
        return found

    def add(self, name: str, layers: Mapping[str, Any]) -> None:
        """Make what `read` gave answerable under a name; between steps."""
        self.remove(name)
        for path, low in layers.items():
            if path not in self._of_layer:
                self._of_layer[path] = {}
                self._modules[path].register_forward_hook(self._hook(self._of_layer[path]))
            self._of_layer[path][name] = low
        self._versions[name] = self.version(name) + 1
        self._bytes[name] = sum(t.nbytes for low in layers.values() for t in (low.a_RI, low.b_OR))

    def remove(self, name: str) -> None:
        """Forget an adapter, if it is there; between steps."""
        for of_name in self._of_layer.values():
            of_name.pop(name, None)
        self._bytes.pop(name, None)

    @contextmanager
    def using(self, names: Sequence[str | None], device: torch.device) -> Iterator[None]:
        """Let forward passes inside compute each token of a step with its adapter, None with the base model alone."""
        if len(set(names)) == 1:
            self._groups = () if names[0] is None else ((names[0], None),)
        else:
            places: dict[str, list[int]] = {}
            for place, name in enumerate(names):
                if name is not None:
                    places.setdefault(name, []).append(place)
            self._groups = [(name, torch.tensor(index, device=device)) for name, index in places.items()]
        try:
            yield
        finally:
            self._groups = ()

    def _hook(self, of_name: Mapping[str, _Low]) -> Any:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            for name, places in self._groups:
                low = of_name.get(name)
                if low is None:
                    continue
                if places is None:
                    output = output + low(inputs[0]).to(output.dtype)
                else:
                    output = output.index_add(0, places, low(inputs[0].index_select(0, places)).to(output.dtype))
            return output

        return add


def needs_own_base(settings: Mapping[str, Any]) -> str:
    """Say what of an adapter's settings is more than products beside linear layers; nothing if nothing is."""
    if settings.get("peft_type") != "LORA":
        return f"it is {settings.get('peft_type')}, not LORA"
    more = (
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "lora_bias",
        "fan_in_fan_out",
    )
    for key in (*more, "layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora"):
        if settings.get(key):
            return f"it has {key}"
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        return f"it begins at other base weights (init_lora_weights: {settings['init_lora_weights']})"
    if settings.get("bias", "none") != "none":
        return f"it trained biases (bias: {settings['bias']})"
    return ""


def _scale(config: Any, path: str, rank: int) -> float:
    """Give what PEFT multiplies an adapter's product with in a layer."""
    patterns = config.alpha_pattern or {}
    pattern = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)
    alpha = config.lora_alpha if pattern is None else patterns[pattern]
    return float(alpha / (rank**0.5 if config.use_rslora else rank))
