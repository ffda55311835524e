"""LitGPT, which pads and has no packing, and as its tutorial of LoRA has it."""

import csv
import json
from dataclasses import dataclass
from typing import Any

from measuring.work import Case
from peers.program import CACHE, INSIDE, Command, Environment, Program, run_once

# Its command line imports requests, which its requirements leave out.
ENVIRONMENT = Environment("litgpt", ["litgpt==0.5.13", "requests"], without=["torchvision"])


@dataclass(frozen=True)
class LitGpt(Program):
    """Started as `litgpt finetune_lora` or `finetune_full`. Rows of several turns come through a data module."""

    def command(self, case: Case) -> Command:
        converted = CACHE / "litgpt" / case.model.name
        run_once(self.python(), INSIDE / "litgpt_convert.py", case.model, converted)
        quick = case.mode == "quickstart"
        settings: dict[str, Any] = {
            "out_dir": case.directory / "output",
            "data": "litgpt_rows.Rows",
            "data.rows": case.rows,
            "train.epochs": 1,
        }
        if not quick:
            adamw = {"lr": case.learning_rate, "weight_decay": 0.0, "fused": True}
            settings |= {
                "precision": "32-true" if case.dtype == "fp32" else "bf16-true",
                "train.global_batch_size": case.workload.examples_per_step,
                "train.micro_batch_size": case.workload.micro_batch,
                "train.max_seq_length": case.workload.context,
                "train.lr_warmup_steps": 1,  # it divides by them
                "train.save_interval": 100_000,
                "eval.interval": 100_000,
                "eval.final_validation": "false",
                "eval.max_new_tokens": 1,
                "optimizer": json.dumps({"class_path": "torch.optim.AdamW", "init_args": adamw}),
            }
        if case.method == "lora" and not quick:
            settings |= {"lora_r": case.rank, "lora_alpha": 2 * case.rank, "lora_dropout": 0.0}
            settings |= {f"lora_{part}": "true" for part in ("query", "key", "value", "projection", "mlp")}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        command = "finetune_lora" if case.method == "lora" else "finetune_full"
        return Command(["-m", "litgpt", command, str(converted), *words])

    def losses(self, case: Case, log: str) -> list[float]:
        rows = [
            row
            for path in case.directory.glob("output/logs/csv/*/metrics.csv")
            for row in csv.DictReader(path.read_text().splitlines())
            if row.get("loss")
        ]
        by_step = {row["step"]: float(row["loss"]) for row in rows if float(row["step"]) > 0}
        return list(by_step.values())

    def note(self, case: Case) -> str:
        if case.mode == "quickstart":
            return "finetune_lora's defaults: LoRA r 8 on queries and values, 1 row a forward pass, 16 a step, bf16"
        held = "; input and output embeddings are trained apart" if case.method == "full" and case.shape.tied else ""
        return f"padded, not grouped by length; its learning rate falls as a cosine{held}"


PROGRAMS = (LitGpt("litgpt", "LitGPT, padded", ENVIRONMENT, ("litgpt", "lightning", "torch")),)
