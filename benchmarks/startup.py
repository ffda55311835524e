"""Measures how soon llmforge answers: commands that need no model, and the first optimizer step of a run.

    python benchmarks/startup.py [--runs 10]
    python benchmarks/startup.py --first-step [--model DIRECTORY] [--data FILE] [--dtype bf16] [--runs 5]

The promises are 0.5 s for --help and 1 s for --config-only. --first-step counts from the start of the process to the
end of the first step of a LoRA run on 8 conversations a step, cold (no row of the data is in the cache) and warm.
Without --model it builds a model of 31M parameters and 25M embeddings, with random weights and a tokenizer of 49,152
tokens; without --data it takes 200 short conversations.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

CONFIG = "model_id: org/name\ntrain_path: train.jsonl\nlora_config: {r: 8}\n"
LIMITS = {"--version": 0.5, "--help": 0.5, "finetune --help": 0.5, "schema": 1.0, "validate --config-only CONFIG": 1.0}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 49_152
SYLLABLES = [c + v for c in "bdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "ai", "ou", "er")]


def main() -> None:
    """Measure what is asked for; exit with 1 if the median of a command is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first-step", action="store_true", help="measure the first optimizer step of a run")
    parser.add_argument("--model", type=Path, help="directory of a model with a chat template")
    parser.add_argument("--data", type=Path, help="JSONL file of conversations")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if options.first_step:
            model = options.model or build_model(directory / "model")
            data = options.data or write_conversations(directory / "train.jsonl")
            measure_first_step(directory, model.resolve(), data.resolve(), options.dtype, options.runs)
        else:
            sys.exit(measure_commands(directory, options.runs))


def measure_commands(directory: Path, runs: int) -> bool:
    """Print the median and the slowest of some runs of each command; say whether a median is over its limit."""
    slow = False
    config = directory / "config.yaml"
    config.write_text(CONFIG)
    for command, limit in LIMITS.items():
        arguments = [str(config) if word == "CONFIG" else word for word in command.split()]
        seconds = _repeat(runs, lambda arguments=arguments: [seconds_of(arguments)])[0]
        slow |= statistics.median(seconds) > limit
        print(f"llmforge {command:<30} {_in_words(seconds)}, limit {limit} s")
    return slow


def seconds_of(arguments: list[str]) -> float:
    """Run a command once; give its seconds from start to end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llmforge", *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def measure_first_step(directory: Path, model: Path, data: Path, dtype: str, runs: int) -> None:
    """Print how long it takes until the model is loaded, and until the first step is done, cold and warm."""
    config = directory / "run.yaml"
    settings: dict[str, Any] = {
        "model_id": str(model),
        "train_path": str(data),
        "task": "instruction_tuning",
        "num_epochs": 1,
        "train_batch_size_per_device": 8,
        "dtype": dtype,
        "lora_config": {"r": 8},
        "output_dir": str(directory / "runs"),
        "cache_dir": str(directory / "cache"),
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    for cache in ("cold", "warm"):
        loaded, stepped = _repeat(runs, lambda cache=cache: first_step(config, directory, warm=cache == "warm"))
        print(f"{dtype}, {cache} cache: model ready after   {_in_words(loaded)}")
        print(f"{dtype}, {cache} cache: first step done after {_in_words(stepped)}")


def first_step(config: Path, directory: Path, *, warm: bool) -> list[float]:
    """Start a run and end it after its first step; give the seconds until its model was ready, and until that step."""
    shutil.rmtree(directory / "runs", ignore_errors=True)
    if not warm:
        shutil.rmtree(directory / "cache", ignore_errors=True)
    began = time.time()
    with subprocess.Popen([sys.executable, "-m", "llmforge", "finetune", str(config)], stderr=subprocess.PIPE) as run:
        times: dict[str, float] = {}
        while "step" not in times:
            if run.poll() is not None:
                assert run.stderr is not None
                sys.exit(run.stderr.read().decode())
            time.sleep(0.05)
            for log in (directory / "runs").glob("*/events.jsonl"):
                events = [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]]
                times = {e["event"]: datetime.fromisoformat(e["time"]).timestamp() - began for e in events[::-1]}
        run.kill()
    return [times["started"], times["step"]]


def build_model(directory: Path) -> Path:
    """Write a small Llama with random weights, and a tokenizer whose vocabulary has the size of a small real one's."""
    import tokenizers
    import torch
    import transformers

    rng = random.Random(0)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ("".join(rng.choices(SYLLABLES, k=rng.randint(2, 5))) for _ in range(400_000))
    model.train_from_iterator((f" {word}" for word in words), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=10,
        num_attention_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_conversations(path: Path) -> Path:
    """Write 200 conversations of one or two short questions and answers."""
    rng = random.Random(1)

    def say(longest: int) -> str:
        words = ("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(5, longest)))
        return " ".join(words).capitalize()

    rows = []
    for _ in range(200):
        messages = []
        for _ in range(rng.randint(1, 2)):
            messages.append({"role": "user", "content": f"{say(25)}?"})
            messages.append({"role": "assistant", "content": f"{say(40)}."})
        rows.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(rows))
    return path


def _repeat(runs: int, measure: Callable[[], list[float]]) -> list[list[float]]:
    """Measure some times, and once before that fills the file cache; give each figure's values."""
    return [list(values) for values in zip(*[measure() for _ in range(runs + 1)][1:], strict=True)]


def _in_words(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.2f} s, slowest {max(seconds):.2f} s"


if __name__ == "__main__":
    main()
