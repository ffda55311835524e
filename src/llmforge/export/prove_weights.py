"""Proves the weights of an artifact: reloaded and merged, it computes what the model in training did."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmforge.data.samples import Sample
from llmforge.errors import ConversationError, LlmforgeError, ModelError
from llmforge.export.proof import SEED, Proof
from llmforge.export.prove_text import text_hashes
from llmforge.export.round_trip import Agreement, Autocast, Reference, log_prob_difference, measure
from llmforge.models.adapter import is_tied, merge
from llmforge.models.device import DTYPES, Dtype
from llmforge.models.load import UNREADABLE, build_skeleton
from llmforge.models.merge import servability
from llmforge.models.source import ADAPTER_WEIGHTS, ModelSource
from llmforge.models.trained import is_adapter, load_trained_model
from llmforge.prompt import Encoder, Message, StopRules
from llmforge.prompt.adversary import random_conversations
from llmforge.prompt.certificate import Finding
from llmforge.tasks import LanguageModeling

LONGEST_PROBE = 512  # tokens
PROBES = 4  # rows, and as many random conversations, that models are compared on
# What two copies of a model may differ by: mean divergence in nats, and mean difference of log-probabilities. In bf16
# the order of additions alone makes some thousandths; a merged matrix is rounded to bf16 once more.
TOLERANCE: Mapping[Dtype, tuple[float, float]] = {"fp32": (1e-6, 1e-3), "bf16": (5e-3, 5e-2)}
MERGED_TOLERANCE: Mapping[Dtype, tuple[float, float]] = {"fp32": (1e-6, 1e-3), "bf16": (2e-2, 1e-1)}
LOST_SHARE = 0.1  # of what training changed in the model's predictions: what may get lost on the way to disk
NOISE: Mapping[Dtype, float] = {
    "fp32": 1e-6,
    "bf16": 1e-4,
}  # nats; what is changed by less cannot be told from rounding


@dataclass(frozen=True)
class Recording:
    """What the training model computed for some probes: those of rows come first, then `samples` of `conversations`."""

    conversations: list[list[Message]]
    samples: list[Sample]
    reference: Reference


def record(
    model: Any,
    *,
    encoder: Encoder,
    task: LanguageModeling,
    rows: Sequence[Sequence[int]],
    longest: int,
    device: torch.device,
    autocast: Autocast,
) -> Recording:
    """Run the training model over probes: the token ids of some rows, and of random conversations.

    Args:
        rows: token ids of samples; `PROBES` of them are used.
        longest: tokens that a probe may have.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    conversations: list[list[Message]] = []
    samples: list[Sample] = []
    for messages in random_conversations(10 * PROBES, SEED + 1, orderly=True):
        if len(samples) == PROBES:
            break
        if not any(message["role"] == "assistant" for message in messages):
            continue
        (encoded,) = encoder.encode_conversations([{"messages": messages}], task.trained)
        if not isinstance(encoded, ConversationError) and max(encoded[0].input_ids) < vocabulary:
            conversations.append(messages)
            samples.append(encoded[0])
    probes = [list(ids) for ids in rows if len(ids) > 1][:PROBES] + [sample.input_ids for sample in samples]
    reference = measure(model, [probe[:longest] for probe in probes], device=device, autocast=autocast)
    return Recording(conversations, samples, reference)


def training_record(
    directory: Path, recording: Recording, *, task: LanguageModeling, dtype: Dtype, stop: StopRules
) -> dict[str, Any]:
    """Give what `proof.json` keeps of training, so that the proof can be repeated: no row of the user's is in it."""
    own = len(recording.reference.probes) - len(recording.samples)
    return {
        "task": task.name,
        "dtype": dtype,
        "is_adapter": is_adapter(directory),
        "stop": stop.model_dump(mode="json"),
        "files": text_hashes(directory),
        "conversations": [
            {
                "messages": messages,
                "input_ids": list(sample.input_ids),
                "loss_weights": list(sample.loss_weights),
                "probe_tokens": len(probe),
                "log_probs": log_probs,
            }
            for messages, sample, probe, log_probs in zip(
                recording.conversations,
                recording.samples,
                recording.reference.probes[own:],
                recording.reference.log_probs()[own:],
                strict=True,
            )
        ],
    }


