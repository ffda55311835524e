"""The work that every program is given: a model, rows of known sizes, and what the work costs in theory.

Everything is made from a seed, here, so that nothing is downloaded but the tokenizer.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Method = Literal["lora", "full"]
Mode = Literal["tuned", "quickstart"]
Messages = list[dict[str, str]]
Make = Callable[["Words", np.random.Generator, int], Iterator[Messages]]

SEED = 7
PAD_TOKEN = "<|endoftext|>"  # id 0; no row contains it, so that what is not this token is real
END_OF_TURN = "<|im_end|>"
# ChatML, written so that it says which tokens are trained (TRL and plain transformers read that).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURN, ANSWER = 5, 6  # tokens of a turn around its words; "assistant" is two
LONGEST_WORD = 8


@dataclass(frozen=True)
class Shape:
    """A Llama: the numbers that its size and its cost follow from."""

    name: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool

    @property
    def linear(self) -> int:
        """Weights of the decoder's linear layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.products())

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.linear + self.head * (1 if self.tied else 2) + self.hidden * (2 * self.layers + 1)

    def lora(self, rank: int) -> int:
        """Weights of an adapter on every linear layer of the decoder."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.products())

    def products(self) -> list[tuple[int, int]]:
        """Give inputs and outputs of the linear layers of one decoder layer."""
        h, kv, wide = self.hidden, self.hidden // self.heads * self.key_value_heads, self.intermediate
        return [(h, h), (h, kv), (h, kv), (h, h), (h, wide), (h, wide), (wide, h)]


SMALL = Shape("57M", 10, 512, 8, 8, 1376, 49_152, 2_048, tied=True)
# Shapes of Llama 3; full training takes the largest that fits.
LLAMAS = (
    Shape("8B", 32, 4_096, 32, 8, 14_336, 128_256, 8_192, tied=False),
    Shape("3B", 28, 3_072, 24, 8, 8_192, 128_256, 8_192, tied=True),
    Shape("1B", 16, 2_048, 32, 8, 8_192, 128_256, 8_192, tied=True),
)


@dataclass(frozen=True)
class Workload:
    """Rows of one kind.

    `micro_batch` is how many rows a program that pads takes at a time; `examples_per_step` is a multiple of it.
    """

    name: str
    title: str
    context: int
    examples_per_step: int
    micro_batch: int
    rows: int
    make: Make


@dataclass(frozen=True)
class Sizes:
    """What the rows of a workload add up to, by the model's own tokenizer. `squares` is the sum of squared lengths."""

    rows: int
    tokens: int
    trained: int
    squares: int
    shortest: int
    longest: int


@dataclass(frozen=True)
class Case:
    """One thing to do: a workload, trained by a method in a mode. `directory` is the program's own, and empty."""

    workload: Workload
    method: Method
    mode: Mode
    model: Path
    rows: Path
    directory: Path
    sizes: Sizes
    shape: Shape
    threads: int
    rank: int
    learning_rate: float
    dtype: Literal["fp32", "bf16"]
    device: Literal["cpu", "cuda"]

    @property
    def steps(self) -> int:
        """Optimizer steps of a program that takes rows one by one."""
        return math.ceil(self.sizes.rows / self.workload.examples_per_step)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.workload.examples_per_step // self.workload.micro_batch

    @property
    def packs_per_step(self) -> int:
        """Full sequences that hold about as many tokens as the rows of a step: what a program that packs takes."""
        tokens = self.sizes.tokens / self.sizes.rows * self.workload.examples_per_step
        return max(1, round(tokens / self.workload.context))


class Words:
    """Words that are one token each wherever they stand, drawn so that a few are frequent and many are not."""

    def __init__(self, tokenizer: Any, count: int = 2_000) -> None:
        vocabulary = tokenizer.get_vocab()
        fitting = sorted(
            token[1:]
            for token in vocabulary
            # "Ġ" is the space in front, which the first word of a text does not have.
            if token.startswith("Ġ") and token[1:].isascii() and token[1:].isalpha() and token[1:].islower()
            if 3 <= len(token) - 1 <= LONGEST_WORD and token[1:] in vocabulary
        )
        self._words = np.random.default_rng(SEED).permutation(fitting)[:count]
        weights = 1 / np.arange(1, len(self._words) + 1)
        self._weights = weights / weights.sum()

    def text(self, random: np.random.Generator, words: int) -> str:
        """Give a text of so many words, which is so many tokens."""
        return " ".join(random.choice(self._words, words, p=self._weights))


