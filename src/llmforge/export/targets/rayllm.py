"""YAML for RayLLM, which LLMForge's models were served with, and for its successor, Ray Serve LLM.

`llmforge serve --config` takes each of these files as well.
"""

from pathlib import Path
from typing import Any

import yaml

from llmforge.atomic import write_atomically
from llmforge.errors import PromptFormatError
from llmforge.export.targets.trained import Trained, as_yaml_comment
from llmforge.export.targets.vllm import RANKS, why_merged
from llmforge.prompt import PromptFormat, chat_template_of
from llmforge.prompt.encoder import own_bos
from llmforge.prompt.format import PLACEHOLDER

RAYLLM = "rayllm.yaml"
SERVE, SERVE_LORA = "serve_config.yaml", "serve_config_lora.yaml"
MODEL_CONFIG, MODEL_CONFIG_LORA = "model_config.yaml", "model_config_lora.yaml"
ACCELERATOR = "A10G"
CONTEXT, MOST_STOPS = 2048, 8  # RayLLM's own default, and its limit
MODEL = "./model"
PLACEHOLDERS = [
    "`llmforge serve --config` takes this file as it is. For a cluster, change the placeholders:",
    f"{MODEL} into where every node finds the directory model/ beside this file, {ACCELERATOR} into its accelerator.",
]


def write(trained: Trained, directory: Path) -> list[str]:
    """Write the merged model, a config for each of the two, and one that serves the adapter where that is possible."""
    trained.write_merged(directory / "model")
    notes = [
        f"here: `llmforge serve --config {SERVE}`; on a Ray cluster, change the placeholders, then `serve run {SERVE}`"
    ]
    try:
        _dump(directory / RAYLLM, rayllm_config(trained), PLACEHOLDERS)
        notes.append(f"{RAYLLM} is for RayLLM (ray-project/ray-llm), which ended in 2024")
    except PromptFormatError as error:
        notes.append(f"{RAYLLM} is not written: {error}")
    _dump(directory / SERVE, _application(ray_serve_config(trained)), PLACEHOLDERS)
    generation = {"generation_config": generation_section(trained)}
    _dump(directory / MODEL_CONFIG, ray_serve_config(trained) | generation, PLACEHOLDERS)
    notes.append(
        f"{MODEL_CONFIG} spells out prompt format and stop rules (generation_config), which Ray's servers read up to "
        f"Ray 2.43; later ones refuse the key, and take {SERVE}: chat template and end tokens are those in model/"
    )
    if trained.is_adapter and not why_merged(trained):
        upload = (
            f"Put what `llmforge export --format adapter` writes under dynamic_lora_loading_path as {trained.name}/; "
            f"clients ask for the model {trained.name}-base:{trained.name}."
        )
        lora = ray_serve_lora_config(trained)
        _dump(directory / SERVE_LORA, _application(lora), [*PLACEHOLDERS, upload])
        _dump(directory / MODEL_CONFIG_LORA, lora | generation, [*PLACEHOLDERS, upload])
    if trained.stop_strings():
        notes.append(f"clients of Ray Serve LLM have to send stop: {trained.stop_strings()!r}")
    return notes


def rayllm_config(trained: Trained) -> dict[str, Any]:
    """Build RayLLM's model YAML, every value of the prompt format written out.

    Raises:
        PromptFormatError: RayLLM cannot express the format or what ends an answer.
    """
    resource = {f"accelerator_type_{ACCELERATOR.lower()}": 0.01}
    return {
        "deployment_config": {
            "autoscaling_config": {"min_replicas": 1, "initial_replicas": 1, "max_replicas": 1},
            "max_concurrent_queries": 64,
            "ray_actor_options": {"resources": resource},
        },
        "engine_config": {
            "model_id": trained.name,
            "hf_model_id": MODEL,
            "type": "VLLMEngine",
            "engine_kwargs": {"trust_remote_code": trained.trust_remote_code},
            "max_total_tokens": trained.context_limit or max(CONTEXT, trained.context_length or 0),
            "generation": {
                "prompt_format": rayllm_prompt_format(trained.plain_format(), own_bos(trained.encoder.tokenizer)),
                "stopping_sequences": rayllm_stops(trained.stop_texts()),
                "generate_kwargs": _sampling(trained),
            },
        },
        "scaling_config": {
            "num_workers": 1,
            "num_gpus_per_worker": 1,
            "num_cpus_per_worker": 4,
            "placement_strategy": "STRICT_PACK",
            "resources_per_worker": resource,
        },
    }


def rayllm_stops(texts: list[str]) -> list[str]:
    """Give the texts that end an answer, if RayLLM can look for them (`rayllm/backend/server/models.py`).

    Raises:
        PromptFormatError: it takes a number for a token id, or there are more than it allows.
    """
    if len(texts) > MOST_STOPS:
        raise PromptFormatError(f"RayLLM allows {MOST_STOPS} stopping sequences, and this model has {len(texts)}")
    numbers = [text for text in texts if _is_number(text)]
    if numbers:
        raise PromptFormatError(f"RayLLM takes the stopping sequence {numbers[0]!r} for a token id")
    return texts


