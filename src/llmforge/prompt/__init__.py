"""Turns messages into token ids with per-token loss weights: the only place that renders, the only place that masks."""

from llmforge.prompt.chat_template import ChatTemplate
from llmforge.prompt.conversation import Message, Turn
from llmforge.prompt.encoder import Encoder, Format, Piece
from llmforge.prompt.files import build_format, chat_template_of, format_section, load_format, save_format
from llmforge.prompt.format import PromptFormat
from llmforge.prompt.jinja import compile_to_jinja
from llmforge.prompt.stopping import StopRules

__all__ = [
    "ChatTemplate",
    "Encoder",
    "Format",
    "Message",
    "Piece",
    "PromptFormat",
    "StopRules",
    "Turn",
    "build_format",
    "chat_template_of",
    "compile_to_jinja",
    "format_section",
    "load_format",
    "save_format",
]
