"""LoRA through PEFT: which modules it reaches, new and continued adapters, merging."""

import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmforge.errors import ModelError
from llmforge.models.load import quiet
from llmforge.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS

SAVED_PREFIX = "base_model.model."  # of every tensor's name in an adapter's file
# Fields that change what an adapter computes; an adapter can be continued only under the values it was trained with.
_SAME_WHEN_CONTINUED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "bias",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
)


def add_lora(model: Any, options: Mapping[str, Any]) -> Any:
    """Freeze a base model and add a fresh LoRA adapter to it; all that is trained is fp32.

    Args:
        options: fields of PEFT's `LoraConfig`.

    Raises:
        ModelError: a target names no module, or a module that LoRA cannot adapt; lists the names there are.
    """
    fields = dict(options)
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        _check_names(model, fields.get(key) or None, key)
    fields["ensure_weight_tying"] = _ensures_tying(model, fields)
    fields["exclude_modules"] = _exclude(fields.get("exclude_modules"), left_out(model, fields))
    unfit = _unfit_modules(model, fields.get("target_modules"))  # looked for before PEFT changes the model
    adaptable = ", ".join(adaptable_modules(model))
    with quiet():
        try:
            adapted = peft.get_peft_model(model, peft.LoraConfig(**fields))
        except (ValueError, TypeError, NotImplementedError) as error:
            why = str(error).splitlines()[0]  # PEFT goes on to print whole modules
            if unfit:
                why = f"target_modules matches {', '.join(unfit)}, which LoRA cannot adapt"
            raise ModelError(f"lora_config: {why}. Modules that LoRA can adapt here: {adaptable}") from error
    adapted_modules = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if lost := _lost_on_loading(model, adapted_modules):
        names = ", ".join(_module_names(sorted(lost)))
        raise ModelError(
            f"lora_config.target_modules: PEFT would not find the adapter of {names} again when it loads what it "
            "saved: it takes the names of these tensors for those of an older checkpoint, and changes them. Leave "
            f"them out: exclude_modules: {json.dumps(sorted(lost))}"
        )
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT leaves modules_to_save and biases as they are; bf16 swallows small updates
            parameter.data = parameter.data.float()
    return adapted


def left_out(model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, str]:
    """Name the modules that `all-linear` would adapt and LoRA cannot, each with the reason; `add_lora` excludes them.

    PEFT takes every `nn.Linear`. Some of them are linear in name only: a router that returns a tuple, a layer that
    works in groups. Of others the model's code reads the weight and never calls the layer, so that an adapter there
    changes nothing and gets no gradient: Mamba's kernels do so, where they are installed
    (https://github.com/huggingface/peft/pull/2610 refuses some of those architectures). Adapters of a third kind would
    be lost when they are loaded.

    Modules that the options name one by one, or exclude already, are not among them.
    """
    if str(options.get("target_modules")).lower() != "all-linear":
        return {}
    found = {}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    holders = Counter(id(module.weight) for module in linear.values())
    lost = _lost_on_loading(model, linear)
    for name, module in linear.items():
        if matches(options.get("exclude_modules"), name):
            continue
        parent, _, last = name.rpartition(".")
        owner: Any = type(model.get_submodule(parent))
        if not _computes_linear(module):
            found[name] = f"{type(module).__name__} computes something else than a matrix product"
        elif holders[id(module.weight)] > 1:
            found[name] = "its weight is another layer's too, to which a merge would add both adapters"
        elif _reads_weight(owner, last):
            found[name] = f"{owner.__name__} reads its weight without calling it"
        elif name in lost:
            found[name] = "PEFT would not find its adapter again on loading"
    head = model.get_output_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    return {name: why for name, why in found.items() if model.get_submodule(name) is not head}  # PEFT leaves it out


