"""The programs that are compared: one file each, llmforge among them."""

from peers import llmforge, transformers_trainer, trl
from peers.program import Program

PROGRAMS: dict[str, Program] = {
    program.key: program for module in (llmforge, trl, transformers_trainer) for program in module.PROGRAMS
}