def chat_rows(shortest: int, longest: int, median: int) -> Make:
    """Conversations whose lengths have a long tail; 60 % of the tokens are prompt."""

    def make(words: Words, random: np.random.Generator, rows: int) -> Iterator[Messages]:
        for _ in range(rows):
            total = int(np.clip(random.lognormal(math.log(median), 0.8), shortest, longest))
            turns = 1 + min(int(random.integers(0, 1 + total // 60)), 7)
            yield _conversation(words, random, total, turns, answered=0.4)

    return make


def short_rows(words: Words, random: np.random.Generator, rows: int) -> Iterator[Messages]:
    """Many tiny rows, of 15 to 40 tokens."""
    for _ in range(rows):
        yield _conversation(words, random, int(random.integers(15, 41)), 1, answered=0.4)


def long_rows(words: Words, random: np.random.Generator, rows: int) -> Iterator[Messages]:
    """Conversations that nearly fill the context."""
    for _ in range(rows):
        yield _conversation(words, random, int(random.integers(1_800, 2_041)), 6, answered=0.4)


def guard_rows(words: Words, random: np.random.Generator, rows: int) -> Iterator[Messages]:
    """One policy of 1,200 tokens in front of every row, then a short message and a very short answer."""
    policy = words.text(random, 1_200 - TURN)
    for _ in range(rows):
        question = words.text(random, int(random.integers(45, 75)))
        answer = words.text(random, int(random.integers(2, 8)))
        yield [
            {"role": "system", "content": policy},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]


def _conversation(words: Words, random: np.random.Generator, total: int, turns: int, answered: float) -> Messages:
    """Give a conversation of `total` tokens, of which `answered` are trained."""
    content = total - turns * (TURN + ANSWER)
    answers = int(np.clip(round(answered * total) - turns, turns, content - turns))
    messages: Messages = []
    for asked, said in zip(_parts(random, content - answers, turns), _parts(random, answers, turns), strict=True):
        messages.append({"role": "user", "content": words.text(random, asked)})
        messages.append({"role": "assistant", "content": words.text(random, said)})
    return messages


def _parts(random: np.random.Generator, total: int, parts: int) -> list[int]:
    """Cut a number into parts of at least 1."""
    return [1 + int(part) for part in random.multinomial(total - parts, random.dirichlet([3.0] * parts))]


CPU_WORKLOADS = (
    Workload("chat", "conversations of 16–512 tokens, long-tailed", 512, 8, 8, 280, chat_rows(16, 512, 110)),
    Workload("guard", "a shared policy of 1,200 tokens, then about 80", 1_344, 16, 2, 64, guard_rows),
    Workload("short", "rows of 15–40 tokens", 512, 16, 16, 1_200, short_rows),
    Workload("long", "conversations of 1,800–2,040 tokens", 2_048, 4, 1, 20, long_rows),
)
GPU_WORKLOADS = (
    Workload("chat", "conversations of 32–4,096 tokens, long-tailed", 4_096, 32, 4, 1_024, chat_rows(32, 4_096, 600)),
    Workload("guard", "a shared policy of 1,200 tokens, then about 80", 4_096, 32, 4, 1_024, guard_rows),
)


def build_tokenizer(gguf: Path, directory: Path) -> Any:
    """Save the real tokenizer out of a GGUF file, with a padding token of its own and plain ChatML."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = max(shape.context for shape in (SMALL, *LLAMAS))
    tokenizer.save_pretrained(directory)
    return tokenizer


def build_model(shape: Shape, dtype: Literal["fp32", "bf16"], gguf: Path, cache: Path) -> Path:
    """Write a model of random weights, once."""
    key = hashlib.sha256(json.dumps([asdict(shape), dtype, CHAT_TEMPLATE, SEED]).encode()).hexdigest()[:12]
    directory = cache / "models" / f"{shape.name}-{dtype}-{key}"
    if (directory / "done").is_file():
        return directory
    import torch
    import transformers

    tokenizer = build_tokenizer(gguf, directory)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() and shape is not SMALL else "cpu"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16
        )
    model.save_pretrained(directory)
    (directory / "done").touch()
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return directory


def build_rows(workload: Workload, model: Path, directory: Path) -> tuple[Path, Sizes]:
    """Write a workload's rows as JSON lines, and count their tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    random = np.random.default_rng(SEED)
    rows = list(workload.make(Words(tokenizer), random, workload.rows))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{workload.name}-{workload.rows}.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    encoded = [
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        for messages in rows
    ]
    lengths = [len(row["input_ids"]) for row in encoded]
    if max(lengths) > workload.context:
        raise ValueError(f"{workload.name}: a row has {max(lengths)} tokens, more than {workload.context}")
    trained = sum(sum(row["assistant_masks"]) for row in encoded)
    squares = sum(length * length for length in lengths)
    return path, Sizes(len(rows), sum(lengths), trained, squares, min(lengths), max(lengths))


FLOP_RULE = (
    "FLOPs of a token, forward and backward: 6 for each weight that is trained, 4 for each that is not; the output "
    "layer only where a token is trained; causal attention 6 × layers × hidden × length² for a row (half of the "
    "square is computed, three times); embeddings, norms and the optimizer count nothing. Every row counts as if it "
    "was computed alone and without padding, so a program that computes a shared prefix once can exceed 100 %."
)


def flops(shape: Shape, sizes: Sizes, method: Method, rank: int) -> float:
    """Give the floating-point operations that one epoch needs, by FLOP_RULE."""
    per_weight = 4 if method == "lora" else 6
    total = per_weight * (shape.linear * sizes.tokens + shape.head * sizes.trained)
    if method == "lora":
        total += 6 * shape.lora(rank) * sizes.tokens
    return total + 6 * shape.layers * shape.hidden * sizes.squares
