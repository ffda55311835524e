"""Causal language modelling: every token of a conversation or document carries loss, whoever wrote it."""

from typing import ClassVar, Literal

from llmforge.prompt.encoder import Trained
from llmforge.tasks.language_modeling import LanguageModeling


class CausalLM(LanguageModeling):
    """Every token but the first carries loss. A lone user message is a plain document, rendered without markup."""

    name: ClassVar[Literal["causal_lm"]] = "causal_lm"
    trained: ClassVar[Trained] = "everything"
    needs_assistant: ClassVar[bool] = False
