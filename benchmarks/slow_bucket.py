"""Measures what a slow bucket costs a run: the time from step to step, with the output on this disk and in a bucket.

    PYTHONPATH=tests python benchmarks/slow_bucket.py --seconds 0.5

The bucket is that of the tests (moto's server behind a proxy), and each of its answers comes `--seconds` late. The
model is a Llama of a million parameters, all of them trained, so that a checkpoint has 15 MB.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import CHATML_TEMPLATE, build_tokenizer, conversation_rows, write_jsonl
from faulty_store import credentials, faulty_store
from llmforge.config import load_config
from llmforge.jobs.finetune import finetune
from tiny_runs import Listener, write_config

STEPS_PER_CHECKPOINT = 20
BATCH = 16


class Clock(Listener):
    """Remembers when each step was reported."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def event(self, event: str, **fields: Any) -> None:
        super().event(event, **fields)
        if event == "step":
            self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="how late each answer comes")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary, faulty_store() as store:
        directory = Path(temporary)
        os.environ.update(credentials(store, directory / "cache"))
        write_jsonl(directory / "train.jsonl", conversation_rows(BATCH * options.steps))
        tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=344,
                num_hidden_layers=6,
                num_attention_heads=4,
                tie_word_embeddings=True,
            )
        )
        model.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
        for place in ("on this disk", "in the bucket"):
            output = directory / "runs" if place == "on this disk" else "s3://bucket/runs"
            store.fault = lambda request: options.seconds
            keys = {
                "train_batch_size_per_device": BATCH,
                "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": STEPS_PER_CHECKPOINT},
                "num_checkpoints_to_keep": 1,
                "learning_rate": 1e-4,
            }
            config = write_config(directory, directory / "model", **keys, output_dir=str(output))
            clock = Clock()
            began = time.perf_counter()
            finetune(load_config(config), clock)
            ended = time.perf_counter()
            gaps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
            print(
                f"{place}: {len(clock.times)} steps in {sum(gaps):.1f} s, each {statistics.mean(gaps):.3f} s "
                f"(median {statistics.median(gaps):.3f}, longest {max(gaps):.2f}); from the last step to the end "
                f"{ended - clock.times[-1]:.1f} s, all together {ended - began:.1f} s; {len(store.requests)} requests",
                flush=True,
            )


if __name__ == "__main__":
    main()
