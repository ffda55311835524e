"""Proves the text side of an artifact: parity of token ids, the mask certificate, and that answers end in a stop."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmforge.data.samples import Sample
from llmforge.errors import ConversationError, InputError, PromptFormatError
from llmforge.export.go import find_go, render_go
from llmforge.export.proof import SEED, Proof, Record
from llmforge.models.load import TOKENIZER_FILES, load_tokenizer
from llmforge.models.source import ModelSource
from llmforge.prompt import Encoder, Message, PromptFormat, StopRules, format_section, load_format
from llmforge.prompt.adversary import TEXTS, random_conversations
from llmforge.prompt.certificate import Certificate, Certifier, Check, Finding
from llmforge.prompt.encoder import Trained
from llmforge.prompt.go_template import changed_by_ollama, compile_to_go_template
from llmforge.prompt.served import Served, side_by_side
from llmforge.tasks import LanguageModeling

ROWS = 200  # of the user's own, examined token by token
ROWS_PER_BATCH = 8
RANDOM_CONVERSATIONS = 200
# The files that decide what text becomes: those that there are, and those that a loader would heed if they came.
_TEXT_FILES = (
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "prompt_format.yaml",
)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the user's and the samples it was trained as; `dropped` counts those that the ledger left out."""

    place: str
    content: Mapping[str, Any]
    samples: Sequence[Sample]
    dropped: int = 0


def prove_text(
    directory: Path,
    *,
    encoder: Encoder,
    stop: StopRules,
    task: LanguageModeling,
    rows: Iterable[Row],
    context_length: int | None = None,
    trust_remote_code: bool = False,
) -> Proof:
    """Prove parity, mask and stop for the text side of an artifact, on rows and on random conversations.

    Args:
        directory: tokenizer with chat template, and generation config, as a server would load them.
        encoder: what training used.
        stop: where generation ends.
        task: collates samples into batches, whose weights are the ones that count.
        rows: the user's own, with the samples they were trained as.
        context_length: tokens at which these samples were cut off.

    Returns:
        The proof; with nothing but a finding where the directory holds no text side that can be used.
    """
    try:
        tokenizer = load_tokenizer(ModelSource(str(directory), directory), trust_remote_code=trust_remote_code)
        served = Served(tokenizer)
        saved, saved_stop = load_format(directory, tokenizer)
    except InputError as error:
        return Proof(findings=[unusable(error)])
    certifier = Certifier(served, encoder.format, stop, task.trained, context_length)
    examined = 0
    asked: list[Sequence[Message]] = []
    for together in _batched(rows, ROWS_PER_BATCH):
        examined += len(together)
        weights = iter(_batch_weights(task, together, certifier.certificate))
        for row in together:
            for sample in row.samples:
                certifier.check_bos(sample, row.place)
            own = [next(weights) for _ in row.samples]
            certifier.examine(row.content, row.samples, row.place, batch_weights=own, dropped=row.dropped)
            asked += _prompts(row.content)
    certificate = certifier.certificate
    proof = Proof(findings=list(certificate.findings))

    adversary = Certifier(served, encoder.format, stop, task.trained)
    drawn = _draw(encoder)
    refused = _prove_random(encoder, adversary, task.trained, drawn)
    # In a pass-through format the data write the end of a turn, and random conversations know nothing of that.
    proof.findings += [finding for finding in adversary.certificate.findings if finding.check != "stop"]
    proof.findings += _generation_findings(directory, stop)
    proof.findings += _format_findings(saved, saved_stop, encoder, stop)
    targets = ["chat_template"]
    by_ollama = None
    agrees = not any(finding.check == "parity" for finding in proof.findings)  # else all targets differ alike
    if agrees and isinstance(encoder.format, PromptFormat) and find_go() is not None:
        asked += [messages for messages in drawn if messages[-1]["role"] != "assistant"]
        by_ollama = _prove_modelfile(proof, encoder, served, encoder.format, asked)
    if by_ollama is not None:
        targets.append("ollama")

    proof.sections["parity"] = {
        "rows": examined,
        "random_conversations": RANDOM_CONVERSATIONS,
        "refused_conversations": refused,
        "prompts": certificate.prompts + adversary.certificate.prompts,
        "prompt_tokens": certificate.prompt_tokens + adversary.certificate.prompt_tokens,
        "differences": sum(finding.check == "parity" for finding in proof.findings),
        "targets": targets,
        **({} if by_ollama is None else {"prompts_by_ollama": by_ollama}),
    }
    proof.sections["mask"] = {
        "rows": certificate.rows,
        "samples": certificate.samples,
        "tokens": dict(certificate.tokens),
        "turns": certificate.turns,
        "turns_cut_off": certificate.turns - certificate.whole_turns,
        "turns_exact": certificate.exact_turns,
        "random_turns": adversary.certificate.turns,
    }
    proof.sections["stop"] = {
        "turns": certificate.whole_turns,
        "end_in_stop_token": certificate.token_stops,
        "stop_inside_text": certificate.early_stops,
        "token_ids": list(stop.token_ids),
        "sequences": list(stop.sequences),
    }
    _remark(proof, certificate)
    return proof


