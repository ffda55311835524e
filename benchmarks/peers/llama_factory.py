"""LLaMA-Factory: length-grouped, with neat_packing, and as its first example of LoRA has it."""

from dataclasses import dataclass
from typing import Any

from measuring.work import Case
from peers.program import Command, Environment, Program, write_json

# torchvision's release does not load beside this torch, and torchaudio is imported but not used for text.
ENVIRONMENT = Environment(
    "llama-factory",
    ["llamafactory==0.9.5"],
    without=["torchvision", "torchaudio"],
    stubs={"torchaudio": ""},
)


@dataclass(frozen=True)
class LlamaFactory(Program):
    """Started as `llamafactory-cli train`, from its module."""

    packing: bool = False

    def command(self, case: Case) -> Command:
        write_json(
            case.directory / "data" / "dataset_info.json",
            {
                "rows": {
                    "file_name": str(case.rows),
                    "formatting": "sharegpt",
                    "columns": {"messages": "messages"},
                    "tags": {
                        "role_tag": "role",
                        "content_tag": "content",
                        "user_tag": "user",
                        "assistant_tag": "assistant",
                        "system_tag": "system",
                    },
                }
            },
        )
        settings: dict[str, Any] = {
            "model_name_or_path": str(case.model),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": case.method,
            "dataset": "rows",
            "dataset_dir": str(case.directory / "data"),
            "template": "chatml",
            "output_dir": str(case.directory / "output"),
            "num_train_epochs": 1,
            "report_to": "none",
            "use_cpu": case.device == "cpu",
        }
        settings |= self._quickstart() if case.mode == "quickstart" else self._tuned(case)
        return Command(["-m", "llamafactory.cli", "train", str(write_json(case.directory / "train.yaml", settings))])

    def _tuned(self, case: Case) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "cutoff_len": case.workload.context,
            "per_device_train_batch_size": case.workload.micro_batch,
            "gradient_accumulation_steps": case.accumulation,
            "learning_rate": case.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch_fused",
            "bf16": case.dtype == "bf16",
            "disable_gradient_checkpointing": True,
            "flash_attn": "sdpa",
            "logging_steps": 1,
            "save_strategy": "no",
            "preprocessing_num_workers": 1,
            "dataloader_num_workers": 0,
        }
        if case.method == "lora":
            settings |= {"lora_rank": case.rank, "lora_alpha": 2 * case.rank, "lora_dropout": 0.0, "lora_target": "all"}
        if self.packing:
            settings |= {
                "packing": True,
                "neat_packing": True,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": case.packs_per_step,
            }
        else:
            settings |= {"train_sampling_strategy": "group_by_length"}
        return settings

    def _quickstart(self) -> dict[str, Any]:
        # examples/train_lora/qwen3_lora_sft.yaml, less its model and data.
        return {
            "lora_rank": 8,
            "lora_target": "all",
            "cutoff_len": 2_048,
            "preprocessing_num_workers": 16,
            "dataloader_num_workers": 4,
            "logging_steps": 10,
            "save_steps": 500,
            "plot_loss": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "bf16": True,
        }

    def note(self, case: Case) -> str:
        if case.mode == "quickstart":
            return "examples/train_lora: LoRA r 8 on all linear layers, 1 row a forward pass, 8 a step, bf16"
        return f"{case.packs_per_step} packs a step" if self.packing else ""


PACKAGES = ("llamafactory", "torch", "transformers", "peft")
PROGRAMS = (
    LlamaFactory("llama-factory", "LLaMA-Factory, length-grouped", ENVIRONMENT, PACKAGES),
    LlamaFactory(
        "llama-factory-packed", "LLaMA-Factory, neat_packing", ENVIRONMENT, PACKAGES, ("tuned",), packing=True
    ),
)
