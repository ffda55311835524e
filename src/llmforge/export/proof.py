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
from typing import Any, Literal, Self

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmforge.errors import ModelError
from llmforge.export.round_trip import PLACES
from llmforge.models.device import Dtype
from llmforge.prompt import StopRules
from llmforge.prompt.certificate import Finding

FILE_NAME = "proof.json"
VERSION = 1
SEED = 20_240  # of the random conversations: everybody's are the same


class Example(BaseModel):
    """A made-up conversation: as it was trained, and the log-probabilities that the trained model gave its last tokens.

    The model saw the first `probe_tokens` of `input_ids`.
    """

    model_config = ConfigDict(frozen=True)

    messages: list[dict[str, Any]]
    input_ids: list[int]
    loss_weights: list[float]
    probe_tokens: int = Field(ge=2)
    log_probs: list[float]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.input_ids) != len(self.loss_weights):
            raise ValueError("there are not as many loss_weights as input_ids")
        if self.probe_tokens > len(self.input_ids):
            raise ValueError("there are more probe_tokens than input_ids")
        if len(self.log_probs) != min(self.probe_tokens - 1, PLACES):
            raise ValueError("there are not as many log_probs as probe_tokens ask for")
        return self

    @property
    def probe(self) -> list[int]:
        """The token ids that the model was given."""
        return self.input_ids[: self.probe_tokens]


class Record(BaseModel):
    """What `proof.json` keeps of training, so that the proof can be repeated without the run's data.

    `files` are the hashes of the artifact's text side, `weights` those of its weights and their configs; empty where
    nobody wrote them down. A merged export carries the record of its run, with the hashes of its own weights.
    """

    model_config = ConfigDict(frozen=True)

    task: Literal["causal_lm", "instruction_tuning"]
    dtype: Dtype
    is_adapter: bool
    stop: StopRules
    files: dict[str, str]
    weights: dict[str, str] = {}
    conversations: list[Example]


@dataclass
class Proof:
    """What was examined, by check, and everything that is not as it must be; `remarks` are worth knowing.

    `left_open` says what could not be examined, for want of something to compare it with.
    """

    sections: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    left_open: str | None = None

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

    def to_json(self, trained: Record | None) -> str:
        """Write `proof.json`: verdict, sections, failures, remarks, and the record of training, if there is one."""
        content = {
            "version": VERSION,
            "proven": self.proven,
            **self.sections,
            "failures": self.failures(),
            "remarks": self.remarks,
            **({} if self.left_open is None else {"left_open": self.left_open}),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if trained is not None:
            content["trained"] = trained.model_dump(mode="json")
        text = json.dumps(content, indent=1, ensure_ascii=False)
        return re.sub(r"\[\s+([-+.,\de\s]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def unproven_record(artifact: Path, weights: Mapping[str, str]) -> str | None:
    """Write a `proof.json` for what is made of an artifact: the record of its training, against which to prove it.

    Args:
        weights: hashes of the weights that were made.
    """
    record = read_record(artifact)
    if record is None:
        return None
    trained = record.model_copy(update={"weights": dict(weights)}).model_dump(mode="json")
    return json.dumps({"version": VERSION, "proven": None, "trained": trained}, ensure_ascii=False, indent=1) + "\n"


def read_record(artifact: Path) -> Record | None:
    """Read what `proof.json` keeps of training; None where there is no such file, or nothing in it.

    Raises:
        ModelError: the file is damaged.
    """
    path = artifact / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        trained = content.get("trained")
        return None if trained is None else Record.model_validate(trained)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, ('trained', *first['loc'])))}: {first['msg'].removeprefix('Value error, ')}"
    except (ValueError, RecursionError) as error:
        why = str(error)
    raise ModelError(f"{path} is damaged ({why}); remove it to prove the artifact without it")
