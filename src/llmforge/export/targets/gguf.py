"""A GGUF file for llama.cpp and what builds on it, made by llama.cpp's own converter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from llmforge.errors import InputError, RunError
from llmforge.export.targets.trained import Trained
from llmforge.export.targets.vocabulary import SPACE, Spacing
from llmforge.prompt import chat_template_of

CONVERTER = "convert_hf_to_gguf.py"
OUTPUT_TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", None: "auto"}


def write(trained: Trained, directory: Path) -> list[str]:
    """Write the model as one GGUF file, with its chat template in it.

    Raises:
        InputError: the converter is not installed.
        RunError: the converter refuses the model or does not write what it should.
    """
    converter = find_converter()
    if converter is None:
        raise InputError(
            f"GGUF files are written by llama.cpp's own converter, {CONVERTER}, and it is not there. Clone "
            "https://github.com/ggml-org/llama.cpp, set LLAMA_CPP_DIR to its directory and export again; or use "
            "--format merged and convert the result elsewhere"
        )
    file = f"{trained.name}.gguf"
    convert(trained, directory / file, converter)
    notes = [f"`llama-server --jinja -m {file}` serves it with the chat template that the file holds"]
    end = trained.end_token()
    others = [text for text in trained.stop_texts() if end is None or text != trained.encoder.decode([end])]
    if others:
        notes.append(f"clients have to send stop: {others!r}; a GGUF file holds one end token, and no stop strings")
    return notes + warnings(trained)


def warnings(trained: Trained) -> list[str]:
    """Say what llama.cpp does otherwise with this tokenizer, and no GGUF file can change."""
    spacing = Spacing.of(trained.encoder)
    return [spacing.warning] if spacing is not None and spacing.warning else []


def find_converter() -> list[str] | None:
    """Find the command that starts the converter: in `LLAMA_CPP_DIR`, or on the PATH.

    Raises:
        InputError: `LLAMA_CPP_DIR` is set and holds no converter.
    """
    if directory := os.environ.get("LLAMA_CPP_DIR"):
        script = Path(directory).expanduser() / CONVERTER
        if not script.is_file():
            raise InputError(f"LLAMA_CPP_DIR is {directory}, which has no {CONVERTER}; give a llama.cpp directory")
        return [sys.executable, str(script)]
    found = shutil.which(CONVERTER) or shutil.which("convert-hf-to-gguf")
    return None if found is None else [found]


def convert(trained: Trained, file: Path, converter: list[str], *, chat_template: bool = True) -> None:
    """Merge the model in a temporary directory beside `file` and convert it, with or without its chat template.

    Raises:
        RunError: the converter fails, or what it wrote is not what the model was trained with.
    """
    merged = file.with_name(f"{file.stem}-merged")
    trained.write_for_gguf(merged, chat_template=chat_template)
    output = ["--outfile", str(file), "--outtype", OUTPUT_TYPES[trained.dtype], "--model-name", trained.name]
    done = subprocess.run([*converter, str(merged), *output], capture_output=True, text=True, errors="replace")
    if done.returncode or not file.is_file():
        said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise RunError(f"llama.cpp's converter could not convert the model; it said:\n  {said}")
    shutil.rmtree(merged)
    _check(trained, file, chat_template)


def _check(trained: Trained, file: Path, chat_template: bool) -> None:
    fields = GGUFReader(file).fields

    def value(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    expected = {
        "tokenizer.chat_template": chat_template_of(trained.encoder.format) if chat_template else None,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": trained.end_token(),
    }
    for name, wanted in expected.items():
        if value(name) != wanted:
            raise RunError(
                f"the GGUF file has {name} = {value(name)!r:.200}, but the model was trained with {wanted!r:.200}; "
                "is the converter an old one? Take the current one of llama.cpp"
            )
    tokens = dict(enumerate(value("tokenizer.ggml.tokens") or []))
    for token_id, token in trained.encoder.tokenizer.added_tokens_decoder.items():
        if _plain(tokens.get(token_id, "")) != _plain(token.content):
            raise RunError(
                f"the GGUF file has {tokens.get(token_id)!r} as token {token_id}, but the model was trained with "
                f"{token.content!r}: its text would become other tokens. Serve --format merged or vllm instead"
            )
    spacing = Spacing.of(trained.encoder)
    if spacing is not None and value("tokenizer.ggml.model") == "llama":
        prefix = value("tokenizer.ggml.add_space_prefix")
        if spacing.prefix != (prefix is not False):  # llama.cpp takes true for a value that is not there
            raise RunError(
                f"the GGUF file has tokenizer.ggml.add_space_prefix = {prefix!r}, but this tokenizer needs "
                f"{spacing.prefix!r}: text behind special tokens would become other tokens. Serve --format merged or "
                "vllm instead"
            )


def _plain(token: str) -> str:
    return token.replace(SPACE, " ")  # as the converter writes it in tokens that are taken out of raw text
