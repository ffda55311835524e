"""A sample of the sweep over architectures: families that differ in what makes training and serving hard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CHATML_TEMPLATE, build_tokenizer

FAMILIES = {
    "dense, rotary": ("llama", "qwen3", "gemma3_text", "gemma4", "phi3", "cohere"),
    "dense, learned or no positions": ("gpt2", "bart", "biogpt"),
    "dense, ALiBi": ("bloom",),
    "multi-query": ("falcon",),
    "an encoder as decoder": ("bert",),
    "experts": ("qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"),
    "state space": ("mamba", "mamba2"),
    "linear attention": ("rwkv", "minimax"),
    "hybrid": ("jamba", "lfm2", "qwen3_next"),
}
PROGRAM = """
import json, sys
from pathlib import Path
from sweep.runner import sweep
for outcome in sweep(sys.argv[2:], Path(sys.argv[1])):
    print("outcome", json.dumps([outcome.model_type, outcome.stage, outcome.why]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str | None]]:
    """Sweep in a process that has not imported llmforge: its forks are to find out what plain software makes of it."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE).save_pretrained(tokenizer)
    names = [name for family in FAMILIES.values() for name in family]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tokenizer), *names], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line.removeprefix("outcome ")) for line in done.stdout.splitlines() if line[:8] == "outcome "]
    return {name: rest for name, *rest in lines}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_merges_and_is_served(family: str, outcomes: dict[str, list[str | None]]) -> None:
    assert {name: outcomes[name] for name in FAMILIES[family]} == {name: [None, ""] for name in FAMILIES[family]}
