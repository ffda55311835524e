"""Puts a proof into sentences: for the model card and for the terminal."""

from collections.abc import Iterator

from llmforge.export.proof import Proof


def proof_lines(proof: Proof) -> list[str]:
    """Say what was examined and what came out, one sentence a line; failures first."""
    return [*_failures(proof), *_lines(proof), *proof.remarks]


def _failures(proof: Proof) -> Iterator[str]:
    for failure in proof.failures():
        often = f", {failure['count']:,} times" if failure["count"] > 1 else ""
        yield f"FAILED: {failure['check']} ({failure['code']}{often}): {failure['message']}"


def _lines(proof: Proof) -> Iterator[str]:
    failed = {finding.check for finding in proof.findings}
    parity, mask, stop, weights = (proof.sections.get(name) for name in ("parity", "mask", "stop", "round_trip"))
    if parity is not None and "parity" not in failed:
        yield (
            f"parity: {parity['prompts']:,} prompts ({parity['prompt_tokens']:,} tokens; {parity['rows']:,} rows and "
            f"{parity['random_conversations']:,} random conversations) have the same token ids in training and in "
            f"serving ({', '.join(parity['targets'])})"
        )
        if "prompts_by_ollama" in parity:
            yield (
                f"parity: {parity['prompts_by_ollama']:,} of them were rendered by Go with the TEMPLATE that Ollama is "
                "given, too"
            )
    if mask is not None and "mask" not in failed and mask["turns"]:
        yield (
            f"mask: of {mask['turns']:,} trained turns in {mask['rows']:,} rows exactly what the model has to produce "
            "carries loss, the end of each turn included"
        )
    if stop is not None and "stop" not in failed and stop["turns"]:
        yield (
            f"stop: {stop['turns']:,} trained turns end where generation ends, {stop['end_in_stop_token']:,} of them "
            "in a stop token"
        )
    if weights is None or "round_trip" in failed:
        return
    other = "the trained model" if "reloaded" in weights else "the artifact, loaded again,"
    for name, words in (("reloaded", "the artifact, loaded again,"), ("merged", "the merged model")):
        if name in weights:
            yield (
                f"round trip: {words} is {weights[name]['kl']:.2g} nats from {other} "
                f"(log-probabilities {weights[name]['mean_difference']:.2g} apart on average, "
                f"{weights[name]['max_difference']:.2g} at most; {weights['dtype']})"
            )
    if "recorded" in weights:
        yield (
            "round trip: log-probabilities are "
            f"{weights['recorded']['mean_difference']:.2g} from those recorded in training on average, "
            f"{weights['recorded']['max_difference']:.2g} at most"
        )
    if "effect_of_training" in weights:
        yield f"training moved the model's predictions by {weights['effect_of_training']['kl']:.2g} nats"
