"""Measures how fast, and in how much memory, rows are checked and tokenised: first run, second run, killed run.

    python benchmarks/prepare_rows.py --rows 1000000
    python benchmarks/prepare_rows.py --rows 1000000 --ray

The rows are chats of 100 to 600 characters (with --short, of 30 to 130), made from a seed. With --ray they are encoded
by Ray Data on a cluster of this machine alone, with a CPU for each worker. Without --tokenizer (a directory), a
byte-level BPE tokenizer of 32,000 tokens is trained on a sample of them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from llmforge.data import RowLayout
from llmforge.data.dataset import PreparedData
from llmforge.data.executors import Executor, encode_here
from llmforge.data.prepare import prepare
from llmforge.prompt import Encoder, PromptFormat
from llmforge.prompt.rows import RowEncoder

CHATML = PromptFormat(
    system="<|im_start|>system\n{instruction}<|im_end|>\n",
    user="<|im_start|>user\n{instruction}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{instruction}<|im_end|>\n",
    trailing_assistant="<|im_start|>assistant\n",
)
ROWS_PER_WRITE = 10_000


def write_rows(path: Path, count: int, short: bool = False) -> None:
    """Write `count` chats: words of a Zipf-like vocabulary, a question of 5-40 words and an answer of 10-60.

    Short ones have 3-12 and 3-12.
    """
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    weights = np.linspace(3, 0.2, len(letters))
    words = [
        "".join(random.choice(letters, length, p=weights / weights.sum())) for length in random.integers(2, 9, 20_000)
    ]
    with open(path, "w") as file:
        for start in range(0, count, ROWS_PER_WRITE):
            rows = min(ROWS_PER_WRITE, count - start)
            question, answer = ((3, 13), (3, 13)) if short else ((5, 41), (10, 61))
            lengths = np.stack([random.integers(*question, rows), random.integers(*answer, rows)], axis=1)
            drawn = iter((len(words) * random.random(int(lengths.sum())) ** 3).astype(int).tolist())
            for words_asked, words_answered in lengths.tolist():
                user = " ".join(words[next(drawn)] for _ in range(words_asked)) + "?"
                assistant = " ".join(words[next(drawn)] for _ in range(words_answered)) + "."
                messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
                file.write(json.dumps({"messages": messages}) + "\n")


def save_tokenizer(directory: Path, rows: Path) -> None:
    """Train a tokenizer on the first rows and save it as a Hugging Face directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with open(rows) as file:
        texts = [
            message["content"]
            for line, _ in zip(file, range(20_000), strict=False)
            for message in json.loads(line)["messages"]
        ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(directory)


def prepared(rows: Path, tokenizer: Path, cache: Path, workers: int | None, on_ray: bool) -> PreparedData:
    """Prepare the rows as a run does."""
    from transformers import AutoTokenizer

    encode = RowEncoder(Encoder(AutoTokenizer.from_pretrained(tokenizer), CHATML), "assistant")
    return prepare(
        [str(rows)],
        layout=RowLayout(),
        encode=encode,
        fingerprint=encode.fingerprint(),
        cache_dir=cache,
        workers=workers,
        executor=ray_executor() if on_ray else encode_here,
    )


def ray_executor() -> Executor:
    """Return the executor of the cluster that this process is connected to."""
    from llmforge.jobs.ray_rows import encode_on_cluster

    return encode_on_cluster


@contextmanager
def cluster(wanted: bool, workers: int | None) -> Iterator[None]:
    """Start a Ray cluster in this process, if it is wanted."""
    if not wanted:
        yield
        return
    import ray

    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()


class PeakMemory:
    """Watches the resident memory (bytes) of this process and of its largest child, ten times a second."""

    def __init__(self) -> None:
        self.own = self.child = self.together = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.1):
            own = process.memory_info().rss
            children = [0]
            for child in process.children(recursive=True):
                try:
                    children.append(child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            self.own = max(self.own, own)
            self.child = max(self.child, *children)
            self.together = max(self.together, own + sum(children))


def kill_half_way(arguments: list[str], cache: Path, shards: int) -> int:
    """Run this file as a child until half of the shards are there, kill it, and return how many were finished."""
    child = subprocess.Popen([sys.executable, __file__, *arguments])
    while len(list(cache.glob("*.arrow"))) < shards // 2 and child.poll() is None:
        time.sleep(0.05)
    child.kill()
    child.wait()
    time.sleep(5)  # what its workers hold in hand, they finish
    return len(list(cache.glob("*.arrow")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--ray", action="store_true", help="encode by Ray Data")
    parser.add_argument("--short", action="store_true", help="short rows")
    parser.add_argument("--no-kill", action="store_true", help="leave out the run that is killed half-way")
    parser.add_argument("--tokenizer", type=Path, default=None)
    parser.add_argument("--only", type=Path, nargs=2, metavar=("ROWS", "CACHE"), help="prepare these and end")
    options = parser.parse_args()
    if options.only:
        with cluster(options.ray, options.workers):
            prepared(options.only[0], options.tokenizer, options.only[1], options.workers, options.ray)
        return

    with cluster(options.ray, options.workers), tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        rows = directory / "rows.jsonl"
        write_rows(rows, options.rows, options.short)
        tokenizer = options.tokenizer or directory / "tokenizer"
        if options.tokenizer is None:
            save_tokenizer(tokenizer, rows)
        print(f"{options.rows:,} rows, {rows.stat().st_size / 1e6:,.0f} MB", flush=True)

        before = psutil.Process().memory_info().rss
        started = time.perf_counter()
        with PeakMemory() as peak:
            data = prepared(rows, tokenizer, directory / "cache", options.workers, options.ray)
        seconds = time.perf_counter() - started
        tokens = data.statistics.tokens
        shards = list((directory / "cache").glob("*.arrow"))
        print(f"first run: {seconds:.1f} s, {options.rows / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s")
        print(
            f"  peak memory: this process {peak.own / 1e6:,.0f} MB ({before / 1e6:,.0f} MB before it began), ", end=""
        )
        print(f"largest worker {peak.child / 1e6:,.0f} MB, all together {peak.together / 1e6:,.0f} MB")
        print(f"  {len(shards)} shards, {sum(shard.stat().st_size for shard in shards) / 1e6:,.0f} MB", flush=True)

        started = time.perf_counter()
        data = prepared(rows, tokenizer, directory / "cache", options.workers, options.ray)
        print(f"second run: {time.perf_counter() - started:.1f} s, {len(data.shards)} shards used")

        started = time.perf_counter()
        dataset = data.fit(64, "truncate")
        print(f"fit: {time.perf_counter() - started:.2f} s, {dataset.ledger.counts}")
        started = time.perf_counter()
        dataset.ledger.write(directory / "ledger.jsonl")
        print(f"ledger written: {time.perf_counter() - started:.2f} s")
        order = np.random.default_rng(0).permutation(len(dataset))[:20_000]
        started = time.perf_counter()
        for index in order:
            dataset[index]
        print(f"random access: {(time.perf_counter() - started) / len(order) * 1e6:.0f} µs per sample")

        again = directory / "killed"
        if options.no_kill:
            return
        arguments = ["--tokenizer", str(tokenizer), "--only", str(rows), str(again)]
        arguments += [] if options.workers is None else ["--workers", str(options.workers)]
        arguments += ["--ray"] * options.ray
        finished = kill_half_way(arguments, again, len(shards))
        times = {shard: shard.stat().st_mtime_ns for shard in again.glob("*.arrow")}
        started = time.perf_counter()
        data = prepared(rows, tokenizer, again, options.workers, options.ray)
        redone = sum(shard.stat().st_mtime_ns != times[shard] for shard in times)
        seconds = time.perf_counter() - started
        print(
            f"killed with {finished} of {len(data.shards)} shards done; resumed in {seconds:.1f} s, {redone} done again"
        )


if __name__ == "__main__":
    main()
