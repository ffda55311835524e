"""Repeats the proof of an artifact: on its run's rows, on other rows, or without any, wherever the artifact lies."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmforge.atomic import write_atomically
from llmforge.config import LoadedConfig, load_config
from llmforge.errors import ConversationError, DataError, InputError, PromptFormatError
from llmforge.jobs.run import find_artifact, local_directory
from llmforge.jobs.run_directory import RunDirectory

if TYPE_CHECKING:
    from llmforge.config.schema import FineTuningConfig
    from llmforge.export.proof import Proof, Record
    from llmforge.export.prove_text import Row
    from llmforge.prompt import Encoder, StopRules
    from llmforge.prompt.certificate import Finding
    from llmforge.tasks import LanguageModeling


@dataclass(frozen=True)
class Proven:
    """An artifact and its proof."""

    artifact: Path
    proof: "Proof"


def prove(path: str | Path, *, data: Sequence[str] = ()) -> Proven:
    """Prove an artifact again and write its `proof.json`.

    Args:
        path: a run, or an artifact.
        data: files of rows in messages form to prove it on; by default a run's own validation (else training) rows, and
            none for an artifact alone.

    Raises:
        InputError: there is no artifact, or nothing to prove it on; the data cannot be used; or, where there is no
            record of training to compare it with, the artifact cannot be read.
    """
    import torch

    from llmforge.export.proof import FILE_NAME, Proof, read_record
    from llmforge.export.prove_text import unusable
    from llmforge.export.prove_weights import prove_weights
    from llmforge.models.device import DTYPES, autocast, best_dtype, find_device
    from llmforge.models.load import load_tokenizer
    from llmforge.models.source import ModelSource
    from llmforge.models.trained import is_adapter
    from llmforge.prompt import load_format

    artifact = _find_artifact(path)
    config = _run_config(artifact)
    trust, pickles = (False, []) if config is None else (config.trust_remote_code, config.allow_pickle_weights)
    record = read_record(artifact)
    probes: list[list[int]] = []
    try:
        tokenizer = load_tokenizer(ModelSource(str(artifact), artifact), trust_remote_code=trust)
        encoder, stop = load_format(artifact, tokenizer)
    except InputError as error:
        if record is None:
            raise
        text = Proof(findings=[*_edited(artifact, record), unusable(error)])
    else:
        text, probes = _prove_text(artifact, record, encoder, stop, config, data)
    if record is None and is_adapter(artifact) and not probes:
        raise InputError(
            f"{artifact} has no record of its training, its format refuses all made-up conversations, and there are no "
            "rows; give some with --data"
        )

    device = find_device()
    dtype = record.dtype if record is not None else best_dtype(device)[0]
    weights = prove_weights(
        artifact,
        record,
        probes=probes,
        dtype=dtype,
        weights_dtype=DTYPES[dtype],
        device=device,
        autocast=autocast(torch.device(device), dtype),
        trust_remote_code=trust,
        allow_pickle_weights=pickles,
    )
    proof = Proof(
        {**text.sections, **weights.sections},
        [*text.findings, *weights.findings],
        [*text.remarks, *weights.remarks],
    )
    if record is None or not (record.weights or record.conversations):
        proof.left_open = "whether these are the weights that were trained: proof.json has no record of that"
    write_atomically(artifact / FILE_NAME, proof.to_json(record))
    return Proven(artifact, proof)


def _edited(artifact: Path, record: "Record | None") -> "list[Finding]":
    from llmforge.export.prove_text import edited_files

    return [] if record is None else edited_files(artifact, record)


def _prove_text(
    artifact: Path,
    record: "Record | None",
    encoder: "Encoder",
    stop: "StopRules",
    config: "FineTuningConfig | None",
    data: Sequence[str],
) -> "tuple[Proof, list[list[int]]]":
    """Prove the text side, and give token ids to compare weights on: of rows, or else of made-up conversations."""
    from llmforge.export.proof import Proof
    from llmforge.export.prove_text import prove_record, prove_text, unusable
    from llmforge.export.prove_weights import PROBES, made_up_samples
    from llmforge.tasks import TASKS

    name = record.task if record is not None else (config.task if config else None) or "instruction_tuning"
    task = TASKS[name](pad_token_id=encoder.tokenizer.pad_token_id or 0, pad_to=None)
    trust = config is not None and config.trust_remote_code
    findings = _edited(artifact, record)
    probes: list[list[int]] = []
    try:
        findings += [] if record is None else prove_record(record, encoder, stop)
        rows = list(_rows(data, config, encoder, task))
        samples = [row.samples[0] for row in rows if row.samples][:PROBES]
        if not samples:
            samples = [sample for _, sample in made_up_samples(encoder, task, len(encoder.tokenizer))]
        probes = [list(sample.input_ids) for sample in samples]
        text = prove_text(artifact, encoder=encoder, stop=stop, task=task, rows=rows, trust_remote_code=trust)
    except PromptFormatError as error:
        text = Proof(findings=[unusable(error)])
    text.findings[:0] = findings
    return text, probes


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


def _find_artifact(path: str | Path) -> Path:
    """Find an artifact by its format or, where that was lost since, by its weights and the record of its training.

    Raises:
        InputError: there is none.
    """
    local = local_directory(path)
    if (local / "proof.json").is_file() and any(local.glob("*.safetensors")):
        return local
    try:
        return find_artifact(path)
    except InputError as error:
        raise InputError(f"{error}; or give an artifact, a directory with prompt_format.yaml in it") from error


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