def describe_left_out(modules: Mapping[str, str]) -> str | None:
    """Tell the user in one sentence which modules `all-linear` leaves out; None where it is none."""
    if not modules:
        return None
    kinds: dict[tuple[str, str], int] = {}
    for name, why in modules.items():
        key = (name.rpartition(".")[2], why)
        kinds[key] = kinds.get(key, 0) + 1
    listed = "; ".join(f"{last} ({count}×: {why})" for (last, why), count in kinds.items())
    return f"all-linear leaves out modules that LoRA cannot adapt: {listed}"


def describe_unmergeable(model: Any) -> str | None:
    """Tell the user in one sentence why an adapter will be PEFT's alone to serve; None where it can be merged."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    unfit = [
        name
        for name, layer in layers.items()
        if layer.lora_bias.get("default") and getattr(layer.get_base_layer(), "bias", None) is None
    ]
    if not unfit:
        return None
    return (
        f"lora_bias: the base model has no biases in {', '.join(_module_names(unfit))} to which those of the adapter "
        "could be added, so it cannot be merged, and other servers than PEFT have no biases in adapters. Leave "
        "lora_bias out to serve the model anywhere"
    )


def check_continuation(model: Any, directory: Path) -> None:
    """Check that a saved adapter fits one that `add_lora` made of the config, without reading its weights.

    Raises:
        ModelError: rank, scale or adapted modules differ, or the shapes are those of another model.
    """
    key = "initial_adapter_model_ckpt_path"
    theirs = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    defaults, ours = peft.LoraConfig().to_dict(), model.peft_config["default"].to_dict()
    if theirs.get("peft_type") != "LORA":
        raise ModelError(f"{key}: the adapter in {directory} is of type {theirs.get('peft_type')}, not LORA")
    if splits_base(theirs.get("init_lora_weights", True)):
        raise ModelError(
            f"{key}: the adapter in {directory} was saved for base weights that its initialisation "
            f"({theirs['init_lora_weights']}) had changed; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    different = [
        (name, theirs.get(name, defaults[name]), ours[name])
        for name in _SAME_WHEN_CONTINUED
        if (theirs.get(name, defaults[name]) or None) != (ours[name] or None)
    ]
    if different:
        raise ModelError(
            f"{key}: the adapter in {directory} was trained with "
            + ", ".join(f"{name} {json.dumps(theirs)} (here {json.dumps(ours)})" for name, theirs, ours in different)
            + "; an adapter is continued with its own values, so set lora_config: {"
            + ", ".join(f"{name}: {json.dumps(theirs)}" for name, theirs, _ in different)
            + "}"
        )
    with quiet():
        expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: list(tensor.shape) for name, tensor in expected.items()}
    with safe_open(directory / ADAPTER_WEIGHTS, framework="numpy") as file:
        # Older PEFT saves the untrained embedding beside its adapter.
        names = [name for name in file.keys() if ".base_layer." not in name]  # noqa: SIM118
        found = {name: file.get_slice(name).get_shape() for name in names}
    problems = [
        f"{words} {', '.join(_module_names(names))}"
        for words, names in (
            ("it lacks", wanted.keys() - found.keys()),
            ("it has, but lora_config does not name,", found.keys() - wanted.keys()),
        )
        if names
    ]
    if problems:
        raise ModelError(
            f"{key}: the adapter in {directory} does not adapt what lora_config names: {'; '.join(problems)}. "
            f"Its own target_modules are {json.dumps(theirs.get('target_modules'))}, its modules_to_save "
            f"{json.dumps(theirs.get('modules_to_save'))}"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ModelError(
                f"{key}: the adapter in {directory} was trained on another model: {name} has shape {found[name]}, here "
                f"it would have {shape}. Give an adapter of this model_id"
            )


def load_adapter(model: Any, directory: Path) -> None:
    """Fill the adapter that `add_lora` made with a saved one's weights, to train it further.

    Raises:
        ModelError: it does not fit (see `check_continuation`), or is damaged.
    """
    check_continuation(model, directory)
    with quiet():
        peft.set_peft_model_state_dict(model, load_file(directory / ADAPTER_WEIGHTS))


def starting_point(model: Any) -> dict[str, torch.Tensor]:
    """Copy the matrices of a fresh adapter whose product PEFT has taken out of the base weights, by their saved names.

    PiSSA and OLoRA do that: a model that starts as it was, split into an adapter and the rest. Any other gives none.
    """
    if not splits_base(model.peft_config["default"].init_lora_weights):
        return {}
    with quiet():
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items() if ".lora_" in name and tensor.ndim == 2}


def subtract_starting_point(directory: Path, start: Mapping[str, torch.Tensor]) -> None:
    """Rewrite a saved adapter as one for the base weights as published: W + s(BA - B0·A0), of twice the rank.

    Without this, only a loader that repeats the split, number for number, computes what was trained.
    """
    weights, settings = directory / ADAPTER_WEIGHTS, directory / ADAPTER_CONFIG
    tensors = load_file(weights)
    for name, first in start.items():
        tensors[name] = doubled(name, tensors[name], first)
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads(settings.read_text(encoding="utf-8"))
    same_scale = math.sqrt(2) if config["use_rslora"] else 2
    config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": same_scale * config["lora_alpha"]}
    config["rank_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {name: same_scale * alpha for name, alpha in config["alpha_pattern"].items()}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def doubled(name: str, tensor: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Give the matrix of twice the rank that takes a module's first product off: (A, A0), or (B, -B0)."""
    if re.search(r"\.lora_(embedding_)?A\b", name):  # (r, in)
        return torch.cat([tensor, first.to(tensor)], dim=0)
    return torch.cat([tensor, -first.to(tensor)], dim=1).contiguous()  # (out, r)


