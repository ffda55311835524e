"""torchtune: packed, and as its first recipe has it."""

import json
import re
from dataclasses import dataclass
from typing import Any

from measuring.work import Case
from peers.program import Command, Environment, Program, write_json

# Newer torchao has no place any more for what torchtune imports from it.
ENVIRONMENT = Environment("torchtune", ["torchtune==0.6.1", "torchao==0.10.0"], without=["torchvision"])


@dataclass(frozen=True)
class Torchtune(Program):
    """Started as `tune run`. Rows and ChatML come through components, as its documentation wants for other formats."""

    def command(self, case: Case) -> Command:
        quick = case.mode == "quickstart"
        weights = sorted(path.name for path in case.model.glob("*.safetensors"))
        config: dict[str, Any] = {
            "output_dir": str(case.directory / "output"),
            "model": self._model(case),
            "tokenizer": {"_component_": "torchtune_rows.Tokenizer", "path": str(case.model)},
            "dataset": {
                "_component_": "torchtune_rows.dataset",
                "rows": str(case.rows),
                "context": case.workload.context,
                "packed": not quick,  # the quick start leaves it off
            },
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer",
                "checkpoint_dir": str(case.model),
                "checkpoint_files": weights,
                "recipe_checkpoint": None,
                "output_dir": "${output_dir}",
                "model_type": "LLAMA3_2" if case.shape.tied else "LLAMA3",
            },
            "resume_from_checkpoint": False,
            "save_adapter_weights_only": not quick,
            "seed": None if quick else 7,
            "shuffle": True,
            "batch_size": 4 if quick else 1,
            "gradient_accumulation_steps": 8 if quick else case.packs_per_step,
            "epochs": 1,
            "max_steps_per_epoch": None,
            "clip_grad_norm": None if quick else 1.0,
            "optimizer": {
                "_component_": "torch.optim.AdamW",
                "fused": True,
                "weight_decay": 0.01 if quick else 0.0,
                "lr": 3e-4 if quick else case.learning_rate,
            },
            "optimizer_in_bwd": False,
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 100 if quick else 0,
                "num_cycles": 0.5 if quick else 0.0,  # no part of a cosine is a constant rate
            },
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "compile": False,
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": "${output_dir}/logs",
            },
            "log_every_n_steps": 1,
            "log_peak_memory_stats": False,
            "device": case.device,
            "dtype": "bf16" if quick else case.dtype,
            "enable_activation_checkpointing": False,
            "enable_activation_offloading": False,
        }
        path = write_json(case.directory / "config.yaml", config)
        recipe = f"{case.method}_finetune_single_device"
        start = "from torchtune._cli.tune import main; main()"
        return Command(["-c", start, "run", recipe, "--config", str(path)])

    def _model(self, case: Case) -> dict[str, Any]:
        shape = case.shape
        settings = json.loads((case.model / "config.json").read_text())
        rope = settings.get("rope_parameters") or settings
        # Llama 3.2's builder is the one that ties embeddings; a factor of 1 leaves RoPE as it is.
        package, name = ("llama3_2", "llama3_2") if shape.tied else ("llama3", "llama3")
        model: dict[str, Any] = {
            "_component_": f"torchtune.models.{package}.{'lora_' if case.method == 'lora' else ''}{name}",
            "vocab_size": shape.vocabulary,
            "num_layers": shape.layers,
            "num_heads": shape.heads,
            "num_kv_heads": shape.key_value_heads,
            "embed_dim": shape.hidden,
            "max_seq_len": shape.context,
            "intermediate_dim": shape.intermediate,
            "norm_eps": settings["rms_norm_eps"],
            "rope_base": int(rope["rope_theta"]),
        }
        if shape.tied:
            model["scale_factor"] = 1
        if case.method == "lora":
            quick = case.mode == "quickstart"
            rank = 64 if quick else case.rank
            model |= {
                "lora_attn_modules": ["q_proj", "v_proj", "output_proj"] + ([] if quick else ["k_proj"]),
                "apply_lora_to_mlp": True,
                "apply_lora_to_output": False,
                "lora_rank": rank,
                "lora_alpha": 2 * rank,
                "lora_dropout": 0.0,
            }
        return model

    def losses(self, case: Case, log: str) -> list[float]:
        return [
            float(loss)
            for path in case.directory.glob("output/logs/*.txt")
            for loss in re.findall(r"loss:([\d.]+)", path.read_text())
        ]

    def note(self, case: Case) -> str:
        if case.mode == "quickstart":
            return "llama3_2/1B_lora_single_device: LoRA r 64, not on keys, 4 rows a forward pass, 32 a step, bf16"
        held = "; weights and moments are bf16" if case.dtype == "bf16" else ""
        return f"{case.packs_per_step} packs a step; what does not fill a last step is left out{held}"


PROGRAMS = (Torchtune("torchtune", "torchtune, packed", ENVIRONMENT, ("torchtune", "torchao", "torch")),)
