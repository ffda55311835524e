"""Writes the README.md of an artifact: what it is, what it was trained on, and how to load it without llmforge.

Turns facts into Markdown; finds nothing out by itself and touches no file.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

_MOST_EVALUATIONS = 20  # rows of the table; a longer run shows this many, evenly spread, the best among them


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation during training; `metrics` holds what the task measures besides the loss."""

    step: int
    loss: float
    perplexity: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Everything a model card says.

    `base_model` is what loads the base: a hub id, a directory or a .gguf file; `hub_id` its id on the hub, if it has
    one. `hashes` names what shaped the model (data, base model, tokenizer, prompt format). `loss_curve` is a file
    beside the card. `embedding_rows` is how many rows the base's embeddings must get before an adapter with new tokens
    is loaded. `proof` says what was proven, line by line. `rendered_example` is a short conversation in the
    prompt format.
    """

    tag: str
    base_model: str
    hub_id: str | None
    is_adapter: bool
    task: str
    parameters: int
    trainable_parameters: int
    rows: int
    samples: int
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    epochs: float
    steps: int
    best_step: int
    first_train_loss: float
    last_train_loss: float
    evaluations: Sequence[Evaluation]
    prompt_format_yaml: str
    rendered_example: str
    stopping_sequences: Sequence[str]
    resolved_config_yaml: str
    hashes: Mapping[str, str]
    versions: Mapping[str, str]
    proof: Sequence[str]
    loss_curve: str | None = None
    embedding_rows: int | None = None


def model_card(facts: CardFacts) -> str:
    """Write the card: YAML front matter as the Hugging Face hub reads it, then Markdown."""
    sections = [
        f"# {_plain(facts.tag)}\n\n{_introduction(facts)}",
        f"## Use\n\n{_use(facts)}",
        f"## Prompt format\n\n{_prompt_format(facts)}",
        f"## Proof\n\n{_proof(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Losses\n\n{_losses(facts)}",
        f"## Made from\n\n{_table(('what', 'hash'), [(name, code(value)) for name, value in facts.hashes.items()])}",
        f"## Versions\n\n{_table(('package', 'version'), list(facts.versions.items()))}",
        f"## Configuration\n\nEvery value of the run, as `resolved_config.yaml` has it.\n\n"
        f"{fenced(facts.resolved_config_yaml, 'yaml')}",
    ]
    return front_matter(facts) + "\n" + "\n\n".join(sections) + "\n"


def front_matter(facts: CardFacts) -> str:
    """Write the metadata block. The license is left to the person who publishes: the base model's terms apply."""
    metadata: dict[str, object] = {}
    if facts.hub_id is not None:
        metadata["base_model"] = facts.hub_id
        metadata["base_model_relation"] = "adapter" if facts.is_adapter else "finetune"
    metadata["library_name"] = "peft" if facts.is_adapter else "transformers"
    metadata["pipeline_tag"] = "text-generation"
    metadata["tags"] = ["llmforge", "lora" if facts.is_adapter else "full"]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def fenced(text: str, language: str = "") -> str:
    """Put text verbatim into a code block, with a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}"


def code(text: str) -> str:
    """Put text verbatim into a line as code, backticks included. Line breaks and tabs are written as escapes."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * (longest + 1)
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""
    return f"{mark}{space}{text}{space}{mark}"