def _batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    rows = iter(rows)
    while together := list(itertools.islice(rows, size)):
        yield together


def _batch_weights(task: LanguageModeling, rows: Sequence[Row], certificate: Certificate) -> list[list[float]]:
    """Collate rows into one batch as training does; give each sample's weights in it, and count what pads them."""
    samples = [sample for row in rows for sample in row.samples]
    if not samples:
        return []
    batch = task.collate(samples)
    weights: list[list[float]] = []
    for number, sample in enumerate(samples):
        length = len(sample.input_ids)
        weights.append(batch.loss_weights_BT[number, :length].tolist())
        if not batch.attention_mask_BT[number, :length].all():
            certificate.findings.append(
                Finding(
                    "mask",
                    "unattended",
                    f"{rows[0].place} ff.: tokens of a sample are hidden from attention, as if they were padding",
                )
            )
        if batch.loss_weights_BT[number, length:].any() or batch.attention_mask_BT[number, length:].any():
            certificate.findings.append(Finding("mask", "pad_trained", f"{rows[0].place} ff.: padding carries loss"))
        if not torch.equal(batch.input_ids_BT[number, :length], torch.as_tensor(sample.input_ids)):
            certificate.findings.append(
                Finding("mask", "batch_differs", f"{rows[0].place} ff.: the batch holds other tokens than the samples")
            )
    certificate.tokens["pad"] += batch.input_ids_BT.numel() - sum(map(len, weights))
    return weights


