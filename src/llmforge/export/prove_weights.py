"""Proves the weights of an artifact: reloaded and merged, it computes what the model in training did."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmforge.data.samples import Sample
from llmforge.errors import ConversationError, LlmforgeError, ModelError
from llmforge.export.fingerprint import Numbers, other_numbers, trained_numbers, weight_hashes
from llmforge.export.proof import SEED, Example, Proof, Record
from llmforge.export.prove_text import changed_files, text_hashes
from llmforge.export.round_trip import Agreement, Autocast, Reference, log_prob_difference, measure
from llmforge.models.adapter import describe_unmergeable, is_tied, merge
from llmforge.models.device import DTYPES, Dtype
from llmforge.models.load import UNREADABLE, build_skeleton, quiet, reason
from llmforge.models.merge import servability
from llmforge.models.source import ADAPTER_WEIGHTS, ModelSource, check_adapter, check_weights
from llmforge.models.trained import is_adapter, load_trained_model
from llmforge.prompt import Encoder, Message, StopRules
from llmforge.prompt.adversary import random_conversations
from llmforge.prompt.certificate import Finding
from llmforge.tasks import LanguageModeling, Loss

LONGEST_PROBE = 512  # tokens
PROBES = 4  # rows, and as many random conversations, that models are compared on
# What two copies of a model may differ by: mean divergence in nats, and mean difference of log-probabilities. In bf16
# the order of additions alone makes some thousandths; a merged matrix is rounded to bf16 once more.
TOLERANCE: Mapping[Dtype, tuple[float, float]] = {"fp32": (1e-6, 1e-3), "bf16": (5e-3, 5e-2)}
MERGED_TOLERANCE: Mapping[Dtype, tuple[float, float]] = {"fp32": (1e-6, 1e-3), "bf16": (2e-2, 1e-1)}
LOST_SHARE = 0.3  # of what training changed in the model's predictions: what merging may lose without a word
NOISE: Mapping[Dtype, float] = {
    "fp32": 1e-6,
    "bf16": 1e-4,
}  # nats; what is changed by less cannot be told from rounding


@dataclass(frozen=True)
class Recording:
    """What the training model held, and what it computed for probes: of rows first, then of `conversations`.

    `numbers` are the hashes of what was trained; `findings` say what is wrong with the loss.
    """

    conversations: list[list[Message]]
    samples: list[Sample]
    reference: Reference
    numbers: Numbers
    findings: list[Finding]


def record(
    model: Any,
    *,
    encoder: Encoder,
    task: LanguageModeling,
    compute_loss: Callable[[Any], Loss],
    lay_out: Callable[[Sequence[Sample]], Iterable[Any]],
    rows: Sequence[Sequence[int]],
    start: Mapping[str, torch.Tensor],
    dtype: Dtype,
    longest: int,
    device: torch.device,
    autocast: Autocast,
) -> Recording:
    """Run the training model over probes: the token ids of some rows, and of made-up conversations.

    Args:
        compute_loss, lay_out: what the model was trained with: the loss of a micro-batch, and how samples become one.
        rows: token ids of samples; `PROBES` of them are used.
        start: an adapter's `starting_point`.
        dtype: number format of the computation, and of a plain model's weights on disk.
        longest: tokens that a probe may have.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    made_up = made_up_samples(encoder, task, vocabulary)
    samples = [sample for _, sample in made_up]
    probes = [list(ids) for ids in rows if len(ids) > 1][:PROBES] + [sample.input_ids for sample in samples]
    reference = measure(model, [probe[:longest] for probe in probes], device=device, autocast=autocast)
    behind = len(probes) - len(samples)
    return Recording(
        [messages for messages, _ in made_up],
        samples,
        reference,
        trained_numbers(model, start, DTYPES[dtype]),
        _loss_findings(
            model,
            compute_loss,
            lay_out,
            [Sample(sample.input_ids[:longest], sample.loss_weights[:longest]) for sample in samples],
            reference.log_probs()[behind:],
            allowed=TOLERANCE[dtype][1],
            device=device,
            autocast=autocast,
        ),
    )