def loading_snippet(facts: CardFacts) -> str:
    """Write a program that loads the artifact with plain transformers (and peft) and answers one message."""
    folder, file = os.path.split(facts.base_model)
    base = f"{folder or '.'!r}, gguf_file={file!r}" if file.endswith(".gguf") else repr(facts.base_model)
    stops = f"    stop_strings={list(facts.stopping_sequences)!r},\n" if facts.stopping_sequences else ""
    load = "model = AutoModelForCausalLM.from_pretrained(artifact)"
    if facts.is_adapter and facts.embedding_rows is None:
        load = f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), artifact)"
    elif facts.is_adapter:
        load = (
            f"model = AutoModelForCausalLM.from_pretrained({base})\n"
            f"model.resize_token_embeddings({facts.embedding_rows}, mean_resizing=False)  # new tokens\n"
            "model = PeftModel.from_pretrained(model, artifact)"
        )
    return (
        ("from peft import PeftModel\n" if facts.is_adapter else "")
        + "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n\n"
        + 'artifact = "."  # the directory that holds this file\n'
        + "tokenizer = AutoTokenizer.from_pretrained(artifact)\n"
        + f"{load}\n\n"
        + 'messages = [{"role": "user", "content": "Hello!"}]\n'
        + "inputs = tokenizer.apply_chat_template(\n"
        + '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        + ")\n"
        + "output = model.generate(\n"
        + "    **inputs,\n"
        + "    generation_config=GenerationConfig.from_pretrained(artifact),\n"
        + "    max_new_tokens=200,\n"
        + stops
        + "    tokenizer=tokenizer,\n"
        + ")\n"
        + 'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )


def merged_card(card: str) -> str:
    """Turn the card of an adapter into that of the model it was merged into: another introduction and program."""
    loading = "model = AutoModelForCausalLM.from_pretrained(artifact)\n"
    for pattern, replacement in (
        (r"^base_model_relation: adapter$", "base_model_relation: finetune"),
        (r"^library_name: peft$", "library_name: transformers"),
        (r"^A LoRA adapter for (.+), made with", r"\1 with a LoRA adapter merged into it, made with"),
        (r"^With transformers and peft; llmforge", "With transformers; llmforge"),
        (r"^from peft import PeftModel\n", ""),
        (r"^model = (PeftModel|AutoModelForCausalLM)\.from_pretrained\(.*\n(model.*\n)*", loading),
        (r"^## Proof\n(?s:.*?)(?=^## )", ""),  # it is about the adapter
    ):
        card = re.sub(pattern, replacement, card, count=1, flags=re.MULTILINE)
    return card


def _introduction(facts: CardFacts) -> str:
    what = "A LoRA adapter for" if facts.is_adapter else "A full-parameter fine-tuning of"
    best = ", the best by evaluation loss" if facts.evaluations else ""
    return (
        f"{what} {code(facts.hub_id or facts.base_model)}, made with llmforge. "
        f"It holds the weights of step {facts.best_step:,}{best}."
    )


def _use(facts: CardFacts) -> str:
    packages = "transformers and peft" if facts.is_adapter else "transformers"
    return (
        f"With {packages}; llmforge is not needed. The tokenizer carries the prompt format as its chat template.\n\n"
        + fenced(loading_snippet(facts), "python")
    )


def _prompt_format(facts: CardFacts) -> str:
    stops = ", ".join(code(text) for text in facts.stopping_sequences)
    return (
        "The model was trained on exactly this format and should be asked in it. "
        "A short conversation looks like this:\n\n"
        f"{fenced(facts.rendered_example, 'text')}\n\n"
        f"As configured (`prompt_format.yaml`):\n\n{fenced(facts.prompt_format_yaml, 'yaml')}\n\n"
        f"Generation stops at {f'{stops} or ' if stops else ''}the end-of-sequence token."
    )


def _proof(facts: CardFacts) -> str:
    lines = fenced("\n".join(facts.proof), "text")
    return f"{lines}\n\n`proof.json` has the figures; `llmforge prove .` repeats them."


def _training(facts: CardFacts) -> str:
    share = facts.trainable_parameters / facts.parameters
    rows = [
        ("task", code(facts.task)),
        ("rows", f"{facts.rows:,} ({facts.samples:,} trained on)"),
        ("tokens per epoch", f"{facts.tokens_per_epoch:,}, of which {facts.trained_tokens_per_epoch:,} carry loss"),
        ("epochs", f"{facts.epochs:g}"),
        ("optimizer steps", f"{facts.steps:,}"),
        ("parameters", f"{facts.parameters:,}, of which {facts.trainable_parameters:,} trained ({share:.2%})"),
    ]
    return _table(("", ""), rows)


def _losses(facts: CardFacts) -> str:
    parts = [f"Training loss: {facts.first_train_loss:.4f} at the first step, {facts.last_train_loss:.4f} at the last."]
    if facts.evaluations:
        names = list(dict.fromkeys(name for evaluation in facts.evaluations for name in evaluation.metrics))
        rows = [
            (
                f"**{evaluation.step:,}** (kept)" if evaluation.step == facts.best_step else f"{evaluation.step:,}",
                f"{evaluation.loss:.4f}",
                f"{evaluation.perplexity:.4g}",
                *(f"{evaluation.metrics.get(name, math.nan):.4g}" for name in names),
            )
            for evaluation in _thinned(facts.evaluations, facts.best_step)
        ]
        parts.append(_table(("step", "evaluation loss", "perplexity", *names), rows))
    if facts.loss_curve is not None:
        parts.append(f"![Loss over optimizer steps]({facts.loss_curve})")
    return "\n\n".join(parts)


def _thinned(evaluations: Sequence[Evaluation], best_step: int) -> list[Evaluation]:
    every = math.ceil(len(evaluations) / _MOST_EVALUATIONS)
    last = len(evaluations) - 1
    return [
        evaluation
        for index, evaluation in enumerate(evaluations)
        if (last - index) % every == 0 or evaluation.step == best_step
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Escape what Markdown would read as markup."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))
