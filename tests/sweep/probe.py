"""What the sweep does with one architecture: first plain transformers alone, then llmforge's own path, then a reload.

Each stage runs in its own process, forked from one that has imported torch, transformers and PEFT but not llmforge, so
that what plain software makes of an artifact is found out by plain software.
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from sweep.shrink import causal_types, small_config

LONG, SHORT = 40, 23  # tokens of two rows that are padded to one length
TOLERANCE = 2e-3  # of the largest logit: fp32, through other kernels, and through experts in other groupings
NO_ANSWERS = "no_answers.txt"  # says why plain transformers trains an architecture but cannot generate with it


class FailedError(Exception):
    """A stage found something wrong; the message is the reason, in one line."""


def plain(directory: Path, model_type: str, tokenizer: Path) -> None:
    """Build, train, save and reload an architecture with plain transformers: what any tool needs to work with it."""
    torch.manual_seed(0)
    reader = transformers.AutoTokenizer.from_pretrained(tokenizer)
    ids = {name: getattr(reader, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids["decoder_start_token_id"] = reader.bos_token_id
    config = small_config(causal_types()[model_type], len(reader), ids)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    _spread(model)
    base = directory / "base"
    model.save_pretrained(base)
    reader.save_pretrained(base)
    rows_BT = torch.randint(20, len(reader), (2, LONG), generator=torch.Generator().manual_seed(1))
    before = _logits(model, rows_BT)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    _compare("saved and reloaded, it computes something else", before, _logits(reloaded, rows_BT))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        logits = model(input_ids=rows_BT, attention_mask=torch.ones_like(rows_BT), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows_BT[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    try:
        _generate(model, rows_BT)
    except Exception as error:
        (directory / NO_ANSWERS).write_text(f"{type(error).__name__}: {' '.join(str(error).split())}")
    if not losses[-1] < losses[0]:
        raise FailedError(f"its loss does not fall ({losses[0]:.3f}, after 5 steps {losses[-1]:.3f})")


def product(directory: Path) -> None:
    """Fine-tune with LoRA and in full, merge, and talk to the results: through llmforge."""
    from conftest import conversation_rows, write_jsonl
    from llmforge.config import load_config
    from llmforge.export import prove_text
    from llmforge.jobs.finetune import finetune
    from llmforge.models.merge import merge_adapter
    from llmforge.models.source import find_model
    from llmforge.models.trained import load_trained_model
    from tiny_runs import Listener, write_config

    prove_text.RANDOM_CONVERSATIONS = 8  # what they prove is the tokenizer's side, and that is the same for all here
    write_jsonl(directory / "train.jsonl", conversation_rows(16))
    write_jsonl(directory / "valid.jsonl", conversation_rows(4, seed=1))
    base = directory / "base"
    for tag in ("lora", "full"):
        listener = Listener()
        lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} if tag == "lora" else None
        config = write_config(
            directory,
            base,
            custom_model_tag=tag,
            lora_config=lora,
            learning_rate=1e-2 if lora else 3e-3,
            num_epochs=2,
            train_batch_size_per_device=4,
            valid_path=str(directory / "valid.jsonl"),
        )
        run = finetune(load_config(config), listener)
        assert run is not None
        losses = listener.of("step", "train_loss")
        half = len(losses) // 2
        if not sum(losses[half:]) < sum(losses[:half]):
            raise FailedError(f"{tag}: the loss does not fall ({', '.join(f'{loss:.3f}' for loss in losses)})")
        _check_padding(tag, load_trained_model(run.artifact_dir, dtype=torch.float32))
        if not (directory / NO_ANSWERS).is_file():
            run.chat([{"role": "user", "content": "What does red mean?"}], max_new_tokens=4)
        (directory / tag).symlink_to(run.artifact_dir)
        if lora:
            merge_adapter(find_model(str(base), relative_to=directory), run.artifact_dir, directory / "merged")
        (directory / f"{tag}.notes").write_text(json.dumps(listener.notes))


def reload(directory: Path) -> None:
    """Load what llmforge wrote with plain transformers and PEFT; adapter and merged weights must compute the same."""
    assert "llmforge" not in sys.modules
    load = transformers.AutoModelForCausalLM.from_pretrained
    rows_BT = torch.randint(20, 60, (2, LONG), generator=torch.Generator().manual_seed(1))
    adapted = peft.PeftModel.from_pretrained(load(directory / "base", dtype=torch.float32), directory / "lora")
    with_adapter = _logits(adapted, rows_BT)
    with adapted.disable_adapter():
        if torch.equal(with_adapter, _logits(adapted, rows_BT)):
            raise FailedError("the saved adapter changes nothing")
    _compare("adapter and merged", with_adapter, _logits(load(directory / "merged", dtype=torch.float32), rows_BT))
    full = load(directory / "full", dtype=torch.float32).eval()
    if not _logits(full, rows_BT).isfinite().all():
        raise FailedError("the trained weights, reloaded, give logits that are not finite")
    if not (directory / NO_ANSWERS).is_file():
        _generate(full, rows_BT)


def _generate(model: Any, rows_BT: torch.Tensor) -> None:
    prompt_BT = rows_BT[:, :8]
    model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=4, pad_token_id=2)


def _check_padding(tag: str, model: Any) -> None:
    """Check that a row computes the same alone and beside a longer one, padded on the right as in training."""
    rows_BT = torch.randint(20, 60, (2, LONG), generator=torch.Generator().manual_seed(2))
    mask_BT = torch.ones_like(rows_BT)
    rows_BT[1, SHORT:], mask_BT[1, SHORT:] = 2, 0
    padded = _logits(model, rows_BT, mask_BT)
    _compare(f"{tag}: the padded row", _logits(model, rows_BT[1:, :SHORT])[0], padded[1, :SHORT])
    _compare(f"{tag}: the row beside it", _logits(model, rows_BT[:1])[0], padded[0])


@torch.no_grad()
def _logits(model: Any, rows_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    mask_BT = torch.ones_like(rows_BT) if mask_BT is None else mask_BT
    logits: torch.Tensor = model.eval()(input_ids=rows_BT, attention_mask=mask_BT, use_cache=False).logits
    return logits.float()


@torch.no_grad()
def _spread(model: Any) -> None:
    """Make all weights differ from nought and from each other: some are initialised so that a layer does nothing."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter) * 0.02)


def _compare(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    difference, scale = (one - other).abs().max().item(), one.abs().max().item()
    if not difference <= TOLERANCE * max(scale, 1e-3):
        raise FailedError(f"{what}: logits differ by {difference:.2g}, where they reach {scale:.2g}")
