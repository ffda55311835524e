"""New tokens: added to a tokenizer, given rows in a model's embeddings, trained and found again beside an adapter.

Shapes: V rows of an embedding, C its width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmforge.errors import ModelError
from llmforge.models.adapter import SAVED_PREFIX, is_tied, matches
from llmforge.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that the model has no embedding of its own for: its text, its id, and the ids that spelt the text before.

    `pieces` is empty where nothing but the token itself spells the text.
    """

    text: str
    id: int
    pieces: tuple[int, ...]


def add_tokens(tokenizer: Any, texts: Sequence[str], *, rows: int) -> list[NewToken]:
    """Add texts to a tokenizer, each as one token, and give those that the model has to learn.

    A text that is a token already stays the token it is; it is new to the model only if its id lies beyond the `rows`
    of the model's embeddings. The tokens are not marked special: a server would take special ones out of its answers.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    pieces = {}  # found before anything is added; a token that is known must not spell itself
    for text in texts:
        options = {"split_special_tokens": True} if text in known else {}
        pieces[text] = tokenizer.encode(text, add_special_tokens=False, **options)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts if text not in known])
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in texts}
    return [
        NewToken(text, token, tuple(piece for piece in pieces[text] if piece != token))
        for text, token in ids.items()
        if text not in known or token >= rows
    ]


def make_room(model: Any, tokens: Sequence[NewToken], *, rows: int) -> list[int]:
    """Give new tokens embeddings to start from, and return all rows that are new: theirs, and any that came with them.

    The matrices grow to `rows` where they are smaller, and never shrink. Each new token starts as the mean of the
    embeddings that its text had before, on the input side and, where it is another matrix, on the output side; a row
    that belongs to no text starts as the mean of all. Nothing is random.

    Args:
        model: a plain causal language model; may be without weights, on torch's meta device.
        rows: what the tokenizer needs, its length.
    """
    if not tokens:
        return []
    before = len(model.get_input_embeddings().weight)
    rows = max(rows, *(token.id + 1 for token in tokens))
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    spellings = dict.fromkeys(range(before, rows), ()) | {token.id: token.pieces for token in tokens}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tensors = [embedding.weight]
    if head is not None:
        tensors += [] if is_tied(model) else [head.weight]
        tensors += [] if getattr(head, "bias", None) is None else [head.bias]
    for tensor in tensors:
        _start(tensor, spellings, before)
    return sorted(spellings)


@torch.no_grad()
def _start(tensor: torch.Tensor, spellings: Mapping[int, Sequence[int]], rows: int) -> None:
    """Set the new rows of a matrix (V, C) or a bias (V) to the mean of the first `rows` that spelt them, or of all."""
    if tensor.is_meta:
        return
    old = torch.tensor([row for row in range(rows) if row not in spellings])
    mean_of_all = tensor[old].mean(0, dtype=torch.float32)
    for row, pieces in spellings.items():
        known = [piece for piece in pieces if piece < rows and piece not in spellings]
        tensor[row] = (tensor[known].float().mean(0) if known else mean_of_all).to(tensor.dtype)


def train_new_rows(model: Any, fields: Mapping[str, Any], new_rows: Sequence[int]) -> dict[str, Any]:
    """Extend fields of PEFT's `LoraConfig` so that the adapter trains and holds the new rows of the embeddings.

    They become `trainable_token_indices`, for both sides where input and output embeddings are two matrices. A side
    that `modules_to_save` names is trained whole anyway. An output layer with a bias joins `modules_to_save`, since
    PEFT's layer for single rows leaves the bias out (`peft.tuners.trainable_tokens`).

    Raises:
        ModelError: LoRA is to adapt an embedding that has new rows; a product of small matrices cannot hold them.
    """
    fields = dict(fields)
    if not new_rows:
        return fields
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    sides = {names[embedding]: embedding} | ({names[head]: head} if head is not None else {})
    adapted = [name for name in sides if matches(fields.get("target_modules"), name)]
    if adapted:
        raise ModelError(
            f"lora_config.target_modules: {', '.join(adapted)} gets rows for added_tokens, which LoRA's small matrices "
            "cannot hold; take it out, and the new rows are trained whole, or name it in modules_to_save instead"
        )
    saved = list(fields.get("modules_to_save") or ())
    if getattr(head, "bias", None) is not None and not matches(saved, names[head]):
        saved.append(names[head])
    whole = {name for name in sides if matches(saved, name)}
    if is_tied(model) and whole:
        whole = set(sides)
    given = fields.get("trainable_token_indices") or {}
    if not isinstance(given, Mapping):
        given = {names[embedding]: given}
    rows = {name: indices for name, indices in given.items() if not any(matches([name], side) for side in sides)}
    for side in [names[embedding]] if is_tied(model) else sides:
        if side not in whole:
            theirs = next((indices for name, indices in given.items() if matches([name], side)), ())
            rows[side] = sorted({*theirs, *new_rows})
    return {**fields, "modules_to_save": saved or None, "trainable_token_indices": rows or None}


def fit_to_adapter(model: Any, adapter: Path) -> None:
    """Give a base model as many rows of embeddings as a saved adapter was trained with; the adapter fills the new ones.

    A loader that knows nothing of llmforge does the same with
    `model.resize_token_embeddings(len(tokenizer))`, or through `peft.AutoPeftModelForCausalLM`.
    """
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    indices = settings.get("trainable_token_indices") or []
    rows = [max(each, default=-1) + 1 for each in (indices.values() if isinstance(indices, dict) else [indices])]
    sides = [side for side in (model.get_input_embeddings(), model.get_output_embeddings()) if side is not None]
    saved = {f"{SAVED_PREFIX}{name}.weight" for name, module in model.named_modules() if module in sides}
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="numpy") as file:
        rows += [file.get_slice(name).get_shape()[0] for name in file.keys() if name in saved]  # noqa: SIM118
    if max(rows, default=0) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(max(rows), mean_resizing=False)