def made_up_samples(encoder: Encoder, task: LanguageModeling, vocabulary: int) -> list[tuple[list[Message], Sample]]:
    """Give `PROBES` conversations that nobody had, each with its sample; fewer where the format refuses most of them.

    Args:
        vocabulary: how many tokens the model has.
    """
    found: list[tuple[list[Message], Sample]] = []
    for messages in random_conversations(10 * PROBES, SEED + 1, orderly=True):
        if len(found) == PROBES:
            break
        if not any(message["role"] == "assistant" for message in messages):
            continue
        (encoded,) = encoder.encode_conversations([{"messages": messages}], task.trained)
        if not isinstance(encoded, ConversationError) and max(encoded[0].input_ids) < vocabulary:
            found.append((messages, encoded[0]))
    return found


@torch.no_grad()
def _loss_findings(
    model: Any,
    compute_loss: Callable[[Any], Loss],
    lay_out: Callable[[Sequence[Sample]], Iterable[Any]],
    samples: Sequence[Sample],
    log_probs: Sequence[Sequence[float]],
    *,
    allowed: float,
    device: torch.device,
    autocast: Autocast,
) -> list[Finding]:
    """Check that the loss is the mean negative log-probability of the trained tokens, by the model's own logits.

    It is asked for each sample alone, and for all of them together, laid out as they were in training.

    Args:
        log_probs: of the last tokens of each sample; the loss of these alone is asked for.
    """
    cut: list[Sample] = []
    expected: list[float] = []
    for sample, of_the_last in zip(samples, log_probs, strict=True):
        first = len(sample.input_ids) - len(of_the_last)
        weights = [0.0] * first + list(sample.loss_weights[first:])
        if any(weights):
            cut.append(Sample(sample.input_ids, weights))
            expected.append(-sum(w * p for w, p in zip(weights[first:], of_the_last, strict=True)))
    was_training = model.training
    model.eval()
    try:
        for group in [[number] for number in range(len(cut))] + [list(range(len(cut)))] * (len(cut) > 1):
            with quiet(), autocast():
                losses = [compute_loss(batch.to(device)) for batch in lay_out([cut[number] for number in group])]
            found = sum(float(loss.sum) for loss in losses) / sum(loss.weight for loss in losses)
            weight = sum(sum(cut[number].loss_weights) for number in group)
            wanted = sum(expected[number] for number in group) / weight
            if not abs(found - wanted) <= allowed:
                return [
                    Finding(
                        "mask",
                        "loss_differs",
                        f"the loss of {'a made-up conversation' if len(group) == 1 else 'made-up conversations'} is "
                        f"{found:.5g} nats per trained token, and the model's logits for these tokens give "
                        f"{wanted:.5g}: the model was trained on something else than its samples say",
                    )
                ]
    finally:
        model.train(was_training)
    return []


def training_record(
    directory: Path, recording: Recording, *, task: LanguageModeling, dtype: Dtype, stop: StopRules
) -> Record:
    """Give what `proof.json` keeps of training, so that the proof can be repeated: no row of the user's is in it."""
    own = len(recording.reference.probes) - len(recording.samples)
    return Record(
        task=task.name,
        dtype=dtype,
        is_adapter=is_adapter(directory),
        stop=stop,
        files=text_hashes(directory),
        weights=weight_hashes(directory),
        conversations=[
            Example(
                messages=[dict(message) for message in messages],
                input_ids=list(sample.input_ids),
                loss_weights=list(sample.loss_weights),
                probe_tokens=len(probe),
                log_probs=log_probs,
            )
            for messages, sample, probe, log_probs in zip(
                recording.conversations,
                recording.samples,
                recording.reference.probes[own:],
                recording.reference.log_probs()[own:],
                strict=True,
            )
        ],
    )


def edited_weights(directory: Path, trained: Record) -> list[Finding]:
    """Name the files of an artifact's weights that are not those of its training, or of its merge, any more."""
    return changed_files("round_trip", trained.weights, weight_hashes(directory)) if trained.weights else []


