"""llmforge itself, through its command line: tuned, and with `--default` as its quick start has it."""

import json
from datetime import datetime
from typing import Any

from measuring.work import Case
from peers.program import CACHE, Command, Program, write_json

# The same as the chat template of the model, so that the ids are the same.
CHATML = {
    "system": "<|im_start|>system\n{instruction}<|im_end|>\n",
    "user": "<|im_start|>user\n{instruction}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n{instruction}<|im_end|>\n",
    "trailing_assistant": "<|im_start|>assistant\n",
}
# Rows in one forward pass; what is left of a step is accumulated.
MICRO_BATCH = {"chat": 8, "guard": 4, "short": 16, "long": 1}


class Llmforge(Program):
    """Started as `python -m llmforge finetune`, in the environment that this benchmark runs in."""

    def command(self, case: Case) -> Command:
        config: dict[str, Any] = {
            "model_id": str(case.model),
            "train_path": str(case.rows),
            "num_epochs": 1,
        }
        arguments = ["-m", "llmforge", "finetune", "config.yaml", "--json"]
        if case.mode == "quickstart":
            # --default takes no other keys; the run directory is `runs` below the working directory.
            arguments.append("--default")
        else:
            micro_batch = min(MICRO_BATCH[case.workload.name], case.workload.examples_per_step)
            config |= {
                "task": "instruction_tuning",
                "generation_config": {"prompt_format": CHATML},
                "context_length": case.workload.context,
                "train_batch_size_per_device": micro_batch,
                "gradient_accumulation_steps": case.workload.examples_per_step // micro_batch,
                "learning_rate": case.learning_rate,
                "lr_scheduler_type": "constant",
                "num_warmup_steps": 0,
                "dtype": case.dtype,
                "cache_dir": str(case.directory / "cache"),
            }
            if case.method == "lora":
                config["lora_config"] = {"r": case.rank, "lora_alpha": 2 * case.rank, "lora_dropout": 0.0}
        write_json(case.directory / "config.yaml", config)  # JSON is YAML
        # Rows are prepared anew each time. Go's compiler, where it is installed, keeps its standard library compiled.
        environment = {"XDG_CACHE_HOME": str(case.directory / "cache"), "GOCACHE": str(CACHE / "go-build")}
        return Command(arguments, environment)

    def steps(self, case: Case) -> list[dict[str, Any]] | None:
        """Read the run's events: where rows share a prefix, the embedding sees fewer tokens than the rows have."""
        tokens = trained = 0
        steps = []
        for event in self._events(case):
            if event["event"] == "step":
                tokens += event["tokens"]
                trained += event["trained_tokens"]
                when = datetime.fromisoformat(event["time"]).timestamp()
                steps.append({"time": when, "tokens": tokens, "trained": trained})
        return steps

    def losses(self, case: Case, log: str) -> list[float]:
        return [event["train_loss"] for event in self._events(case) if event["event"] == "step"]

    def note(self, case: Case) -> str:
        if case.mode == "quickstart":
            return "--default: LoRA r 8 on all linear layers, 16 examples a step, bf16 where the processor has it"
        return ""

    def _events(self, case: Case) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for path in case.directory.glob("runs/*/events.jsonl")
            for line in path.read_text().splitlines()
        ]


PROGRAMS = (Llmforge("llmforge", "llmforge", packages=("llmforge", "torch", "transformers", "peft")),)
