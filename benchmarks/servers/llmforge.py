"""llmforge itself: `python -m llmforge serve`, in the environment that this benchmark runs in."""

from peers.program import Command
from servers.server import Server, Start


class Llmforge(Server):
    """Serves the directory as an artifact: the weights, the tokenizer and the format that lies beside them."""

    def command(self, start: Start) -> Command:
        return Command(["-m", "llmforge", "serve", str(start.model), "--port", str(start.port), "--dtype", "fp32"])


SERVERS = (Llmforge("llmforge", "llmforge serve", packages=("llmforge", "torch", "transformers")),)
