"""Measures the time to the first piece of text in this process, without a server: what HTTP is compared with.

    python first_token.py ARTIFACT PROMPTS.json MAX_TOKENS

PROMPTS.json is a list of conversations. Prints a JSON list of seconds, one for each.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from llmforge.serve.engine import Engine


def first_piece(engine: Engine, messages: list[dict[str, Any]], max_tokens: int) -> float:
    """Give the seconds from a conversation to the first text of its answer. The rest of the answer is not waited for.

    This is the one place that knows how the server calls its engine.
    """
    began = time.perf_counter()
    pieces = engine.stream(messages, max_new_tokens=max_tokens, temperature=0)
    next(pieces)
    seconds = time.perf_counter() - began
    pieces.close()
    return seconds


def main() -> None:
    artifact, prompts, max_tokens = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    engine = Engine.load(artifact, dtype="fp32")
    first_piece(engine, prompts[0], max_tokens)  # the first one makes kernels and memory
    print(json.dumps([first_piece(engine, messages, max_tokens) for messages in prompts]))


if __name__ == "__main__":
    main()
