"""Components for torchtune: a tokenizer and a data set that read rows of messages as ChatML."""

import json
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from torchtune.datasets import PackedDataset

IGNORED = -100


class Tokenizer:
    """What torchtune's recipes and packing ask of a tokenizer."""

    pad_id = 0
    max_seq_len = None

    def __init__(self, path):
        self._tokenizer = FastTokenizer.from_file(str(Path(path) / "tokenizer.json"))

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def dataset(tokenizer, *, rows, context, packed):
    """Give the samples, or packs of them that are `context` tokens long."""
    samples = [_sample(tokenizer, json.loads(line)["messages"]) for line in Path(rows).read_text().splitlines()]
    return PackedDataset(samples, max_seq_len=context, padding_idx=tokenizer.pad_id) if packed else samples


def _sample(tokenizer, messages):
    tokens, labels = [], []

    def add(text, trained):
        ids = tokenizer.encode(text)
        tokens.extend(ids)
        labels.extend(ids if trained else [IGNORED] * len(ids))

    for message in messages:
        add(f"<|im_start|>{message['role']}\n", False)
        add(f"{message['content']}<|im_end|>", message["role"] == "assistant")
        add("\n", False)
    return {"tokens": tokens, "labels": labels}
