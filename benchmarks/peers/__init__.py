"""The programs that are compared: one file each, llmforge among them."""

from peers import axolotl, litgpt, llama_factory, llmforge, ms_swift, torchtune, transformers_trainer, trl
from peers.program import Program

_MODULES = (llmforge, trl, transformers_trainer, llama_factory, axolotl, ms_swift, torchtune, litgpt)
PROGRAMS: dict[str, Program] = {program.key: program for module in _MODULES for program in module.PROGRAMS}