def splits_base(init_lora_weights: bool | str) -> bool:
    return str(init_lora_weights).startswith(("pissa", "olora"))


def merge(model: Any) -> Any:
    """Merge a PEFT model's adapter into its base weights and return the plain model.

    Where input and output embeddings are one tensor and the adapter changes them, the output embedding gets a copy of
    its own first, so that each change is added to its own side only; they are tied again if they come out equal.
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    separate = is_tied(base) and any(_has_adapter(module) for module in (embedding, head))
    if separate:
        _weight_holder(head).weight = torch.nn.Parameter(_weight_holder(head).weight.detach().clone())
    with quiet():
        merged = model.merge_and_unload(safe_merge=True)
    if separate:
        embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
        tied = torch.equal(embedding.weight, head.weight)
        if tied:
            head.weight = embedding.weight
        merged.config.tie_word_embeddings = tied
        merged.config.get_text_config().tie_word_embeddings = tied
    return merged


def adaptable_modules(model: torch.nn.Module) -> list[str]:
    """List the last name parts of the modules that LoRA can adapt, in the model's order."""
    return _module_names(name for name, module in model.named_modules() if _is_adaptable(module))


def is_tied(model: Any) -> bool:
    """Say whether a model's input and output embeddings are one tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and _weight_holder(embedding).weight is _weight_holder(head).weight


def _ensures_tying(model: Any, fields: Mapping[str, Any]) -> bool:
    """Decide whether PEFT keeps the copies of tied embeddings in `modules_to_save` tied.

    It does so with one shared parameter, as the base model does. LoRA on tied embeddings stays two adapters, one for
    each side: PEFT's tied LoRA matrices are two parameters over one storage, which the optimizer would update twice,
    and which come apart when they are cast or moved to a GPU (https://github.com/huggingface/peft/issues/2777).
    """
    if not is_tied(model):
        return False
    tied = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = [name for name, module in model.named_modules() if module in tied]
    adapted = any(matches(fields.get("target_modules"), name) for name in names)
    if adapted and fields.get("ensure_weight_tying"):
        raise ModelError(
            "lora_config.ensure_weight_tying: true keeps the embeddings of modules_to_save tied, not LoRA matrices in "
            "target_modules, which are two adapters, one for the input side and one for the output side; remove it, or "
            "name the embedding in modules_to_save instead"
        )
    return not adapted and any(matches(fields.get("modules_to_save"), name) for name in names)


def _exclude(given: str | Sequence[str] | None, names: Mapping[str, str]) -> str | list[str] | None:
    """Add modules to what the user excludes, a pattern or a list of names."""
    if not names:
        return given if given is None or isinstance(given, str) else list(given)
    if isinstance(given, str):
        return "|".join([f"(?:{given})", *map(re.escape, names)])
    return [*(given or ()), *names]


def _computes_linear(module: torch.nn.Linear) -> bool:
    """Say whether a linear layer gives what PEFT adds to: one tensor, of as many features as it declares."""
    if type(module).forward is torch.nn.Linear.forward or not module.weight.is_floating_point():
        return True  # quantised layers are PEFT's to know
    input_BC = torch.zeros(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            output = module(input_BC)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(output, torch.Tensor) and output.shape == (2, module.out_features)


def _lost_on_loading(model: Any, modules: Iterable[str]) -> set[str]:
    """Name the modules whose adapter PEFT does not find again in the file that it wrote itself.

    On loading it renames an adapter's tensors as transformers renames those of older checkpoints, and some of these
    patterns change names that are right already: for Laguna, `mlp.shared_expert.` matches `mlp.shared_experts`.
    """
    owners = {f"{SAVED_PREFIX}{name}.lora_{side}.weight": name for name in modules for side in "AB"}
    tensors = {name: torch.empty(1, 1, device="meta") for name in owners}
    found = convert_peft_adapter_state_dict_for_transformers(model, peft.LoraConfig(), tensors)
    return {owners[name] for name in owners.keys() - found.keys()}


@cache
def _reads_weight(parent: Any, name: str) -> bool:
    """Say whether the code of a module's class computes with the weight of a child instead of calling the child.

    Code that reads slices of it (Bloom's) imitates tensor parallelism, and only on request.
    """
    try:
        code = inspect.getsource(parent)
    except (OSError, TypeError):
        return False
    return re.search(rf"\bself\.{name}\.weight\b(?!\[|\.(dtype|device|shape|ndim|size|data\b))", code) is not None


def _check_names(model: torch.nn.Module, targets: str | Sequence[str] | None, key: str) -> None:
    """Check that each name, or the pattern, matches a module. PEFT passes over names that match nothing."""
    if targets is None or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    each = [targets] if isinstance(targets, str) else [[target] for target in targets]
    unmatched = [target for target in each if not any(matches(target, name) for name in names)]
    if unmatched:
        listed = ", ".join(target if isinstance(target, str) else target[0] for target in unmatched)
        raise ModelError(
            f"lora_config.{key}: {listed} matches no module of this model. "
            f"Modules that LoRA can adapt here: {', '.join(adaptable_modules(model))}"
        )


def _unfit_modules(model: torch.nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    """Name the modules, with their types, that the targets match and LoRA cannot adapt."""
    return list(
        dict.fromkeys(
            f"{name.rpartition('.')[2]} ({type(module).__name__})"
            for name, module in model.named_modules()
            if matches(targets, name) and not _is_adaptable(module)
        )
    )


def matches(targets: str | Sequence[str] | None, name: str) -> bool:
    """Say whether PEFT's target names, or its pattern, mean a module."""
    if targets is None or targets == "all-linear":
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_adaptable(module: torch.nn.Module) -> bool:
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"  # GPT-2's own linear layer


def _module_names(names: Any) -> list[str]:
    """Give the last name parts of modules, each once, from names of modules or of their tensors."""
    modules = (re.sub(r"(\.lora_.*|\.weight|\.bias)$", "", name) for name in names)
    return list(dict.fromkeys(module.rpartition(".")[2] for module in modules))


def _has_adapter(module: torch.nn.Module) -> bool:
    return isinstance(module, (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper))


def _weight_holder(module: Any) -> Any:
    """Give the plain layer inside PEFT's wrappers: the one that the base model's file knows."""
    if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, peft.utils.ModulesToSaveWrapper):
        return module.original_module
    return module
