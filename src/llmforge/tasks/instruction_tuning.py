"""Instruction tuning: the model learns to produce the assistant's turns, given everything before them."""

from typing import ClassVar, Literal

from llmforge.prompt.encoder import Trained
from llmforge.tasks.language_modeling import LanguageModeling


class InstructionTuning(LanguageModeling):
    """Of each assistant turn, what the model would have to generate carries loss; prompts carry none."""

    name: ClassVar[Literal["instruction_tuning"]] = "instruction_tuning"
    trained: ClassVar[Trained] = "assistant"
    needs_assistant: ClassVar[bool] = True
