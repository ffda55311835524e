"""A Modelfile for Ollama, with the weights that it names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmforge.atomic import write_atomically
from llmforge.errors import PromptFormatError
from llmforge.export.targets import gguf
from llmforge.export.targets.trained import Trained, as_yaml_comment
from llmforge.prompt.go_template import compile_to_go_template

MODELFILE = "Modelfile"
SMALLEST_CONTEXT = 4096  # Ollama's default where there is little memory; what is longer is cut without a word

PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
"""Ollama's name for each of transformers' generation options that it has."""


def write(trained: Trained, directory: Path) -> list[str]:
    """Write `Modelfile`, and beside it the model: a GGUF file where llama.cpp's converter is installed.

    Without the converter, the merged model directory is written, which Ollama converts when it creates the model.

    Raises:
        PromptFormatError: format or stop sequences cannot be written in a Modelfile.
    """
    format = trained.plain_format()
    options = trained.generation.to_diff_dict()
    notes = [f"in this directory: `ollama create {trained.name} -f Modelfile`, then `ollama run {trained.name}`"]
    converter = gguf.find_converter()
    if converter is None:
        source = "model"
        trained.write_for_gguf(directory / source)
        notes.append(
            "Ollama converts the weights itself, for the architectures that it knows; for others, install llama.cpp's "
            "converter and export again"
        )
    else:
        source = "model.gguf"
        gguf.convert(trained, directory / source, converter)
    unknown = sorted(set(options) & _SAMPLING_ELSEWHERE)
    if unknown:
        notes.append(f"Ollama has no {', '.join(unknown)}; answers may differ")
    notes.append("Ollama joins consecutive messages of one role, and goes on with a last message of the assistant")
    text = modelfile(
        source=f"./{source}",
        template=compile_to_go_template(format),
        stops=trained.stop_texts(),
        parameters=parameters(options, trained.context_length),
    )
    write_atomically(directory / MODELFILE, as_yaml_comment(notes[:1]) + text)
    return notes


_SAMPLING_ELSEWHERE = {
    *("epsilon_cutoff", "eta_cutoff", "top_h", "no_repeat_ngram_size", "encoder_repetition_penalty", "penalty_alpha"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "min_new_tokens", "min_length"),
}


def parameters(options: Mapping[str, Any], context_length: int | None) -> dict[str, str]:
    """Translate generation options; a penalty counts the whole context, as transformers' does, not 64 tokens."""
    found = {PARAMETERS[name]: str(value) for name, value in options.items() if name in PARAMETERS}
    if options.get("do_sample") is False:
        found["temperature"] = "0"
    if "repeat_penalty" in found:
        found["repeat_last_n"] = "-1"
    if context_length is not None and context_length > SMALLEST_CONTEXT:
        found["num_ctx"] = str(context_length)
    return found


def modelfile(*, source: str, template: str, stops: list[str], parameters: Mapping[str, str]) -> str:
    """Write a Modelfile.

    Raises:
        PromptFormatError: a value cannot be written so that Ollama reads it back unchanged.
    """
    lines = [f"FROM {source}", f"TEMPLATE {quote(template)}"]
    lines += [f"PARAMETER stop {quote(stop)}" for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"


def quote(value: str) -> str:
    r"""Quote a value of a Modelfile: between triple quotes stands everything but what would end them.

    Ollama's parser knows no escapes, drops what is not printable (blank, tab and line breaks excepted), and ends the
    value at triple quotes before a line break (`parser/parser.go` of https://github.com/ollama/ollama).

    Raises:
        PromptFormatError: the value holds one of these.
    """
    lost = sorted({character for character in value if not character.isprintable() and character not in "\t\r\n"})
    if lost:
        raise PromptFormatError(
            f"Ollama's Modelfile cannot hold {', '.join(map(repr, lost))}, which is in {value!r}; serve this model "
            "with vLLM or llama.cpp, or train it with other stopping_sequences"
        )
    if re.search(r'"""\s*[\r\n]', value):
        raise PromptFormatError(f"Ollama's Modelfile cannot hold triple quotes before a line break, as in {value!r}")
    return f'"""{value}"""'
