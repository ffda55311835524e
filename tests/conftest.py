"""Tiny tokenizers and models, made here: the tests need no network, no hub and no GPU."""

import contextlib
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and lose much on shared cores
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: two other processes that compute starve Ray's

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does; the suite as a whole is timed, not its examples.
settings.register_profile("llmforge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llmforge")

# A shell starts what it puts into the background with SIGINT ignored, and programs inherit that; tests press ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files whose tests start many processes. They come first, on one worker, so that they neither compete with each other
# nor are the last to end while the other worker has nothing to do.
HEAVY = (
    "test_ray",
    "test_verify_resume",
    "test_parallel",
    "test_sweep",
    "test_ray_rows",
    "test_ray_jobs",
    "test_cluster",
)

TEXT = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris. "
    "You are a helpful assistant.\n\nHow many clips did she sell? 48/2 = 24. #### 72\n safe unsafe S1 S2 "
    'user assistant system instruction [INST] [/INST] naïve café 你好 {braces} "quotes" \\backslash '
)
CORPUS = TEXT.split(" ")

SPECIAL_TOKENS = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
]

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the heavy files to the front."""
    items.sort(key=lambda item: HEAVY.index(item.path.stem) if item.path.stem in HEAVY else len(HEAVY))


def build_tokenizer(
    vocab_size: int = 512,
    *,
    bos: str = "<s>",
    eos: str = "</s>",
    chat_template: str | None = None,
    split: str | None = None,
):
    """Train a byte-level BPE tokenizer that knows the special tokens of the usual formats.

    It splits text as GPT-2 does, or by the regular expression `split`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator((" ".join(rng.choices(CORPUS, k=12)) for _ in range(300)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>")
    fast.chat_template = chat_template
    return fast


@pytest.fixture
def permissions_bind() -> Iterator[None]:
    """Let the permissions of files bind this test, also where root runs it."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read and write everything, and only Linux lets it do without")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capabilities(7): version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable ones, and the same of the higher bits
    libc = ctypes.CDLL(None)
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer without a chat template."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def chatml_tokenizer():
    """The same with a ChatML template, whose turns end in its EOS."""
    return build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE)


def build_model(vocab_size: int, *, tie_word_embeddings: bool = False, seed: int = 0, rope_parameters=None):
    """Build a random two-layer Llama of about 60,000 parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.1,
        rope_parameters=rope_parameters,
    )
    return LlamaForCausalLM(config).float()


def save_model(
    directory: Path,
    *,
    tie_word_embeddings: bool = False,
    chat_template: str | None = CHATML_TEMPLATE,
    split: str | None = None,
):
    """Save a tiny model with its tokenizer as a plain Hugging Face directory."""
    tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=chat_template, split=split)
    model = build_model(len(tokenizer), tie_word_embeddings=tie_word_embeddings)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny Llama with untied embeddings and a ChatML tokenizer."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tied_model_dir(tmp_path_factory):
    """A tiny Llama with tied embeddings."""
    return save_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


QUESTIONS = {"red": "stop", "green": "go", "amber": "wait", "blue": "swim", "black": "sleep", "white": "wake"}


def conversation_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of a task that a tiny model can learn: a colour's meaning, worded in several ways."""
    rng = random.Random(seed)
    phrasings = ("What does {} mean?", "Tell me about {}.", "{}?", "And {}, what then?")
    rows = []
    for _ in range(count):
        colour = rng.choice(sorted(QUESTIONS))
        user = {"role": "user", "content": rng.choice(phrasings).format(colour)}
        rows.append({"messages": [user, {"role": "assistant", "content": QUESTIONS[colour]}]})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data_dir(tmp_path):
    """`train.jsonl` (48 rows) and `valid.jsonl` (12 rows)."""
    write_jsonl(tmp_path / "train.jsonl", conversation_rows(48))
    write_jsonl(tmp_path / "valid.jsonl", conversation_rows(12, seed=1))
    return tmp_path


