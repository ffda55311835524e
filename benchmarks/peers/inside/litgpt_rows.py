"""A data module for LitGPT that reads rows of messages as ChatML, with any number of turns."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default
from torch.utils.data import DataLoader

IGNORED = -100


@dataclass
class Rows(DataModule):
    """Rows of a JSON lines file. The first is the validation set too, which LitGPT looks at before it trains."""

    rows: Path
    seed: int = 7
    prompt_style: object = field(default_factory=Default, init=False)

    def __post_init__(self):
        super().__init__()

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.tokenizer, self.batch_size = tokenizer, batch_size

    def setup(self, stage=""):
        lines = Path(self.rows).read_text().splitlines()
        self.samples = [self._sample(json.loads(line)["messages"]) for line in lines]
        # It answers one instruction when it is done.
        self.test_dataset = SimpleNamespace(data=[{"instruction": "word"}])

    def train_dataloader(self):
        order = torch.Generator().manual_seed(self.seed)
        collate = get_sft_collate_fn(ignore_index=IGNORED)
        return DataLoader(self.samples, self.batch_size, shuffle=True, generator=order, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(self.samples[:1], 1, collate_fn=get_sft_collate_fn(ignore_index=IGNORED))

    def _sample(self, messages):
        tokens, labels = [], []

        def add(text, trained):
            ids = self.tokenizer.processor.encode(text, add_special_tokens=False).ids
            tokens.extend(ids)
            labels.extend(ids if trained else [IGNORED] * len(ids))

        for message in messages:
            add(f"<|im_start|>{message['role']}\n", False)
            add(f"{message['content']}<|im_end|>", message["role"] == "assistant")
            add("\n", False)
        counts = {"raw": len(tokens), "raw_plus_prompt_template": len(tokens)}
        return {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels), "token_counts": counts}
