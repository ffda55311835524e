"""A server in a process of its own; its model says 60 words, one every 20 ms: `python scripted_server.py STALL`."""

import sys

from chat_templates import CHATML
from conftest import build_tokenizer
from llmforge.prompt import Encoder, StopRules, build_format
from llmforge.serve.app import make_app
from llmforge.serve.door import Settings
from llmforge.serve.model import ServedModel
from llmforge.serve.models import Models
from llmforge.serve.server import run_server, take_port, url_of
from scripted_engine import ScriptedEngine


def main(stall_timeout: float) -> None:
    tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=CHATML)
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    word = encoder.encode_text(" capital")
    engine = ScriptedEngine(lambda request: word * 60, pause=0.02)
    model = ServedModel("tiny", "/x", 1, encoder, StopRules.derive(encoder, [], []), engine)
    models = Models()
    models.put(model)
    listener = take_port("127.0.0.1", 0, stall_timeout=stall_timeout)
    app = make_app(models, Settings(stall_timeout=stall_timeout))
    run_server(app, listener, ready=lambda: print(url_of(listener), flush=True), say=print)


if __name__ == "__main__":
    main(float(sys.argv[1]))
