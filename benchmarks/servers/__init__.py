"""The servers that are compared: one file each, llmforge among them."""

from servers import llama_cpp, llmforge, transformers_serve
from servers.server import Server

_MODULES = (llmforge, transformers_serve, llama_cpp)
SERVERS: dict[str, Server] = {server.key: server for module in _MODULES for server in module.SERVERS}
