"""A Modelfile for Ollama, with the weights that it names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmforge.atomic import write_atomically
from llmforge.errors import InputError, PromptFormatError, RunError
from llmforge.export.targets import gguf
from llmforge.export.targets.trained import Trained, as_yaml_comment
from llmforge.export.targets.vocabulary import Spacing, split_digest
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

SPLITS = {
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f": "llama-bpe",
    "03df5c5863ad70781dcfdef491ead25140f895fe8010964be0daefe27be32b02": "deepseek-llm",
    "21cde974d587f0d54dc8d56b183cc1e6239600172035c68fbd6d4b9f8da0576e": "deepseek-coder",
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e": "qwen2",
    "00431aed57e696b747435f734d1e3b9b1bfd931a121fb5cac7129e97c181e9ba": "qwen35",
    "b92c0824a58e1d8dc3221cf3e12c433c3a86f57e46d57229993489f0798e7702": "laguna",
}
"""The ways of splitting text that Ollama's converter knows, by the digest that it takes of a tokenizer's expressions.

From `parseTokenizer` in `convert/tokenizer.go` of https://github.com/ollama/ollama (v0.33.0). Any other tokenizer, one
without expressions too, is served with a way of splitting that is nobody's, and Ollama only logs it.
"""

OWN_RENDERERS = ("gemma4", "laguna", "nemotron_h")
"""Types of models (and what their names begin with) whose prompts Ollama writes itself, whatever `TEMPLATE` says.

From `createModel` in `server/create.go` of https://github.com/ollama/ollama (v0.33.0).
"""


def write(trained: Trained, directory: Path) -> list[str]:
    """Write `Modelfile`, and beside it the model: a GGUF file where llama.cpp's converter is installed.

    Without the converter, the merged model directory is written, which Ollama converts when it creates the model.

    Neither holds the chat template: Ollama prefers one in the model over `TEMPLATE` where it names tools or thoughts
    (`shouldPreferChatTemplate` in `server/images.go` of https://github.com/ollama/ollama).

    Raises:
        PromptFormatError: format or stop sequences cannot be written in a Modelfile, or Ollama would not use them.
        InputError: there is no converter, and Ollama's own would make other tokens of text.
        RunError: the converter fails.
    """
    format = trained.plain_format()
    template = compile_to_go_template(format)
    _check_renderer(trained.model_type())
    why_not = why_not_ollamas_converter(trained)
    options = trained.generation.to_diff_dict()
    notes = [f"in this directory: `ollama create {trained.name} -f Modelfile`, then `ollama run {trained.name}`"]
    converter = gguf.find_converter()
    if converter is None:
        if why_not:
            raise InputError(
                f"Ollama's own converter cannot be used for this model: {why_not}. Clone "
                "https://github.com/ggml-org/llama.cpp, set LLAMA_CPP_DIR to its directory and export again: its "
                "converter writes the GGUF file then"
            )
        source = "model"
        trained.write_for_gguf(directory / source, chat_template=False)
        notes.append(
            "Ollama converts the weights itself, for the architectures that it knows; for others, install llama.cpp's "
            "converter and export again"
        )
    else:
        source = "model.gguf"
        try:
            gguf.convert(trained, directory / source, converter, chat_template=False)
        except RunError as error:
            if why_not:
                raise
            raise RunError(
                f"{error}\nOllama converts some architectures itself: export again without LLAMA_CPP_DIR (and without "
                f"{gguf.CONVERTER} on the PATH) for a directory that it reads"
            ) from error
    unknown = sorted(set(options) & _SAMPLING_ELSEWHERE)
    if unknown:
        notes.append(f"Ollama has no {', '.join(unknown)}; answers may differ")
    notes.append("Ollama joins consecutive messages of one role, and goes on with a last message of the assistant")
    notes += gguf.warnings(trained)
    text = modelfile(
        source=f"./{source}",
        template=template,
        stops=trained.stop_texts(),
        parameters=parameters(options, trained.context_length),
    )
    write_atomically(directory / MODELFILE, as_yaml_comment(notes[:1]) + text)
    return notes


def why_not_ollamas_converter(trained: Trained) -> str | None:
    """Say why Ollama's own converter would make a model of this one that reads other tokens; None where it would not.

    It takes SentencePiece's own file where there is one, and everything else for byte-level BPE.
    """
    if trained.sentencepiece_file() is not None:
        spacing = Spacing.of(trained.encoder)
        if spacing is None or spacing.prefix:
            return None
        return (
            "this tokenizer puts no space behind special tokens, and Ollama's converter does not write that into the "
            "model (add_space_prefix)"
        )
    if split_digest(trained.artifact) in SPLITS:
        return None
    return (
        "it does not know how this tokenizer splits text before it looks words up, and would split it in another way "
        f"without saying so (it knows {', '.join(SPLITS.values())})"
    )


def _check_renderer(model_type: str) -> None:
    if model_type.startswith(OWN_RENDERERS):
        raise PromptFormatError(
            f"Ollama writes the prompts of {model_type} models itself and does not read a Modelfile's TEMPLATE, so "
            "they would not be those that were trained; serve this model with --format gguf and llama.cpp's --jinja, "
            "or with vLLM"
        )


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