def _is_number(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def rayllm_prompt_format(format: PromptFormat, tokenizer_bos: str) -> dict[str, Any]:
    """Write a format under the keys that RayLLM allows (`rayllm/common/models.py`), for the same text.

    RayLLM has no `bos`: the tokenizer's own goes in front of every text. It fills templates with Python's
    `str.format`, where every other brace has to be doubled.

    Args:
        format: the format that was trained with.
        tokenizer_bos: what the tokenizer puts in front of plain text.

    Raises:
        PromptFormatError: the text would not be the same; says why.
    """
    if format.bos != tokenizer_bos:
        raise PromptFormatError(
            f"RayLLM begins every text with what the tokenizer puts there, {tokenizer_bos!r}, and the model was "
            f"trained with {format.bos!r}"
        )
    _check_stripping(format)
    return _filled_by_python(format, exclude={"bos"})


def _filled_by_python(format: PromptFormat, exclude: set[str]) -> dict[str, Any]:
    keys = format.model_dump(exclude=exclude)
    for role in ("system", "user", "assistant"):
        placeholders = {"{instruction}"} | ({"{system}"} if role == "user" and format.system_in_user else set())
        keys[role] = _with_doubled_braces(keys[role], placeholders)
    return keys


def _check_stripping(format: PromptFormat) -> None:
    if format.strip_whitespace and format.system_in_user:
        raise PromptFormatError(
            "with system_in_user, RayLLM does not strip the system message, and the model was trained with "
            "strip_whitespace"
        )


def generation_section(trained: Trained) -> dict[str, Any]:
    """Build LLMForge's `generation_config`, as RayLLM's last version took it: with `bos` and `stopping_tokens`.

    A format that cannot be written so is that of the tokenizer's chat template, which renders the same.
    """
    try:
        format = trained.plain_format()
        _check_stripping(format)
        prompt_format = _filled_by_python(format, exclude=set())
    except PromptFormatError:
        prompt_format = {"use_hf_chat_templates": True}
    return {
        "prompt_format": prompt_format,
        "stopping_sequences": list(trained.stop.sequences),
        "stopping_tokens": list(trained.stop.token_ids),
        "generate_kwargs": _sampling(trained),
    }


def _with_doubled_braces(template: str, placeholders: set[str]) -> str:
    text, position = "", 0
    for match in PLACEHOLDER.finditer(template):
        if match[0] in placeholders:
            text += template[position : match.start()].replace("{", "{{").replace("}", "}}") + match[0]
            position = match.end()
    return text + template[position:].replace("{", "{{").replace("}", "}}")


def ray_serve_config(trained: Trained) -> dict[str, Any]:
    """Build Ray Serve LLM's model config for the merged model, whose tokenizer brings the chat template."""
    return {
        "model_loading_config": {"model_id": trained.name, "model_source": MODEL},
        "accelerator_type": ACCELERATOR,
        "engine_kwargs": _engine_kwargs(trained),
    }


def ray_serve_lora_config(trained: Trained) -> dict[str, Any]:
    """Build Ray Serve LLM's model config for the base model with adapters that are loaded from a bucket on demand."""
    settings = trained.adapter_settings()
    return {
        "model_loading_config": {
            "model_id": f"{trained.name}-base",
            "model_source": settings["base_model_name_or_path"],
        },
        "lora_config": {
            "dynamic_lora_loading_path": "s3://YOUR_BUCKET/adapters",
            "max_num_adapters_per_replica": 16,
        },
        "accelerator_type": ACCELERATOR,
        "engine_kwargs": {
            **_engine_kwargs(trained),
            "enable_lora": True,
            "max_lora_rank": next(rank for rank in RANKS if rank >= settings["r"]),
            # The base model brings neither the template nor the end tokens that were trained.
            "tokenizer": MODEL,
            "generation_config": MODEL,
            "chat_template": chat_template_of(trained.encoder.format),
        },
    }


def _application(llm_config: dict[str, Any]) -> dict[str, Any]:
    builder = {"import_path": "ray.serve.llm:build_openai_app", "args": {"llm_configs": [llm_config]}}
    return {"applications": [{"name": "llm", "route_prefix": "/", **builder}]}


def _engine_kwargs(trained: Trained) -> dict[str, Any]:
    limits = {} if trained.context_limit is None else {"max_model_len": trained.context_limit}
    return {**limits, **({"trust_remote_code": True} if trained.trust_remote_code else {})}


def _sampling(trained: Trained) -> dict[str, Any]:
    """Give the options that RayLLM's sampling parameters have."""
    options = trained.generation.to_diff_dict()
    found = {name: options[name] for name in ("temperature", "top_p", "top_k") if name in options}
    if options.get("do_sample") is False:
        found = {"temperature": 0.0}
    if "max_new_tokens" in options:
        found["max_tokens"] = options["max_new_tokens"]
    return found


class _Dumper(yaml.SafeDumper):
    """Writes no anchors, and templates in double quotes, which keep every character."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isidentifier() else '"'
    ),
)


def _dump(path: Path, config: dict[str, Any], comment: list[str]) -> None:
    text = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    write_atomically(path, as_yaml_comment(comment) + text)