PROMPT_FORMATS = {
    "llama3": {
        "system": "<|start_header_id|>system<|end_header_id|>\n\n{instruction}<|eot_id|>",
        "user": "<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>",
        "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n{instruction}<|eot_id|>",
        "trailing_assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "bos": "<|begin_of_text|>",
        "strip_whitespace": True,
    },
    "mistral": {
        "system": "{instruction}\n\n",
        "user": "[INST] {system}{instruction} [/INST]",
        "assistant": " {instruction}</s>",
        "trailing_assistant": "",
        "bos": "<s>",
        "system_in_user": True,
    },
    "gemma2": {
        "system": "{instruction}\n\n",
        "user": "<start_of_turn>user\n{system}{instruction}<end_of_turn>\n",
        "assistant": "<start_of_turn>model\n{instruction}<end_of_turn>\n",
        "trailing_assistant": "<start_of_turn>model\n",
        "bos": "<bos>",
        "system_in_user": True,
        "strip_whitespace": True,
    },
    "chatml": {
        "system": "<|im_start|>system\n{instruction}<|im_end|>\n",
        "user": "<|im_start|>user\n{instruction}<|im_end|>\n",
        "assistant": "<|im_start|>assistant\n{instruction}<|im_end|>\n",
        "trailing_assistant": "<|im_start|>assistant\n",
        "default_system_message": "You are a helpful assistant.",
    },
    "llama_guard2": {  # pass-through: the data hold all formatting
        "system": "{instruction}",
        "user": "{instruction}",
        "assistant": "{instruction}<|eot_id|>",
        "trailing_assistant": "",
    },
}

HOSTILE_TEXTS = (
    "",
    " ",
    "\n",
    "\t \r\n",
    "{instruction}",
    "{system}",
    "{{ messages }}",
    "{% raw %}",
    "{% endraw %}",
    "{# gone #}",
    "{{ ''.__class__ }}",
    "-%}",
    "{%-",
    "}}",
    "{",
    "}",
    "{0}",
    "%s",
    '"',
    "'",
    "\\",
    "\\n",
    "\\u0041",
    "\\N{BULLET}",
    '\\"',
    "\r\n",
    "\r",
    "\x0b\x0c",
    "\x85",
    "\u2028",
    "\u00a0",
    "\u3000",
    "\ufeff",
    "\x00",
    "\x7f",
    "café",
    "cafe\u0301",
    "你好",
    "👩‍👩‍👧",
    "𝄞",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|im_end|>\n<|im_start|>system\n",
    "<start_of_turn>",
    "</s>",
    "<s>",
    "[INST]",
    "</s",
    "What is the capital of France?",
    "  indented\n    code\n",
    "unsafe\nS1,S2",
)


def random_text(rng: random.Random) -> str:
    """Join a few hostile pieces and words; now and then the result is empty, white space or very long."""
    pieces = [rng.choice(HOSTILE_TEXTS) if rng.random() < 0.6 else rng.choice(CORPUS) for _ in range(rng.randrange(6))]
    text = rng.choice(("", " ", "\n")).join(pieces)
    return text * 40 if rng.random() < 0.01 else text


def random_conversation(rng: random.Random, *, text=random_text) -> list[dict]:
    """Draw a conversation of 1 to 6 turns (rarely 40), mostly with a system message in front or somewhere else.

    Now and then the assistant speaks first.
    """
    turns = 40 if rng.random() < 0.01 else rng.randint(1, 6)
    roles = ("assistant", "user") if rng.random() < 0.05 else ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text(rng)} for index in range(turns)]
    if rng.random() < 0.6:
        messages.insert(0 if rng.random() < 0.8 else rng.randint(0, turns), {"role": "system", "content": text(rng)})
    return messages


@pytest.fixture(params=list(PROMPT_FORMATS))
def prompt_format(request):
    """Each of the formats above in turn."""
    from llmforge.prompt import PromptFormat

    return PromptFormat(**PROMPT_FORMATS[request.param])


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """A Ray cluster of four CPUs: its `address`, and the URL of its `dashboard`. All tests of Ray share it.

    Its machines know `python` as this Python, with the tests on its path.
    """
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    directory = tmp_path_factory.getbasetemp().parent if in_worker else tmp_path_factory.getbasetemp()
    session = os.getppid() if in_worker else os.getpid()  # all of it shares the cluster
    file = directory / "ray.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST_"))}
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    program = [sys.executable, str(Path(__file__).with_name("ray_cluster.py")), str(file), str(session)]
    with contextlib.suppress(FileExistsError), open(directory / "ray.log", "x") as log:  # the first worker starts it
        subprocess.Popen(program, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=directory)
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, (directory / "ray.log").read_text()
        time.sleep(0.1)
    return json.loads(file.read_text())
