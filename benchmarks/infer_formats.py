"""Infers the prompt format of every real tokenizer at hand, and says why where there is none.

python benchmarks/infer_formats.py [DIRECTORY_OR_GGUF ...] [--conversations 1000] [--json FILE]

Without names it takes every tokenizer in LLMFORGE_TOKENIZERS (by default .cache/tokenizers, which
`make install-tokenizers` fills) and the GGUF files in .cache/models. A directory of `*.jinja` files is taken as
templates, each tried with the first tokenizer.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmforge.errors import InputError
from llmforge.models.load import load_tokenizer
from llmforge.models.source import find_model
from llmforge.prompt.files import format_section
from llmforge.prompt.infer import infer_format

CACHE = Path(__file__).parent.parent / ".cache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="tokenizer directories, .gguf files, folders of .jinja")
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()

    results = []
    for name, tokenizer in _tokenizers(options.models or [*_installed()]):
        result: dict[str, Any] = {"name": name}
        began = time.perf_counter()
        if not tokenizer.chat_template:
            result |= {"expressible": None, "why": ["the tokenizer has no chat template"]}
        else:
            try:
                inference = infer_format(tokenizer, conversations=options.conversations)
            except InputError as error:
                result |= {"expressible": False, "why": [str(error)]}
            else:
                result |= asdict(inference) | {
                    "expressible": inference.format is not None,
                    "format": inference.format and format_section(inference.format),
                    "why": inference.reasons,
                }
        result["seconds"] = round(time.perf_counter() - began, 2)
        results.append(result)
        verdict = {True: "proven", False: "no", None: "-"}[result["expressible"]]
        print(f"{name:<34} {verdict:<7} {result.get('conversations', 0):>5} {result['seconds']:>6} s  ", end="")
        print("; ".join(result["why"])[:200])
    with_template = [result for result in results if result["expressible"] is not None]
    proven = sum(result["expressible"] for result in with_template)
    print(f"\nA prompt_format was found and proven for {proven} of {len(with_template)} chat templates.")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _installed() -> Iterator[Path]:
    root = Path(os.environ.get("LLMFORGE_TOKENIZERS") or CACHE / "tokenizers")
    yield from sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    yield from sorted((CACHE / "models").glob("*.gguf"))


def _tokenizers(places: list[Path]) -> Iterator[tuple[str, Any]]:
    """Load one tokenizer after the other, with its template; a name that cannot be loaded is printed."""
    first = None
    for place in places:
        templates = sorted(place.glob("*.jinja")) if place.is_dir() else []
        if templates and not (place / "tokenizer_config.json").exists():
            first = first or next(tokenizer for _, tokenizer in _tokenizers([*_installed()]))
            for template in templates:
                first.chat_template = template.read_text(encoding="utf-8")
                yield template.stem, first
            continue
        try:
            source = find_model(str(place), relative_to=Path.cwd(), weights=False)
            yield place.name, load_tokenizer(source)
        except InputError as error:
            print(f"{place.name:<34} not loaded: {error}")


if __name__ == "__main__":
    main()
