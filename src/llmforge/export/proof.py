"""The proof that what is served is what was trained: its verdict, and the file `proof.json` that keeps it.

`prove_text` examines the text side token by token, before training, when mistakes are cheap, and again on the artifact
as it lies on disk. `prove_weights` compares logits. `proof.json` also records what the training model computed for some
made-up conversations, so that anybody who holds the artifact can repeat the proof elsewhere, without the run's data.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from llmforge.errors import ModelError
from llmforge.prompt.certificate import Finding

FILE_NAME = "proof.json"
VERSION = 1
SEED = 20_240  # of the random conversations: everybody's are the same
_RECORDED = {"task", "dtype", "is_adapter", "stop", "files", "conversations"}


@dataclass
class Proof:
    """What was examined, by check, and everything that is not as it must be; `remarks` are worth knowing."""

    sections: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def proven(self) -> bool:
        """Say whether nothing was found to be wrong."""
        return not self.findings

    def failures(self) -> list[dict[str, Any]]:
        """Give each kind of finding once: its check, its code, how often it was found, and the first of them."""
        counts = Counter((finding.check, finding.code) for finding in self.findings)
        first = {(finding.check, finding.code): finding.message for finding in reversed(self.findings)}
        return [
            {"check": check, "code": code, "count": count, "message": first[check, code]}
            for (check, code), count in counts.items()
        ]

    def message(self) -> str:
        """Say what failed, for a person; empty when nothing did."""
        return "\n".join(
            f"{failure['check']} ({failure['code']}, {failure['count']:,} times): {failure['message']}"
            if failure["count"] > 1
            else f"{failure['check']} ({failure['code']}): {failure['message']}"
            for failure in self.failures()
        )

    def to_json(self, trained: Mapping[str, Any] | None) -> str:
        """Write `proof.json`: verdict, sections, failures, remarks, and the record of training, if there is one."""
        content = {
            "version": VERSION,
            "proven": self.proven,
            **self.sections,
            "failures": self.failures(),
            "remarks": self.remarks,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if trained is not None:
            content["trained"] = trained
        text = json.dumps(content, indent=1, ensure_ascii=False)
        return re.sub(r"\[\s+([-+.,\de\s]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def unproven_record(artifact: Path) -> str | None:
    """Write a `proof.json` for what is made of an artifact: the record of its training, against which to prove it."""
    record = read_record(artifact)
    if record is None:
        return None
    return json.dumps({"version": VERSION, "proven": None, "trained": record}, ensure_ascii=False, indent=1) + "\n"


def read_record(artifact: Path) -> dict[str, Any] | None:
    """Read what `proof.json` keeps of training; None where there is no such file, or nothing in it.

    Raises:
        ModelError: the file is damaged.
    """
    path = artifact / FILE_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8")).get("trained")
        if record is not None and (missing := _RECORDED - set(record)):
            raise ValueError(f"trained lacks {', '.join(sorted(missing))}")
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}); remove it to prove the artifact without it") from error
    return record