def _draw(encoder: Encoder) -> list[list[Message]]:
    texts = (*TEXTS, *encoder.tokenizer.all_special_tokens)
    return [
        messages
        for orderly in (True, False)
        for messages in random_conversations(RANDOM_CONVERSATIONS // 2, SEED, texts=texts, orderly=orderly)
    ]


def _prove_random(encoder: Encoder, certifier: Certifier, trained: Trained, drawn: Sequence[Sequence[Message]]) -> int:
    """Compare prompts and samples of random conversations; return how many both sides refuse."""
    refused = 0
    for number, messages in enumerate(drawn):
        place = f"random conversation {number}"
        try:
            prompt = encoder.encode_prompt(messages)
        except ConversationError:
            refused += 1
        else:
            certifier.compare_prompt(messages, None, prompt, place)
        if any(message["role"] == "assistant" for message in messages):
            (samples,) = encoder.encode_conversations([{"messages": messages}], trained)
            if not isinstance(samples, ConversationError):
                certifier.examine({"messages": messages}, samples, place)
    return refused


def _prompts(row: Mapping[str, Any]) -> list[list[Message]]:
    """Give what a server is asked before each answer of a row."""
    messages = row.get("messages") or []
    return [
        list(messages[:index])
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index and messages[index - 1]["role"] != "assistant"
    ]


def _prove_modelfile(
    proof: Proof, encoder: Encoder, served: Served, format: PromptFormat, asked: Sequence[Sequence[Message]]
) -> int | None:
    """Let Go render prompts with the TEMPLATE that Ollama would be given, and compare their token ids with training's.

    Conversations that Ollama rewrites before any template sees them are left out, and so is what training refuses.

    Returns:
        How many were compared; None where Go is installed but does not run.
    """
    trained: list[list[int]] = []
    conversations: list[Sequence[Message]] = []
    for messages in asked:
        if changed_by_ollama(messages) is None:
            try:
                trained.append(encoder.encode_prompt(messages))
            except ConversationError:
                continue
            conversations.append(messages)
    try:
        texts = render_go(compile_to_go_template(format), conversations)
    except PromptFormatError as error:
        proof.remarks.append(f"the Modelfile's TEMPLATE was not compared: {error}")
        return None
    for ids, text in zip(trained, texts or (), strict=True):
        if isinstance(text, ConversationError):
            proof.findings.append(
                Finding("parity", "refused_by_ollama", f"the Modelfile's TEMPLATE refuses what was trained on: {text}")
            )
        elif (by_ollama := served.encode(text)) != ids:
            shown = side_by_side(ids, by_ollama, served.decode)
            proof.findings.append(
                Finding("parity", "ollama_differs", f"Ollama's prompt has other token ids than training's: {shown}")
            )
    return len(conversations)


def _generation_findings(directory: Path, stop: StopRules) -> list[Finding]:
    """Check that `generation_config.json`, which every server reads, ends generation where the format does."""
    path = directory / "generation_config.json"
    try:
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        return [Finding("stop", "no_generation_config", f"{path.name} cannot be read: {error}")]
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    missing = [token for token in stop.token_ids if token not in found]
    early = [token for token in found if token not in stop.token_ids]
    findings = []
    if missing:
        findings.append(
            Finding(
                "stop",
                "export_lacks_stop",
                f"{path.name} has eos_token_id {ends}, without {missing}, at which the format ends a turn: a server "
                "will not stop there",
            )
        )
    if early:
        findings.append(
            Finding(
                "stop",
                "export_stops_early",
                f"{path.name} has eos_token_id {ends}, with {early}, at which nothing ended in training: a server will "
                "stop inside answers",
            )
        )
    return findings


def _format_findings(saved: Encoder, saved_stop: StopRules, encoder: Encoder, stop: StopRules) -> list[Finding]:
    """Check that `prompt_format.yaml`, which chat, generation and exports read, says what training used."""
    there = {**format_section(saved.format), **saved_stop.model_dump()}
    trained = {**format_section(encoder.format), **stop.model_dump()}
    different = [key for key in {**trained, **there} if trained.get(key) != there.get(key)]
    if not different:
        return []
    key = different[0]
    return [
        Finding(
            "parity",
            "format_differs",
            f"prompt_format.yaml is not the format of training, in {', '.join(different)}: {key} is "
            f"{there.get(key)!r}, and was {trained.get(key)!r}",
        )
    ]


def unusable(error: InputError) -> Finding:
    """Say that what text becomes cannot be found out at all."""
    return Finding("parity", "unusable", f"the artifact's text side cannot be used: {error}")


def _remark(proof: Proof, certificate: Certificate) -> None:
    if certificate.early_stops:
        proof.remarks.append(
            f"{certificate.early_stops:,} of {certificate.turns:,} trained turns hold a stop inside the assistant's "
            "own text: generation would end there"
        )
    if certificate.exact_turns < certificate.whole_turns:
        proof.remarks.append(
            f"{certificate.whole_turns - certificate.exact_turns:,} of {certificate.whole_turns:,} trained turns hold "
            "text that this tokenizer does not keep as it is (it normalises or lacks characters): the model learns "
            "what the tokenizer makes of it"
        )
    by_text = certificate.whole_turns - certificate.token_stops
    if by_text > 0:
        proof.remarks.append(
            f"{by_text:,} of {certificate.whole_turns:,} trained turns end in a stop sequence that is no single token: "
            "servers stop there only if they are given the text (see stopping_sequences)"
        )


def text_hashes(directory: Path) -> dict[str, str]:
    """Hash the files of an artifact that decide what text becomes."""
    return {
        str(path.relative_to(directory)): hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for pattern in _TEXT_FILES
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    }


def edited_files(directory: Path, trained: Record) -> list[Finding]:
    """Name the files of an artifact's text side that are not those of its training any more."""
    return changed_files("parity", trained.files, text_hashes(directory))


def changed_files(check: Check, before: Mapping[str, str], now: Mapping[str, str]) -> list[Finding]:
    """Name files that were edited, that vanished and that appeared, by their hashes."""
    what = {
        name: "has been edited" if name in before and name in now else "is missing" if name in before else "was added"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    }
    return [
        Finding(check, "edited", f"{name} {happened} since training: what is served is not what was trained")
        for name, happened in what.items()
    ]


def prove_record(trained: Record, encoder: Encoder, stop: StopRules) -> list[Finding]:
    """Compare an artifact's format and stops, as they are read, with the record of its training."""
    findings = []
    if trained.stop != stop:
        findings.append(
            Finding(
                "stop",
                "edited",
                f"the stop rules were {trained.stop.model_dump()} in training, and are {stop.model_dump()}",
            )
        )
    for number, example in enumerate(trained.conversations):
        (samples,) = encoder.encode_conversations(
            [{"messages": example.messages}], "everything" if trained.task == "causal_lm" else "assistant"
        )
        if isinstance(samples, ConversationError):
            findings.append(Finding("parity", "refused", f"recorded conversation {number} is refused now: {samples}"))
        elif list(samples[0].input_ids) != example.input_ids:
            shown = side_by_side(example.input_ids, samples[0].input_ids, encoder.decode)
            findings.append(
                Finding("parity", "ids_differ", f"recorded conversation {number} has other token ids now: {shown}")
            )
        elif list(samples[0].loss_weights) != example.loss_weights:
            findings.append(Finding("mask", "weights_differ", f"recorded conversation {number} is masked otherwise"))
    return findings
