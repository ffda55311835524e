"""Merges a saved adapter into base weights on disk, shard by shard, and says what adapter servers cannot serve."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from llmforge.errors import ModelError
from llmforge.models.adapter import is_tied, merge, splits_base
from llmforge.models.load import UNREADABLE, build_skeleton, load_base_model, quiet, reason
from llmforge.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource, check_adapter
from llmforge.models.tokens import fit_to_adapter

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
VLLM_MOST_RANK = 512


def merge_adapter(
    base: ModelSource,
    adapter: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    trust_remote_code: bool = False,
) -> bool:
    """Merge a saved adapter into its base model's weights and write the result as a plain model directory.

    The base's tensors are read one by one and written shard by shard: memory holds one shard and the module that is
    being merged, never the model. What an adapter makes of a module is computed by PEFT's own layers, which are built
    without weights and filled one at a time. Where the files do not hold an adapted module's weights under its own
    name (transformers converts them when it loads them: fused experts, for instance), or hold them pickled or
    quantised, the merge is done in memory instead, and takes the whole model.

    Where input and output embeddings are one tensor and the adapter makes them differ, the result has two.

    Args:
        base: a plain directory (see `as_plain_directory`).
        adapter: the directory that PEFT's save_pretrained wrote.
        target: gets the weights, config.json, and the base's generation config and Python files; no tokenizer.
        dtype: of the floating point weights; None keeps that of each tensor in the base's files.

    Returns:
        Whether it was done shard by shard.

    Raises:
        ModelError: the adapter is damaged or belongs to another model.
    """
    check_adapter(adapter, "adapter")
    target.mkdir(parents=True, exist_ok=True)
    try:
        with quiet():
            plan = _plan(base, adapter, trust_remote_code)
            if plan is None:
                _merge_in_memory(base, adapter, target, dtype, max_shard_bytes, trust_remote_code)
            else:
                shards = _Shards(target, max_shard_bytes)
                for name, tensor in plan.merged_tensors():
                    shards.add(name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
                shards.close()
                if dtype is not None:
                    plan.config.dtype = dtype
                plan.config.save_pretrained(target)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise ModelError(f"the adapter in {adapter} cannot be merged into {base.name}: {reason(error)}") from error
    for path in [*base.directory.glob("*.py"), *base.directory.glob("generation_config.json")]:
        shutil.copyfile(path, target / path.name)
    return plan is not None


def servability(adapter: Path) -> list[str]:
    """Name what in a saved adapter a server that keeps the base model and swaps adapters cannot serve as it is.

    The limits are vLLM's (`vllm/lora/peft_helper.py`, `MaxLoRARanks` in `vllm/config/lora.py`; rows for new tokens were
    taken out in https://github.com/vllm-project/vllm/pull/28382), which other servers share or exceed.

    Returns:
        A sentence for each, with what to do; none where the adapter can be served.

    Raises:
        ModelError: the adapter is damaged.
    """
    check_adapter(adapter, "adapter")
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="numpy") as file:
        names = set(file.keys())
    ranks = [settings.get("r") or 0, *(settings.get("rank_pattern") or {}).values()]
    whole = ", ".join(settings.get("modules_to_save") or [])
    found = {
        f"it holds whole modules ({whole}, from modules_to_save), and such servers take LoRA matrices only": whole,
        "it holds rows of embeddings (new tokens, trainable_token_indices), and such servers keep the base model's "
        "embeddings": settings.get("trainable_token_indices"),
        "it is a DoRA adapter (use_dora), which vLLM does not have": settings.get("use_dora"),
        "it trains biases (bias, lora_bias), which vLLM does not have": settings.get("bias", "none") != "none"
        or settings.get("lora_bias"),
        "it adapts the embeddings (LoRA matrices for them), which servers have for a few architectures only": any(
            ".lora_embedding_" in name or re.search(r"\b(lm_head|embed_out)\.lora_", name) for name in names
        ),
        "it adapts bare parameters (target_parameters), which servers have for a few architectures only": settings.get(
            "target_parameters"
        ),
        "it repeats layers of the base model (layer_replication), which servers do not": settings.get(
            "layer_replication"
        ),
        "it was saved for base weights that its initialisation "
        f"({settings.get('init_lora_weights')}) had changed": splits_base(settings.get("init_lora_weights", True)),
        "its scale differs between modules (alpha_pattern, or rank_pattern), and vLLM applies one to all, without an "
        "error": settings.get("alpha_pattern") or settings.get("rank_pattern"),
        f"its rank is {max(ranks)}, and vLLM's largest is {VLLM_MOST_RANK}": max(ranks) > VLLM_MOST_RANK,
    }
    cure = "merge it into the base model: llmforge export --format merged"
    if settings.get("lora_bias"):  # see `describe_unmergeable`
        cure += ", which needs biases in every layer that it adapts"
    return [f"The adapter cannot be served as it is: {why}; {cure}" for why, is_so in found.items() if is_so]


@dataclass(frozen=True)
class _Unit:
    """An adapted module: PEFT's layer without weights, and the tensors of base and adapter that fill it.

    `outputs` are the plain module's parameters; the keys of `from_base` and `from_adapter` are names in the layer.
    """

    name: str
    layer: Any
    outputs: tuple[str, ...]
    from_base: dict[str, str]
    from_adapter: dict[str, str]


def _plan(base: ModelSource, adapter: Path, trust_remote_code: bool) -> "_Plan | None":
    """Find out what is merged with what; None where it cannot be done tensor by tensor.

    Raises:
        ModelError: the adapter lacks tensors.
    """
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if base.pickles or settings.get("layer_replication") or splits_base(settings.get("init_lora_weights", True)):
        return None
    skeleton = build_skeleton(base, trust_remote_code=trust_remote_code)
    if getattr(skeleton.config, "quantization_config", None) is not None:
        return None
    plan = _Plan(base.directory, adapter, skeleton)
    if not plan.in_adapter:
        raise ModelError(f"the adapter in {adapter} holds no tensors; save it again")
    try:
        with torch.device("meta"):
            fit_to_adapter(skeleton, adapter)
            plan.add_units(skeleton)
    except ValueError:  # what it adapts has another name here (PEFT translates some on loading), or it fits nothing
        return None
    missing, unknown = plan.wanted - plan.in_adapter, plan.in_adapter - plan.wanted
    if missing and not unknown:
        raise ModelError(
            f"the adapter in {adapter} lacks {len(missing)} of the {len(plan.wanted)} tensors that its config asks for "
            f"({sorted(missing)[0]}, for one); save it again"
        )
    conversions = [each for each in get_model_conversion_mapping(skeleton) if isinstance(each, WeightConverter)]
    in_files = {plan.find(name) for name in plan.touched}
    if missing or unknown or None in in_files:
        return None
    sources = [pattern for conversion in conversions for pattern in conversion.source_patterns]
    return None if any(re.search(pattern, str(name)) for pattern in sources for name in in_files) else plan


class _Plan:
    """The base's tensors, by the names they have in its files, and the adapted modules of its skeleton."""

    def __init__(self, base: Path, adapter: Path, skeleton: Any) -> None:
        self.config = skeleton.config
        self.config.architectures = [type(skeleton).__name__]
        self.wanted: set[str] = set()  # the adapter's tensors, as its config has them
        self.units: list[_Unit] = []
        self.replaced: dict[str, str] = {}  # a base's parameter that the adapter holds whole → the adapter's tensor
        self._adapter = adapter / ADAPTER_WEIGHTS
        with safe_open(self._adapter, framework="pt") as file:
            self.in_adapter = set(file.keys())
        self._files = _files_of_tensors(base)
        self._prefix = f"{skeleton.base_model_prefix}."
        self._tied = _tied_names(skeleton)
        self._shapes: dict[str, torch.Size] = {}

    def add_units(self, skeleton: Any) -> None:
        """Wrap a skeleton with PEFT's layers and find out which tensor fills each of their parameters."""
        self._shapes = {name: p.shape for name, p in skeleton.named_parameters(remove_duplicate=False)}
        own = {id(parameter): name for name, parameter in skeleton.named_parameters()}
        config = peft.PeftConfig.from_pretrained(self._adapter.parent)
        config.inference_mode = True
        model = peft.PeftModel(skeleton, config, autocast_adapter_dtype=False)
        model.base_model._check_merge_allowed()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        saved = peft.get_peft_model_state_dict(
            model, state_dict={**parameters, **dict(model.named_buffers())}, save_embedding_layers=False
        )
        # One parameter may have two names, of which the file has one or both.
        held = {id(tensor): name for name, tensor in saved.items() if name in self.in_adapter}
        self.wanted = {name for name, tensor in saved.items() if name in self.in_adapter or id(tensor) not in held}
        for name, layer in skeleton.named_modules():
            if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                continue
            if any(name.startswith(f"{unit.name}.") for unit in self.units):
                continue
            plain = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
            inner = dict(layer.named_parameters(remove_duplicate=False))
            from_adapter = {key: held[id(p)] for key, p in inner.items() if id(p) in held}
            # What modules_to_save replaces need not be read.
            read = {} if isinstance(layer, ModulesToSaveWrapper) else inner
            from_base = {k: own[id(p)] for k, p in read.items() if id(p) in own and k not in from_adapter}
            outputs = tuple(f"{name}.{key}" for key, _ in plain.named_parameters())
            self.units.append(_Unit(name, layer, outputs, from_base, from_adapter))
        used = {name for unit in self.units for name in unit.from_adapter.values()}
        self.replaced = {own[i]: name for i, name in held.items() if name not in used and i in own}

    @property
    def touched(self) -> set[str]:
        """The base's parameters that the adapter changes."""
        return {
            name for unit in self.units for name in (*unit.outputs, *unit.from_base.values())
        } | self.replaced.keys()

    def find(self, name: str) -> str | None:
        """Find the name under which the files hold a parameter: its own, the base model's, or that of its tied twin."""
        names = [name, *(self._tied if name in self._tied else ())]
        return next((n for each in names for n in (each, each.removeprefix(self._prefix)) if n in self._files), None)

    def merged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Give all tensors of the merged model, in the order of the base's files, one adapted module at a time."""
        unit_of = {name: unit for unit in self.units for name in unit.outputs}
        twins = [name for name in self._tied if name in unit_of]
        if twins:
            yield from self._merged_twins({name: unit_of[name] for name in twins})
        done = {unit.name for unit in self.units if set(unit.outputs) & set(self._tied)}
        parameters = {found: name for name in self._shapes if (found := self.find(name)) is not None}
        handled = {self.find(name) for name in self._tied} | set(self._tied) if twins else set()
        for in_file in self._files:
            name = parameters.get(in_file, in_file)
            if in_file in handled:
                continue
            if name in unit_of:
                unit = unit_of[name]
                if unit.name not in done:
                    done.add(unit.name)
                    for output, tensor in self._merge(unit).items():
                        yield self.find(output) or output, tensor
            elif name in self.replaced:
                yield in_file, self._read_adapter(self.replaced[name]).to(self._dtype(in_file))
            else:
                yield in_file, self._read_base(name, in_file)

    def _merged_twins(self, units: Mapping[str, _Unit]) -> Iterator[tuple[str, torch.Tensor]]:
        """Merge the two sides of tied embeddings, each with what was trained of it; equal sides stay tied."""
        merged = {}
        for name in self._tied:
            outputs = self._merge(units[name]) if name in units else {name: self._read_base(name, str(self.find(name)))}
            merged[name] = outputs.pop(name)
            yield from outputs.items()  # an output layer's bias
        embedding, head = (merged[name] for name in self._tied)
        tied = torch.equal(embedding, head)
        self.config.tie_word_embeddings = tied
        self.config.get_text_config().tie_word_embeddings = tied
        if tied:
            yield str(self.find(self._tied[0])), embedding
            return
        first, second = (self._own_name(name) for name in self._tied)
        yield first, embedding
        yield second, head

    def _own_name(self, name: str) -> str:
        short = name.removeprefix(self._prefix)
        return short if short in self._files else name

    @torch.no_grad()
    def _merge(self, unit: _Unit) -> dict[str, torch.Tensor]:
        """Fill a layer, let PEFT merge it, take the plain module's parameters, and empty the layer again."""
        filled = {key: self._read_base(name, str(self.find(name))) for key, name in unit.from_base.items()}
        filled |= {key: self._read_adapter(name) for key, name in unit.from_adapter.items()}
        layer = unit.layer
        layer.load_state_dict(filled, strict=False, assign=True)
        if hasattr(layer, "unload_and_optionally_merge_module"):
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            layer.merge(safe_merge=True)
            plain = layer.get_base_layer()
        merged = {f"{unit.name}.{key}": p.detach() for key, p in plain.named_parameters()}
        layer.to("meta")
        return {name: tensor.to(self._dtype(str(self.find(name)))) for name, tensor in merged.items()}

    def _read_base(self, name: str, in_file: str) -> torch.Tensor:
        """Read a base's tensor; rows that the adapter was trained with and the base lacks are zero."""
        with safe_open(self._files[in_file], framework="pt") as file:
            tensor = file.get_tensor(in_file)
        shape = self._shapes.get(name, tensor.shape)
        if tensor.shape == shape:
            return tensor
        if tensor.ndim != len(shape) or tensor.shape[1:] != shape[1:] or len(tensor) > shape[0]:
            raise ValueError(f"{in_file} has the shape {list(tensor.shape)}, config.json asks for {list(shape)}")
        return torch.cat([tensor, tensor.new_zeros(shape[0] - len(tensor), *shape[1:])])

    def _read_adapter(self, name: str) -> torch.Tensor:
        with safe_open(self._adapter, framework="pt") as file:
            tensor = file.get_tensor(name)
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor  # as PEFT loads it

    def _dtype(self, in_file: str) -> torch.dtype:
        with safe_open(self._files[in_file], framework="pt") as file:
            slice_ = file.get_slice(in_file)
            return slice_[:0].dtype if slice_.get_shape() else file.get_tensor(in_file).dtype


