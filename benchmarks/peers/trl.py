"""TRL's SFTTrainer: length-grouped, packed, and as its documentation starts."""

from dataclasses import dataclass

from measuring.work import Case
from peers.program import INSIDE, Command, Environment, Program, write_json

ENVIRONMENT = Environment("trl", ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2"])


def options(case: Case) -> dict[str, object]:
    """Give what the scripts of TRL and of transformers' Trainer both need."""
    return {
        "model": str(case.model),
        "rows": str(case.rows),
        "output": str(case.directory / "output"),
        "context": case.workload.context,
        "micro_batch": case.workload.micro_batch,
        "accumulation": case.accumulation,
        "learning_rate": case.learning_rate,
        "lora": case.method == "lora",
        "rank": case.rank,
        "bf16": case.dtype == "bf16",
        "cpu": case.device == "cpu",
        "quickstart": case.mode == "quickstart",
    }


@dataclass(frozen=True)
class Trl(Program):
    """SFTTrainer in a script of its own, as its documentation writes it."""

    packing: bool = False

    def command(self, case: Case) -> Command:
        settings = options(case) | {"packing": self.packing}
        if self.packing:
            # It flattens a batch into one row, so one pack at a time keeps attention from growing with the batch.
            settings |= {"micro_batch": 1, "accumulation": case.packs_per_step}
        path = write_json(case.directory / "options.json", settings)
        return Command([str(INSIDE / "trl_sft.py"), str(path)])

    def note(self, case: Case) -> str:
        if case.mode == "quickstart":
            return "SFTTrainer with LoraConfig(): LoRA r 8 on queries and values, loss on all tokens, 8 rows a step"
        return f"{case.packs_per_step} packs a step" if self.packing else ""


PACKAGES = ("trl", "torch", "transformers", "peft")
PROGRAMS = (
    Trl("trl", "TRL, length-grouped", ENVIRONMENT, PACKAGES),
    Trl("trl-packed", "TRL, packed", ENVIRONMENT, PACKAGES, ("tuned",), packing=True),
)
