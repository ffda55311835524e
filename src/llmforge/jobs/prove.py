"""Repeats the proof of an artifact: on its run's rows, on other rows, or without any, wherever the artifact lies."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmforge.atomic import write_atomically
from llmforge.config import LoadedConfig, load_config
from llmforge.errors import ConversationError, DataError, InputError, PromptFormatError
from llmforge.jobs.run import find_artifact
from llmforge.jobs.run_directory import RunDirectory

if TYPE_CHECKING:
    from llmforge.config.schema import FineTuningConfig
    from llmforge.export.proof import Proof
    from llmforge.export.prove_text import Row
    from llmforge.prompt import Encoder
    from llmforge.tasks import LanguageModeling


@dataclass(frozen=True)
class Proven:
    """An artifact and its proof."""

    artifact: Path
    proof: "Proof"


def prove(path: Path, *, data: Sequence[str] = ()) -> Proven:
    """Prove an artifact again and write its `proof.json`.

    Args:
        path: a run, or an artifact.
        data: files of rows in messages form to prove it on; by default a run's own validation (else training) rows, and
            none for an artifact alone.

    Raises:
        InputError: there is no artifact, its base model is missing, or the data cannot be used.
    """
    import torch

    from llmforge.export.proof import FILE_NAME, Proof, read_record
    from llmforge.export.prove_text import Row, edited_files, prove_record, prove_text
    from llmforge.export.prove_weights import prove_weights
    from llmforge.models.device import DTYPES, autocast, best_dtype, find_device
    from llmforge.models.load import load_tokenizer
    from llmforge.models.source import ModelSource
    from llmforge.prompt import load_format
    from llmforge.prompt.certificate import Finding
    from llmforge.tasks import TASKS

    artifact = find_artifact(path)
    config = _run_config(artifact)
    trust, pickles = (False, []) if config is None else (config.trust_remote_code, config.allow_pickle_weights)
    record = read_record(artifact)
    tokenizer = load_tokenizer(ModelSource(str(artifact), artifact), trust_remote_code=trust)
    encoder, stop = load_format(artifact, tokenizer)
    task_name = record["task"] if record is not None else (config.task if config else None) or "instruction_tuning"
    task = TASKS[task_name](pad_token_id=tokenizer.pad_token_id or 0, pad_to=None, keeps_logits=False)
    findings: list[Finding] = []
    rows: list[Row] = []
    try:
        findings += [] if record is None else prove_record(artifact, record, encoder, stop)
        rows += _rows(data, config, encoder, task)
        text = prove_text(artifact, encoder=encoder, stop=stop, task=task, rows=rows, trust_remote_code=trust)
    except PromptFormatError as error:
        text = Proof(findings=[Finding("parity", "unusable", f"the artifact's format cannot be used: {error}")])
        findings += [] if record is None else edited_files(artifact, record)

    device = find_device()
    dtype = record["dtype"] if record is not None else best_dtype(device)[0]
    weights = prove_weights(
        artifact,
        record,
        probes=[list(row.samples[0].input_ids) for row in rows if row.samples][:4],
        dtype=dtype,
        weights_dtype=DTYPES[dtype],
        device=device,
        autocast=autocast(torch.device(device), dtype),
        trust_remote_code=trust,
        allow_pickle_weights=pickles,
    )
    remarks = [*text.remarks, *weights.remarks]
    if record is None:
        remarks.append("proof.json has no record of training, so only artifact and merged model could be compared")
    proof = Proof({**text.sections, **weights.sections}, [*findings, *text.findings, *weights.findings], remarks)
    write_atomically(artifact / FILE_NAME, proof.to_json(record))
    return Proven(artifact, proof)


def check_prompts(loaded: LoadedConfig) -> "tuple[Proof, list[str]]":
    """Prove what can be proven of a config before training: parity, masks and stops, on its own rows.

    Returns:
        The proof, and notes for a person.

    Raises:
        InputError: what `finetune` would refuse before loading weights, a failed proof excepted.
    """
    from llmforge.jobs.validation import Notes
    from llmforge.train.prepare import prepare_run

    notes = Notes()
    for note in loaded.notes:
        notes.note(note)
    return prepare_run(loaded, notes, allow_unproven=True).text_proof, notes.lines


def _run_config(artifact: Path) -> "FineTuningConfig | None":
    """Read the config of the run that an artifact lies in, if it lies in one."""
    resolved = RunDirectory(artifact.parent).resolved_config
    return load_config(resolved).config if resolved.is_file() else None


def _rows(
    data: Sequence[str], config: "FineTuningConfig | None", encoder: "Encoder", task: "LanguageModeling"
) -> "Iterator[Row]":
    """Read rows and encode them as training does, uncut."""
    from llmforge.data import RowLayout, RowProblem
    from llmforge.data.blocks import read_rows
    from llmforge.data.files import find_files
    from llmforge.export.prove_text import ROWS, Row

    layout = RowLayout(needs_assistant=task.needs_assistant)
    if data:
        files = find_files(list(data), Path.cwd())
    elif config is not None:
        layout = RowLayout(config.data_format, config.columns, task.needs_assistant)
        try:
            files = find_files(config.valid_path or config.train_path, Path.cwd())
        except InputError:
            return  # moved or deleted since; --data names other rows
    else:
        return
    for row in itertools.islice(read_rows(files, layout), ROWS):
        if isinstance(row.content, RowProblem):
            if data:
                raise DataError(row.content.reason, file=row.file, line=row.line)
            continue
        (samples,) = encoder.encode_conversations([row.content], task.trained)
        if isinstance(samples, ConversationError):
            if data:
                raise DataError(str(samples), file=row.file, line=row.line)
            continue
        yield Row(f"{row.file}:{row.line}", row.content, samples)