class _Shards:
    """Writes tensors into safetensors files of a limited size, and the index if there is more than one."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in a tensor; when it no longer fits into the current shard, that is written and a new one begins."""
        if self._tensors and self._bytes + tensor.nbytes > self._max_bytes:
            self._write()
        self._tensors[name] = tensor.contiguous()
        self._bytes += tensor.nbytes

    def close(self) -> None:
        """Write the last shard, give all of them their names, and write the index."""
        self._write()
        count = len(self._shards)
        names = [WEIGHTS] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        for number, name in enumerate(names):
            self._part(number).rename(self._directory / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        save_file(self._tensors, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._tensors))
        self._total += self._bytes
        self._tensors, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f".model-{number}.part"


def _merge_in_memory(
    base: ModelSource,
    adapter: Path,
    target: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    trust_remote_code: bool,
) -> None:
    model = load_base_model(base, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    fit_to_adapter(model, adapter)
    merged = merge(peft.PeftModel.from_pretrained(model, adapter))
    merged.generation_config = transformers.GenerationConfig()  # the base's own may be one that cannot be saved
    merged.save_pretrained(target, max_shard_size=max_shard_bytes)


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    """Give the file that holds each tensor of a plain directory, in the order of files and of tensors in them."""
    index = directory / INDEX
    names = [WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files: dict[str, Path] = {}
    for name in names:
        with safe_open(directory / name, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), directory / name)
    return files


def _tied_names(model: Any) -> tuple[str, ...]:
    """Give the names of input and output embedding where they are one tensor, else none."""
    if not is_tied(model):
        return ()
    sides = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    return tuple(f"{names[side]}.weight" for side in sides)
