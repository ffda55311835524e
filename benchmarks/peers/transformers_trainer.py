"""transformers' own Trainer with PEFT, as people write it by hand: length-grouped."""

from measuring.work import Case
from peers.program import INSIDE, Command, Program, write_json
from peers.trl import ENVIRONMENT, options


class TransformersTrainer(Program):
    """Trainer in a script of its own; it shares TRL's environment."""

    def command(self, case: Case) -> Command:
        path = write_json(case.directory / "options.json", options(case))
        return Command([str(INSIDE / "hf_trainer.py"), str(path)])

    def note(self, case: Case) -> str:
        if case.mode == "quickstart":
            return "TrainingArguments' defaults and LoraConfig(): LoRA r 8 on queries and values, fp32, 8 rows a step"
        return ""


PROGRAMS = (TransformersTrainer("trainer", "transformers Trainer, length-grouped", ENVIRONMENT),)
