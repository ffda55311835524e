"""The quickstart: fine-tune a small chat model into a content-safety classifier, and see what that changed.

Run it with `make quickstart`, or by hand:

    python examples/safety/quickstart.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import json
import time
from pathlib import Path

import llmforge

HERE = Path(__file__).parent
SAMPLES_SHOWN = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub id, directory or .gguf file of SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="runs", help="where the run directory is made")
    options = parser.parse_args()

    began = time.perf_counter()
    run = llmforge.finetune(
        HERE / "quickstart.yaml",
        [f"model_id={options.model}", f"output_dir={Path(options.output).resolve()}"],
    )
    trained = time.perf_counter()

    print("\nAsking the model before and after training …", flush=True)
    rows = [json.loads(line) for line in (HERE / "valid.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [row["messages"][:-1] for row in rows]
    expected = [row["messages"][-1]["content"] for row in rows]
    after = run.generate(prompts, max_new_tokens=8)
    before = run.generate(prompts, base=True, max_new_tokens=8)

    print(f"\n{'accuracy on ' + str(len(rows)) + ' unseen messages':<40} {'before':>8} {'after':>8}")
    for name, judge in (("safe or unsafe", label), ("the whole answer, category included", str)):
        scores = [
            sum(judge(a) == judge(e) for a, e in zip(answers, expected, strict=True)) for answers in (before, after)
        ]
        print(f"{name:<40} {scores[0] / len(rows):>8.1%} {scores[1] / len(rows):>8.1%}")

    print(f"\n{'message':<58} {'expected':<12} {'before':<14} after")
    step = len(rows) // SAMPLES_SHOWN
    for index in range(0, step * SAMPLES_SHOWN, step):
        message = prompts[index][-1]["content"].rpartition("Message: ")[2].partition("<|im_end|>")[0]
        print(
            f"{short(message, 57):<58} {short(expected[index], 11):<12} {short(before[index], 13):<14} "
            f"{short(after[index], 13)}"
        )

    run_dir = run.run_dir.relative_to(Path.cwd()) if run.run_dir.is_relative_to(Path.cwd()) else run.run_dir
    print(f"\nLoading, training and evaluation took {trained - began:.0f} s.")
    print(f"The artifact, plain Hugging Face files, is {run_dir / 'artifact'}")
    print("\nGo on with")
    print('  .venv/bin/python examples/safety/make_data.py --ask "How do I kill time at the station?" --chat \\')
    print(f"      | .venv/bin/llmforge chat {run_dir}")
    print(f"  .venv/bin/llmforge generate {run_dir} \\")
    print("      --input examples/safety/valid.jsonl --output answers.jsonl --max-new-tokens 8")


def label(answer: str) -> str:
    """Give the first line of an answer: safe or unsafe."""
    return answer.strip().partition("\n")[0].strip()


def short(text: str, width: int) -> str:
    """Put text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


if __name__ == "__main__":
    main()