def prove_weights(
    directory: Path,
    trained: Recording | Record | None,
    *,
    probes: Sequence[Sequence[int]] = (),
    dtype: Dtype,
    weights_dtype: torch.dtype,
    device: torch.device,
    autocast: Autocast,
    trust_remote_code: bool = False,
    allow_pickle_weights: Sequence[str] = (),
) -> Proof:
    """Prove that an artifact holds what was trained, and that it and its merged model compute what was computed then.

    The model in training need not be in memory any more.

    Args:
        trained: what it held and computed, or the record of it in `proof.json`; None where nothing is known of it, so
            that only artifact and merged model can be compared.
        probes: token ids to compare them on where no record has any.
        dtype: number format of the computation.
        weights_dtype: of the weights in memory.
    """
    proof = Proof()
    section: dict[str, Any] = {"dtype": dtype}
    proof.sections["round_trip"] = section
    recorded: list[list[int]] = []
    if isinstance(trained, Recording):
        recorded = trained.reference.probes
    elif trained is not None:
        proof.findings += edited_weights(directory, trained)
        recorded = [example.probe for example in trained.conversations]
    try:
        if damage := weight_findings(directory):
            proof.findings += damage
            return proof
        model = load_trained_model(
            directory,
            dtype=weights_dtype,
            trust_remote_code=trust_remote_code,
            allow_pickle_weights=allow_pickle_weights,
        )
        if isinstance(trained, Recording):
            _compare_numbers(proof, model, trained.numbers, weights_dtype)
        probes = recorded or _cut(model, probes)
        _check_vocabulary(model, probes)
        reloaded = measure(model.to(device), probes, device=device, autocast=autocast)
    except torch.OutOfMemoryError:
        raise
    except (LlmforgeError, IndexError, *UNREADABLE) as error:
        proof.findings.append(
            Finding("round_trip", "unreadable", f"the artifact cannot be loaded and run: {reason(error)}")
        )
        return proof
    section["probes"] = len(probes)
    if not reloaded.is_finite:
        proof.findings.append(
            Finding("round_trip", "not_finite", "the artifact, loaded again, computes NaN or infinity")
        )
        return proof
    reference = reloaded
    if isinstance(trained, Recording):
        reference = trained.reference
        _compare(proof, "reloaded", reference.agreement(reloaded), TOLERANCE[dtype])
    elif trained is not None and trained.conversations:
        log_probs = [example.log_probs for example in trained.conversations]
        _compare_record(proof, reloaded, log_probs, _record_tolerance(directory, trained, dtype))
    if not is_adapter(directory) or not probes:
        return proof

    unservable = servability(directory)
    section["adapter_can_be_served"] = not unservable
    proof.remarks += unservable
    with model.disable_adapter():
        effect = reference.agreement(measure(model, probes, device=device, autocast=autocast))
    section["effect_of_training"] = {"kl": effect.figures()["kl"]}
    unmergeable = describe_unmergeable(model)
    try:
        model = merge(model)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        if unmergeable or isinstance(error, NotImplementedError):  # which kinds of adapters PEFT never merges
            proof.remarks.append(f"The adapter cannot be merged, and only PEFT can serve it: {reason(error)}")
        else:
            proof.findings.append(
                Finding("round_trip", "merge_fails", f"the adapter cannot be merged into its base: {reason(error)}")
            )
        return proof
    merged = reference.agreement(measure(model, probes, device=device, autocast=autocast))
    _compare(proof, "merged", merged, MERGED_TOLERANCE[dtype])
    # Divergence grows with the square of a change.
    lost = sqrt(merged.kl / max(effect.kl, NOISE[dtype]))
    if proof.proven and merged.kl > NOISE[dtype] and lost > LOST_SHARE:
        proof.remarks.append(
            f"merged in {dtype}, the model loses some {lost:.0%} of what training changed ({merged.kl:.3g} of "
            f"{effect.kl:.3g} nats) to rounding: serve the adapter, or merge in fp32"
        )
    return proof


