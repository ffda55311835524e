"""One file per task: which tokens carry loss, what the loss is, what is measured. Tasks do not import each other."""

from llmforge.tasks.causal_lm import CausalLM
from llmforge.tasks.instruction_tuning import InstructionTuning
from llmforge.tasks.language_modeling import Batch, LanguageModeling, Loss, PackedBatch

TASKS: dict[str, type[LanguageModeling]] = {task.name: task for task in (CausalLM, InstructionTuning)}
"""Tasks by their name in the YAML file."""

__all__ = ["TASKS", "Batch", "CausalLM", "InstructionTuning", "LanguageModeling", "Loss", "PackedBatch"]
