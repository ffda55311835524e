"""Sweeps every architecture, or anew those named on the command line, and writes docs/models.md."""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import CHATML_TEMPLATE, build_tokenizer
from sweep.report import write_report
from sweep.runner import Outcome, sweep
from sweep.shrink import causal_types

ROOT = Path(__file__).parents[2]
DOCUMENT, FOUND = ROOT / "docs" / "models.md", ROOT / ".cache" / "sweep.json"


def main(names: list[str]) -> None:
    FOUND.parent.mkdir(exist_ok=True)
    found = json.loads(FOUND.read_text()) if names and FOUND.is_file() else {}
    with tempfile.TemporaryDirectory() as directory:
        build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE).save_pretrained(directory)
        for number, outcome in enumerate(sweep(names or sorted(causal_types()), Path(directory)), start=1):
            found[outcome.model_type] = asdict(outcome)
            FOUND.write_text(json.dumps(found, indent=1))
            verdict = "passed" if outcome.stage is None else f"{outcome.stage}: {outcome.why}"
            print(f"{number:3} {outcome.model_type} ({outcome.seconds:.1f} s) {verdict}", flush=True)
    if found.keys() >= causal_types().keys():
        write_report(DOCUMENT, [Outcome(**each) for each in found.values()])


main(sys.argv[1:])