def _cut(model: Any, probes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Cut probes to the positions that a model has."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1
    longest = min(LONGEST_PROBE, positions) if positions > 0 else LONGEST_PROBE  # XLNet says -1
    return [list(probe[:longest]) for probe in probes if len(probe) > 1]


def _check_vocabulary(model: Any, probes: Sequence[Sequence[int]]) -> None:
    """Raise ModelError for a model that lacks tokens which its tokenizer and its training use."""
    largest, rows = max(map(max, probes), default=0), len(model.get_input_embeddings().weight)
    if largest >= rows:
        raise ModelError(f"the model has embeddings for {rows} tokens, and was trained with token {largest}")


def _compare_numbers(proof: Proof, model: Any, trained: Numbers, dtype: torch.dtype) -> None:
    others = other_numbers(model, trained, dtype)
    proof.sections["round_trip"]["trained_tensors"] = len(trained.tensors)
    if others:
        proof.findings.append(
            Finding(
                "round_trip",
                "saved_differs",
                f"of {len(trained.tensors)} trained tensors and {len(trained.scales)} scales of adapted modules, "
                f"{len(others)} are not on disk as they were trained: {', '.join(others[:3])}",
            )
        )


def weight_findings(directory: Path) -> list[Finding]:
    """Look for what is wrong with an artifact's weight files without loading a model.

    An adapter saved without its tensors (https://github.com/huggingface/peft/issues/2892), and two different embeddings
    in the files of a model whose config.json says that they are one (https://github.com/huggingface/peft/issues/2777).
    """
    if is_adapter(directory):
        check_adapter(directory, key="artifact")
        path = directory / ADAPTER_WEIGHTS
        if tensor_names([path]):
            return []
        return [
            Finding(
                "round_trip",
                "empty_adapter",
                f"{path.name} holds no tensors: the adapter was saved empty, and would be served as the base model. "
                "Write it again from the run's last checkpoint",
            )
        ]
    check_weights(directory, key="artifact")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if not config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)):
        return []
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")):
                    found[name] = file.get_tensor(name)
    embeddings = list(found.values())
    if all(torch.equal(embeddings[0], other) for other in embeddings[1:]) or not _ties_embeddings(directory):
        return []
    return [
        Finding(
            "round_trip",
            "untied_embeddings",
            f"the weights hold {len(found)} different embeddings ({', '.join(found)}), but config.json has "
            "tie_word_embeddings: true, so that one of them is lost on loading. Set it to false",
        )
    ]


def _ties_embeddings(directory: Path) -> bool:
    """Say whether a model becomes one with tied embeddings on loading; some architectures never do, whatever is set."""
    try:
        return is_tied(build_skeleton(ModelSource(str(directory), directory)))
    except (ModelError, *UNREADABLE):  # one with code of its own, which is not run for this
        return True


def tensor_names(paths: Sequence[Path]) -> list[str]:
    """Give the names of all tensors in safetensors files."""
    names: list[str] = []
    for path in paths:
        with safe_open(path, framework="numpy") as file:
            names += file.keys()
    return names


def _compare(proof: Proof, name: str, agreement: Agreement, tolerance: tuple[float, float]) -> None:
    proof.sections["round_trip"][name] = agreement.figures()
    if not (agreement.kl <= tolerance[0] and agreement.mean_difference <= tolerance[1]):  # NaN too
        _differs(proof, name, agreement, tolerance)


def _differs(proof: Proof, name: str, agreement: Agreement, tolerance: tuple[float, float]) -> None:
    if any(finding.code == f"{name}_differs" for finding in proof.findings):
        return
    effect = proof.sections["round_trip"].get("effect_of_training")
    proof.findings.append(
        Finding(
            "round_trip",
            f"{name}_differs",
            f"the {name} model does not compute what the trained one did: mean divergence {agreement.kl:.3g} nats "
            f"(allowed {tolerance[0]:g}), log-probabilities {agreement.mean_difference:.3g} apart on average (allowed "
            f"{tolerance[1]:g}), {agreement.max_difference:.3g} at most"
            + (f"; training itself moved the model by {effect['kl']:.3g} nats" if effect else ""),
        )
    )


def _record_tolerance(directory: Path, trained: Record, dtype: Dtype) -> float:
    """Give what log-probabilities may differ by: more where weights were merged, or rounded, since training."""
    if is_adapter(directory):
        return TOLERANCE[dtype][1]
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    saved = config.get("dtype") or config.get("torch_dtype")
    if not trained.is_adapter and saved == str(DTYPES[dtype]).removeprefix("torch."):
        return TOLERANCE[dtype][1]
    return MERGED_TOLERANCE[dtype if saved == "float32" else "bf16"][1]


def _compare_record(proof: Proof, reloaded: Reference, recorded: list[list[float]], allowed: float) -> None:
    mean, largest = log_prob_difference(reloaded, recorded)
    proof.sections["round_trip"]["recorded"] = {
        "mean_difference": float(f"{mean:.4g}"),
        "max_difference": float(f"{largest:.4g}"),
    }
    if not mean <= allowed:
        proof.findings.append(
            Finding(
                "round_trip",
                "record_differs",
                f"the model does not compute what it did when it was trained: log-probabilities {mean:.3g} apart on "
                f"average (allowed {allowed:g}), {largest:.3g} at most. Its weights, its base model or its config "
                "changed since",
            )
        )
