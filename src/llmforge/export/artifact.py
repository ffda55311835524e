"""Writes the artifact: the trained model as plain Hugging Face files that load without llmforge installed."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from llmforge.atomic import atomic_directory
from llmforge.errors import InputError
from llmforge.models.adapter import subtract_starting_point
from llmforge.models.load import quiet, save_tokenizer
from llmforge.prompt import Encoder, StopRules, chat_template_of, save_format

# Options that only sampling reads: to give one is to ask for sampling.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_INSTEAD = {
    "eos_token_id": "generation_config.stopping_tokens",
    "stop_strings": "generation_config.stopping_sequences",
    "max_tokens": "max_new_tokens",
}
# An answer is one text, produced token by token.
_NOT_FOR_ANSWERS = ("num_beams", "num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits")


def build_generation_config(
    encoder: Encoder, stop: StopRules, generate_kwargs: Mapping[str, Any]
) -> transformers.GenerationConfig:
    """Build what `generation_config.json` says: where an answer ends, and how its tokens are chosen.

    A sampling option switches sampling on unless `do_sample` is given; a temperature of 0 means none.

    Raises:
        InputError: an option that transformers does not know, or a value that it refuses.
    """
    options = dict(generate_kwargs)
    known = transformers.GenerationConfig().to_dict()
    for name in options:
        if name in _INSTEAD:
            raise InputError(f"given {name}; use {_INSTEAD[name]} instead")
        if name in _NOT_FOR_ANSWERS:
            raise InputError(f"given {name}; an answer is one text, produced token by token; remove it")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"given {name}; allowed are the fields of transformers' GenerationConfig"
                + (f"; did you mean {near[0]}?" if near else ", such as max_new_tokens, temperature, top_p")
            )
    if options.get("temperature") == 0:
        options = {name: value for name, value in options.items() if name not in _SAMPLING} | {"do_sample": False}
    elif any(name in options for name in _SAMPLING):
        options.setdefault("do_sample", True)
    try:
        generation = transformers.GenerationConfig(
            eos_token_id=list(stop.token_ids) or None,
            pad_token_id=encoder.tokenizer.pad_token_id,
            bos_token_id=encoder.tokenizer.bos_token_id,
            stop_strings=stop_strings(encoder, stop) or None,
            **options,
        )
        with quiet():
            generation.validate(strict=True)
    except (ValueError, TypeError) as error:
        words = [
            line.removeprefix("- ") for line in str(error).splitlines() if not line.startswith("GenerationConfig is")
        ]
        raise InputError(f"transformers refuses it: {words[0]}") from error
    return generation


def stop_strings(encoder: Encoder, stop: StopRules) -> list[str]:
    """Give the stop sequences that no stop token stands for, so that they have to be looked for in the text.

    Only these are in `generation_config.json`: transformers' `generate` then asks for `tokenizer=`, which is better
    than an answer that runs on, but nothing to ask of the many models that end their answers with a token.
    """
    return [text for text in stop.sequences if encoder.encode_text(text) not in [[token] for token in stop.token_ids]]


def write_artifact(
    directory: Path,
    *,
    model: Any,
    start: Mapping[str, torch.Tensor],
    base_model: str,
    revision: str | None,
    dtype: torch.dtype,
    encoder: Encoder,
    stop: StopRules,
    generate_kwargs: Mapping[str, Any],
    finish: Callable[[Path], None],
) -> None:
    """Write weights or adapter, tokenizer with the compiled chat template, generation config and prompt format.

    Args:
        directory: becomes the artifact in one step, once everything is written.
        model: a PEFT model, whose adapter is saved, or a plain model, whose weights are saved in `dtype`. A plain model
            is cast in place.
        start: an adapter's `starting_point`, in which the base weights of `model` differ from the published ones.
        base_model: the hub id or directory under which an adapter's base model is found again.
        finish: proves what was written and adds what else belongs into the directory (proof, card, loss curve). It may
            load the model again: this function holds it no longer then.

    Raises:
        ProofError: from `finish`: what was written is not what was trained.
        OutputError: the disk is full or cannot be written to.
    """
    generation = build_generation_config(encoder, stop, generate_kwargs)
    with quiet(), atomic_directory(directory) as temporary:
        if isinstance(model, peft.PeftModel):
            config = model.peft_config["default"]
            config.base_model_name_or_path = base_model
            config.revision = revision
            if isinstance(config.target_modules, set):  # whose order is another one in each process
                config.target_modules = sorted(config.target_modules)
            # "auto" would add whole embedding matrices, and ask the hub whether the vocabulary has grown.
            model.save_pretrained(temporary, save_embedding_layers=False)
            if start:
                subtract_starting_point(temporary, start)
        else:
            model.generation_config = generation  # the base model's own may be one that transformers refuses to save
            model.to(dtype).save_pretrained(temporary)
        del model
        write_text_side(temporary, encoder, stop, generation)
        finish(temporary)


def write_text_side(
    directory: Path, encoder: Encoder, stop: StopRules, generation: transformers.GenerationConfig
) -> None:
    """Write what decides how text becomes tokens and where answers end: all of an artifact but its weights."""
    with quiet():
        _save_tokenizer(directory, encoder)
        generation.save_pretrained(directory)
    save_format(directory, encoder.format, stop)


def _save_tokenizer(directory: Path, encoder: Encoder) -> None:
    """Save the tokenizer with the chat template under which any server renders what was trained on."""
    tokenizer = encoder.tokenizer
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = chat_template_of(encoder.format)
        save_tokenizer(tokenizer, directory)
    finally:
        tokenizer.chat_template = own
