"""Checks that a loaded model predicts each token from those before it, which no config says reliably.

Shapes: B rows, T tokens, V vocabulary.
"""

from typing import Any

import peft
import torch

from llmforge.errors import ModelError
from llmforge.models.load import UNREADABLE, quiet, reason

TOKENS = 8
# Switches that architectures for masked language modelling have, and what makes them predict the next token.
_SWITCHES = {"is_decoder": True, "causal": True}
# Of the largest logit. Rounding and the grouping of tokens by experts stay below; one that is read ahead is far above.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 1e-2


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Check that later tokens do not reach the logits of earlier ones, with one forward of two short rows.

    BERT-like models are in transformers' list of causal language models, and are causal only if their config asks for
    it; trained otherwise, a model learns to copy the token it should predict, and its loss falls wonderfully.

    Args:
        model: on the device where it will be trained; its modes and the random state stay as they were.

    Raises:
        ModelError: the model reads ahead, or fails to compute; says what to set.
    """
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    config, device = base.config, next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with quiet(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            logits_BTV = _two_rows(model, len(base.get_input_embeddings().weight), device)
    except torch.OutOfMemoryError:
        raise
    except (*UNREADABLE, IndexError) as error:
        raise ModelError(f"this {config.model_type} model cannot compute {TOKENS} tokens: {reason(error)}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    first, second = logits_BTV[:, : TOKENS // 2]
    # Tokens that a model must never say have logits of minus infinity, or almost; and weights may be damaged.
    said = torch.maximum(first.abs(), second.abs()) < torch.finfo(logits_BTV.dtype).max / 2
    if not said.any():
        return  # what that means, the loss will show
    difference, scale = (first - second)[said].abs().max().item(), first[said].abs().max().item()
    if difference <= _TOLERANCE.get(logits_BTV.dtype, _HALF_TOLERANCE) * scale:
        return
    text = config.get_text_config()
    switch = next((name for name, wanted in _SWITCHES.items() if getattr(text, name, wanted) != wanted), None)
    cure = (
        f"set {switch}: true in its config.json, or give a model that was trained to continue text"
        if switch
        else "give a model that was trained to continue text"
    )
    raise ModelError(
        f"this {config.model_type} model is not causal: when a later token changes, its predictions for the tokens "
        f"before it change too (by up to {difference:.2g}, where they reach {scale:.2g}). It would learn to copy what "
        f"it should predict; {cure}"
    )


def _two_rows(model: Any, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Compute the logits (2, T, V) of two rows that are the same up to their second half."""
    middle = vocabulary // 2  # special tokens lie at the ends, and a pad token would be masked
    rows_BT = torch.arange(middle, middle + TOKENS).repeat(2, 1)
    rows_BT[1, TOKENS // 2 :] += TOKENS
    rows_BT = (rows_BT % vocabulary).to(device)
    output = model(input_ids=rows_BT, attention_mask=torch.ones_like(rows_BT), use_cache=False)
    logits_BTV: torch.Tensor = output.logits
    return logits_BTV
