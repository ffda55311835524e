"""Axolotl: with sample_packing, and as its first example of LoRA has it."""

from typing import Any

from measuring.work import Case
from peers.program import Command, Environment, Program, write_json

# torchvision's and torchaudio's releases do not load beside this torch.
ENVIRONMENT = Environment("axolotl", ["axolotl==0.19.0"], without=["torchvision", "torchaudio"])


class Axolotl(Program):
    """Started as the module behind `axolotl train`, without accelerate's launcher, which one process does not need."""

    def command(self, case: Case) -> Command:
        config: dict[str, Any] = {
            "base_model": str(case.model),
            "datasets": [
                {
                    "path": str(case.rows),
                    "ds_type": "json",
                    "type": "chat_template",
                    "field_messages": "messages",
                    "message_property_mappings": {"role": "role", "content": "content"},
                }
            ],
            "chat_template": "tokenizer_default",
            "output_dir": str(case.directory / "output"),
            "dataset_prepared_path": str(case.directory / "prepared"),
            "num_epochs": 1,
            "adapter": "lora" if case.method == "lora" else None,
        }
        config |= self._quickstart(case) if case.mode == "quickstart" else self._tuned(case)
        if case.device == "cpu":
            # Its kernels are Triton's, switch themselves on, and then ask for a GPU.
            config |= {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
            config |= {"flash_attention": False, "sdp_attention": True}
        path = write_json(case.directory / "config.yaml", config)
        return Command(["-m", "axolotl.cli.train", str(path)], {"AXOLOTL_DO_NOT_TRACK": "1"})

    def _tuned(self, case: Case) -> dict[str, Any]:
        config: dict[str, Any] = {
            "sequence_len": case.workload.context,
            "sample_packing": True,
            "pad_to_sequence_len": False,
            # It flattens a batch into one row, so one pack at a time keeps attention from growing with the batch.
            "micro_batch_size": 1,
            "gradient_accumulation_steps": case.packs_per_step,
            "learning_rate": case.learning_rate,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optimizer": "adamw_torch_fused",
            "bf16": case.dtype == "bf16",
            "tf32": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "val_set_size": 0,
            "dataset_processes": 1,
            "dataloader_num_workers": 0,
        }
        if case.method == "lora":
            config |= {
                "lora_r": case.rank,
                "lora_alpha": 2 * case.rank,
                "lora_dropout": 0.0,
                "lora_target_linear": True,
            }
        return config

    def _quickstart(self, case: Case) -> dict[str, Any]:
        # examples/llama-3/lora-1b.yml, less its model and data.
        config = {
            "val_set_size": 0.0,
            "sequence_len": 2_048,
            "sample_packing": True,
            "pad_to_sequence_len": True,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "lora_target_modules": ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"],
            "gradient_accumulation_steps": 2,
            "micro_batch_size": 2,
            "optimizer": "adamw_8bit",
            "lr_scheduler": "cosine",
            "learning_rate": 0.0002,
            "bf16": "auto",
            "tf32": False,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "flash_attention": True,
            "warmup_ratio": 0.1,
            "saves_per_epoch": 1,
            "weight_decay": 0.0,
        }
        if case.device == "cpu":
            # bitsandbytes' 8-bit optimizer needs a GPU. Without one, "auto" means fp16, whose products take minutes a
            # step on a CPU, and bf16 is refused.
            config |= {"optimizer": "adamw_torch_fused", "bf16": False, "fp16": False}
        return config

    def note(self, case: Case) -> str:
        if case.mode == "quickstart":
            held = "fp32, since it refuses bf16 without a GPU" if case.device == "cpu" else "bf16"
            return f"examples/llama-3/lora-1b.yml: LoRA r 16, 4 packs of 2,048 tokens a step, {held}"
        return f"{case.packs_per_step} packs a step; what does not fill a last step is left out"


PROGRAMS = (Axolotl("axolotl", "Axolotl, packed", ENVIRONMENT, ("axolotl", "torch", "transformers", "peft")),)