def prove_weights(
    directory: Path,
    trained: Reference | Mapping[str, Any] | None,
    *,
    probes: Sequence[Sequence[int]] = (),
    dtype: Dtype,
    weights_dtype: torch.dtype,
    device: torch.device,
    autocast: Autocast,
    trust_remote_code: bool = False,
    allow_pickle_weights: Sequence[str] = (),
) -> Proof:
    """Prove that artifact and merged model compute what the model in training did; that need not be in memory any more.

    Args:
        trained: what it computed: its logits, or the record of some log-probabilities in `proof.json`; None where
            nothing is known of it, so that only artifact and merged model can be compared, on `probes`.
        dtype: number format of the computation.
        weights_dtype: of the weights in memory.
    """
    proof = Proof()
    section: dict[str, Any] = {"dtype": dtype}
    proof.sections["round_trip"] = section
    proof.findings += weight_findings(directory)
    if proof.findings:
        return proof
    try:
        model = load_trained_model(
            directory,
            dtype=weights_dtype,
            trust_remote_code=trust_remote_code,
            allow_pickle_weights=allow_pickle_weights,
        ).to(device)
    except (LlmforgeError, RuntimeError, ValueError) as error:  # PEFT raises the latter two for files that do not fit
        reason = " ".join(str(error).split())[:300]
        proof.findings.append(Finding("round_trip", "unreadable", f"the artifact does not load again: {reason}"))
        return proof

    def run() -> Reference:
        return measure(model, probes, device=device, autocast=autocast)

    if isinstance(trained, Reference):
        probes = trained.probes
        reloaded = run()
        _compare(proof, "reloaded", trained.agreement(reloaded), TOLERANCE[dtype])
        reference = trained
    elif trained is not None:
        probes = [example["input_ids"][: example["probe_tokens"]] for example in trained["conversations"]]
        reference = reloaded = run()
        recorded = [example["log_probs"] for example in trained["conversations"]]
        _compare_record(proof, reloaded, recorded, _record_tolerance(directory, trained, dtype))
    else:
        reference = reloaded = run()
    section["probes"] = len(reference.probes)
    if not is_adapter(directory):
        return proof
    unservable = servability(directory)
    section["adapter_can_be_served"] = not unservable
    proof.remarks += unservable
    with model.disable_adapter():
        effect = reference.agreement(run())
    section["effect_of_training"] = {"kl": effect.figures()["kl"]}
    if reference is not reloaded and reference.agreement(reloaded).kl > max(LOST_SHARE * effect.kl, NOISE[dtype]):
        _differs(proof, "reloaded", reference.agreement(reloaded), TOLERANCE[dtype])
    model = merge(model)
    merged = reference.agreement(run())
    _compare(proof, "merged", merged, MERGED_TOLERANCE[dtype])
    if proof.proven and merged.kl > max(LOST_SHARE * effect.kl, NOISE[dtype]):
        proof.remarks.append(
            f"merged in {dtype}, the model loses {merged.kl / effect.kl:.0%} of what training changed ({merged.kl:.3g} "
            f"of {effect.kl:.3g} nats) to rounding: serve the adapter, or merge in fp32"
        )
    return proof


def weight_findings(directory: Path) -> list[Finding]:
    """Look for what is wrong with an artifact's weight files without loading a model.

    An adapter saved without its tensors (https://github.com/huggingface/peft/issues/2892), and two different embeddings
    in the files of a model whose config.json says that they are one (https://github.com/huggingface/peft/issues/2777).
    """
    if is_adapter(directory):
        path = directory / ADAPTER_WEIGHTS
        tensors = tensor_names([path]) if path.is_file() else []
        if tensors:
            return []
        return [
            Finding(
                "round_trip",
                "empty_adapter",
                f"{path.name} holds no tensors: the adapter was saved empty, and would be served as the base model. "
                "Write it again from the run's last checkpoint",
            )
        ]
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


def _record_tolerance(directory: Path, trained: Mapping[str, Any], dtype: Dtype) -> float:
    """Give what log-probabilities may differ by: more where weights were merged, or rounded, since training."""
    if is_adapter(directory):
        return TOLERANCE[dtype][1]
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    saved = config.get("dtype") or config.get("torch_dtype")
    if not trained["is_adapter"] and saved == str(DTYPES[dtype]).removeprefix("torch."):
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
