"""Lets atheris look for bytes that bring down the reading of requests.

    python -m fuzz.parser -dict=FILE [further options of libFuzzer's] CORPUS

The first byte chooses the endpoint, the rest is the body. A scripted engine answers, so that reading is what costs.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llmforge.serve", "llmforge.data.conversation", "json.decoder"]):
    from llmforge.serve.app import make_app
    from llmforge.serve.door import Settings
    from llmforge.serve.model import ServedModel
    from llmforge.serve.models import Models

import json

from chat_templates import REASONING_AND_TOOLS
from conftest import build_tokenizer
from fuzz.driver import Driver, fault_of
from fuzz.mutations import PATHS, SEEDS, places
from llmforge.prompt import Encoder, StopRules, build_format
from scripted_engine import ScriptedEngine

_ESCAPED = {ord('"'): '\\"', ord("\\"): "\\\\"}


def write_corpus(directory: Path, words: Path) -> None:
    """Write requests to begin with, and what they are made of, as a dictionary of libFuzzer's."""
    tokens = {json.dumps(part) for _, body in SEEDS for place, key in places(body) for part in (key, place[key])}
    short = sorted(token for token in tokens if len(token) < 60)
    words.write_text("".join(f'"{token.translate(_ESCAPED)}"\n' for token in short))
    for number, (path, body) in enumerate(SEEDS):
        (directory / str(number)).write_bytes(bytes([PATHS.index(path)]) + json.dumps(body).encode())


def main() -> None:
    tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=REASONING_AND_TOOLS)
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    answer = encoder.encode_text(" capital")
    models = Models()
    engine = ScriptedEngine(lambda request: answer)
    models.put(ServedModel("tiny", "/x", 1, encoder, StopRules.derive(encoder, [], []), engine))
    driver = Driver(make_app(models, Settings()))

    def test(data: bytes) -> None:
        engine.tickets.clear()
        if not data:
            return
        answered = driver.post(PATHS[data[0] % len(PATHS)], data[1:])
        if fault := fault_of(*answered):
            raise AssertionError(f"{fault}: {answered}")

    words = next((Path(word[6:]) for word in sys.argv if word.startswith("-dict=")), None)
    if words is not None and not words.exists():
        write_corpus(Path(sys.argv[-1]), words)
    atheris.Setup(sys.argv, test)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
