"""ms-swift: length-grouped, and as its quick start has it."""

import re
from typing import Any

from measuring.work import Case
from peers.program import Command, Environment, Program

ENVIRONMENT = Environment("ms-swift", ["ms-swift==4.6.0"], without=["torchvision", "torchaudio"])


class MsSwift(Program):
    """Started as the module behind `swift sft`."""

    def command(self, case: Case) -> Command:
        settings: dict[str, Any] = {
            "model": case.model,
            "model_type": "llama",
            "template": "chatml",
            "dataset": case.rows,
            "output_dir": case.directory / "output",
            "num_train_epochs": 1,
            "tuner_type": case.method,
            "split_dataset_ratio": 0,
            "report_to": "none",
        }
        settings |= self._quickstart() if case.mode == "quickstart" else self._tuned(case)
        arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        if case.device == "cpu":
            arguments += ["--use_cpu", "true"]
        return Command(["-m", "swift.cli.sft", *arguments], {"MODELSCOPE_CACHE": str(case.directory / "modelscope")})

    def _tuned(self, case: Case) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "torch_dtype": "bfloat16" if case.dtype == "bf16" and case.method == "lora" else "float32",
            "bf16": str(case.dtype == "bf16").lower(),
            "max_length": case.workload.context,
            "per_device_train_batch_size": case.workload.micro_batch,
            "gradient_accumulation_steps": case.accumulation,
            "train_sampling_strategy": "group_by_length",
            "learning_rate": case.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0,
            "weight_decay": 0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch_fused",
            "gradient_checkpointing": "false",
            "attn_impl": "sdpa",
            "logging_steps": 1,
            "save_strategy": "epoch",  # else nothing is saved, not even at the end
            "save_only_model": "true",
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
        }
        if case.method == "lora":
            settings |= {
                "lora_rank": case.rank,
                "lora_alpha": 2 * case.rank,
                "lora_dropout": 0.0,
                "target_modules": "all-linear",
            }
        return settings

    def _quickstart(self) -> dict[str, Any]:
        # The first command of its README, less its model and data.
        return {
            "torch_dtype": "bfloat16",
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-4,
            "lora_rank": 8,
            "lora_alpha": 32,
            "target_modules": "all-linear",
            "gradient_accumulation_steps": 16,
            "eval_steps": 50,
            "save_steps": 50,
            "save_total_limit": 2,
            "logging_steps": 5,
            "max_length": 2_048,
            "warmup_ratio": 0.05,
            "dataset_num_proc": 4,
            "dataloader_num_workers": 4,
        }

    def note(self, case: Case) -> str:
        if case.mode == "quickstart":
            return "its README's first command: LoRA r 8 on all linear layers, 1 row a forward pass, 16 a step, bf16"
        return ""

    def losses(self, case: Case, log: str) -> list[float]:
        return super().losses(case, re.sub(r"\x1b\[[0-9;]*m", "", log))


PROGRAMS = (
    MsSwift("ms-swift", "ms-swift, length-grouped", ENVIRONMENT, ("ms-swift", "torch", "transformers", "peft")),
)
