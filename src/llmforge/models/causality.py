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
_LENGTH_TOLERANCE = 1e-3  # rows of another length go through other kernels


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Check that later tokens do not reach the logits of earlier ones, by forwards of two short rows and of their half.

    BERT-like models are in transformers' list of causal language models, and are causal only if their config asks for
    it; trained otherwise, a model learns to copy the token it should predict, and its loss falls wonderfully. For
    ProphetNet (https://github.com/huggingface/transformers/issues/24289) it is the number of later tokens that counts,
    so that what it generates is not what it was trained to; half precision is too coarse to tell that from rounding.

    Args:
        model: on the device where it will be trained; its modes and the random state stay as they were.

    Raises:
        ModelError: the model reads ahead, or fails to compute; says what to set.
    """
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    config, device = base.config, next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    rows_BT = _two_rows(len(base.get_input_embeddings().weight), device)
    try:
        model.eval()
        with quiet(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            logits_BTV, half_BTV = _logits(model, rows_BT), _logits(model, rows_BT[:, : TOKENS // 2])
    except torch.OutOfMemoryError:
        raise
    except (*UNREADABLE, IndexError) as error:
        raise ModelError(f"this {config.model_type} model cannot compute {TOKENS} tokens: {reason(error)}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    first, second = logits_BTV[:, : TOKENS // 2]
    difference, scale = _difference(first, second)
    if difference > _TOLERANCE.get(logits_BTV.dtype, _HALF_TOLERANCE) * scale:
        text = config.get_text_config()
        switch = next((name for name, wanted in _SWITCHES.items() if getattr(text, name, wanted) != wanted), None)
        cure = "give a model that was trained to continue text"
        if switch:
            cure = f"set {switch}: true in its config.json, or {cure}"
        raise ModelError(
            f"this {config.model_type} model is not causal: when a later token changes, its predictions for the tokens "
            f"before it change too (by up to {difference:.2g}, where they reach {scale:.2g}). It would learn to copy "
            f"what it should predict; {cure}"
        )
    difference, scale = _difference(first, half_BTV[0])
    if logits_BTV.dtype in _TOLERANCE and difference > _LENGTH_TOLERANCE * scale:
        raise ModelError(
            f"this {config.model_type} model is not causal: its predictions for a token depend on how many tokens "
            f"follow (by up to {difference:.2g}, where they reach {scale:.2g}). It would not generate as it was "
            "trained to; give a model of another architecture"
        )


def _two_rows(vocabulary: int, device: torch.device) -> torch.Tensor:
    """Make two rows of token ids (2, T) that are the same up to their second half."""
    middle = vocabulary // 2  # special tokens lie at the ends, and a pad token would be masked
    rows_BT = torch.arange(middle, middle + TOKENS).repeat(2, 1)
    rows_BT[1, TOKENS // 2 :] += TOKENS
    return (rows_BT % vocabulary).to(device)


def _logits(model: Any, rows_BT: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=rows_BT, attention_mask=torch.ones_like(rows_BT), use_cache=False)
    logits_BTV: torch.Tensor = output.logits
    return logits_BTV


def _difference(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Give the largest difference between logits, and the largest of them.

    Left out are those of tokens that the model must never say, minus infinity or almost, and what is no number at all:
    what that means, the loss will show.
    """
    said = torch.maximum(first.abs(), second.abs()) < torch.finfo(first.dtype).max / 2
    if not said.any():
        return 0.0, 0.0
    return (first - second)[said].abs().max().item(), first[said].abs().max().item()
