"""A trained model as the targets see it: an artifact that was opened, and its merged weights on demand."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from llmforge.atomic import write_atomically
from llmforge.errors import PromptFormatError
from llmforge.export.artifact import stop_strings
from llmforge.export.card import merged_card
from llmforge.export.fingerprint import weight_hashes
from llmforge.export.proof import FILE_NAME as PROOF
from llmforge.export.proof import unproven_record
from llmforge.export.targets.vocabulary import Spacing, new_tokens
from llmforge.models.load import as_plain_directory, load_tokenizer, quiet, read_facts
from llmforge.models.merge import INDEX, merge_adapter
from llmforge.models.rope import add_old_rope_keys
from llmforge.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource, check_weights
from llmforge.models.trained import find_base_model, is_adapter
from llmforge.prompt import Encoder, PromptFormat, StopRules, chat_template_of, load_format
from llmforge.prompt.infer import infer_format

CARD, CHAT_TEMPLATE, TOKENIZER_CONFIG = "README.md", "chat_template.jinja", "tokenizer_config.json"
SENTENCEPIECE, ADDED_TOKENS = "tokenizer.model", "added_tokens.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_OF_THE_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROOF)  # what a merged model no longer is


@dataclass(frozen=True)
class Trained:
    """An artifact, and what is wanted of it.

    `name` is what servers call the model. `dtype` is that of merged weights, None for the one they have.
    `context_length` is what it was trained with, where that is known. `context_limit` is what servers are to allow, if
    anybody said so: a length that was derived from short rows is no reason to refuse long prompts.
    """

    artifact: Path
    name: str
    encoder: Encoder
    stop: StopRules
    generation: transformers.GenerationConfig
    cache_dir: Path
    dtype: str | None = None
    context_length: int | None = None
    context_limit: int | None = None
    trust_remote_code: bool = False
    allow_pickle_weights: tuple[str, ...] = ()

    @classmethod
    def open(cls, artifact: Path, **options: Any) -> "Trained":
        """Read all of an artifact but its weights.

        Raises:
            InputError: a part of it is missing or damaged.
        """
        code = options.get("trust_remote_code", False)
        tokenizer = load_tokenizer(ModelSource(str(artifact), artifact), trust_remote_code=code)
        encoder, stop = load_format(artifact, tokenizer)
        with quiet():
            generation = transformers.GenerationConfig.from_pretrained(artifact)
        return cls(artifact, encoder=encoder, stop=stop, generation=generation, **options)

    @property
    def is_adapter(self) -> bool:
        """Whether the artifact is an adapter, and not whole weights."""
        return is_adapter(self.artifact)

    def base_model(self) -> ModelSource:
        """Find the adapter's base model."""
        return find_base_model(
            self.artifact, trust_remote_code=self.trust_remote_code, allow_pickle_weights=self.allow_pickle_weights
        )

    def adapter_settings(self) -> dict[str, Any]:
        """Read the adapter's own config."""
        return json.loads((self.artifact / ADAPTER_CONFIG).read_text(encoding="utf-8"))

    def model_type(self) -> str:
        """Give transformers' name of the architecture.

        Raises:
            ModelError: the base model's or the artifact's config cannot be read.
        """
        source = ModelSource(str(self.artifact), self.artifact)
        if self.is_adapter:
            source = as_plain_directory(self.base_model(), self.cache_dir)
        return read_facts(source, trust_remote_code=self.trust_remote_code).architecture

    def write_merged(self, directory: Path) -> None:
        """Write whole weights with all that belongs to them: a plain model directory, and again an artifact."""
        self._write_whole(directory)
        if (record := unproven_record(self.artifact, weight_hashes(directory))) is not None:
            write_atomically(directory / PROOF, record)

    def _write_whole(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        if self.is_adapter:
            base = as_plain_directory(self.base_model(), self.cache_dir)
            merge_adapter(base, self.artifact, directory, dtype=dtype, trust_remote_code=self.trust_remote_code)
            self._copy_documents(directory)
            card = directory / CARD
            if card.is_file():
                write_atomically(card, merged_card(card.read_text(encoding="utf-8")))
        else:
            check_weights(self.artifact, key="artifact")
            self._copy_documents(directory)
            for path in sorted(self.artifact.glob("*.safetensors")):
                _copy_weights(path, directory / path.name, dtype)
            if dtype is not None:
                _note_dtype(directory, dtype)
        add_old_rope_keys(directory, trust_remote_code=self.trust_remote_code)

    def write_for_gguf(self, directory: Path, *, chat_template: bool = True) -> None:
        """Write the merged model as llama.cpp's converter and Ollama's have to find it, to become a GGUF file.

        Chat templates write the BOS token, so nothing else may (`add_bos_token`): a server would write it a second
        time, or where the format has none. A GGUF file names one end token, so it has to be the one that ends turns.
        For some architectures both converters read SentencePiece's own file, which transformers no longer saves, and
        new tokens from `added_tokens.json`, which it does not write either.

        Args:
            directory: is created.
            chat_template: whether the file is to hold the chat template.
        """
        self._write_whole(directory)
        tokenizer = self.encoder.tokenizer
        if (original := self.sentencepiece_file()) is not None:
            shutil.copyfile(original, directory / SENTENCEPIECE)
            text = json.dumps(new_tokens(tokenizer), indent=2, ensure_ascii=False)
            write_atomically(directory / ADDED_TOKENS, text + "\n")
        settings: dict[str, Any] = {"add_bos_token": False}
        if (end := self.end_token()) is not None:
            settings["eos_token"] = tokenizer.convert_ids_to_tokens(end)
        if (spacing := Spacing.of(self.encoder)) is not None:
            settings["add_prefix_space"] = spacing.prefix
        _edit_json(directory / TOKENIZER_CONFIG, **settings)
        if not chat_template:
            (directory / CHAT_TEMPLATE).unlink(missing_ok=True)
            _edit_json(directory / TOKENIZER_CONFIG, chat_template=None)

    def sentencepiece_file(self) -> Path | None:
        """Find SentencePiece's own file: beside the base model's weights, or in an artifact of whole weights."""
        file = (self.base_model().directory if self.is_adapter else self.artifact) / SENTENCEPIECE
        return file if file.is_file() else None

    def end_token(self) -> int | None:
        """Give the token that ends a turn, or the tokenizer's EOS; a template that asks for `eos_token` needs the EOS.

        A turn may end in a token that is not special (`added_tokens`): then it is a stop sequence.
        None: the model has neither.
        """
        eos = self.encoder.tokenizer.eos_token_id
        if "eos_token" in chat_template_of(self.encoder.format):
            return eos
        sequences = [self.encoder.encode_text(sequence) for sequence in self.stop.sequences]
        named = [ids[0] for ids in sequences if len(ids) == 1 and ids[0] in self.stop.token_ids]
        return next(iter([*self.encoder.stop_token_ids(), *named]), eos)

    def plain_format(self) -> PromptFormat:
        """Give the prompt format as plain templates.

        Raises:
            PromptFormatError: it is a Jinja template that plain templates cannot stand for; says why.
        """
        if isinstance(self.encoder.format, PromptFormat):
            return self.encoder.format
        found = infer_format(self.encoder.tokenizer)
        if found.format is None:
            raise PromptFormatError(
                "this target needs plain templates, and the model's Jinja chat template cannot be written as such: "
                f"{'; '.join(found.reasons)}. Serve it with a server that renders Jinja: --format merged or vllm, or "
                "--format gguf with llama.cpp's --jinja"
            )
        return found.format

    def stop_texts(self) -> list[str]:
        """Give every text that ends an answer, special tokens included."""
        tokens = [self.encoder.decode([token_id]) for token_id in self.stop.token_ids]
        return list(dict.fromkeys([*self.stop.sequences, *filter(None, tokens)]))

    def stop_strings(self) -> list[str]:
        """Give the texts that end an answer and are no single token that ends it anyway."""
        return stop_strings(self.encoder, self.stop)

    def _copy_documents(self, directory: Path) -> None:
        for path in sorted(self.artifact.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and path.name not in _OF_THE_ADAPTER:
                shutil.copyfile(path, directory / path.name)


def as_yaml_comment(lines: Sequence[str]) -> str:
    """Write lines as a comment of YAML, a Modelfile or a shell."""
    return "".join(f"# {line}\n" for text in lines for line in text.splitlines())


def _copy_weights(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    if dtype is None:
        shutil.copyfile(source, target)
        return
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(cast, target, metadata=metadata)


def _note_dtype(directory: Path, dtype: torch.dtype) -> None:
    _edit_json(directory / "config.json", dtype=str(dtype).removeprefix("torch."))
    if (directory / INDEX).is_file():
        size = 0
        for path in directory.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                size += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        _edit_json(directory / INDEX, metadata={"total_size": size})


def _edit_json(path: Path, **values: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    content = {name: value for name, value in content.items() if name not in values or value is not None}
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
