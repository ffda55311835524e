"""New tokens: what their embeddings start from, that they alone are trained, and that they are found again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from conftest import build_model, build_tokenizer, conversation_rows, save_model, write_jsonl
from llmforge.checkpoint import list_checkpoints, load_parameters
from llmforge.config import load_config
from llmforge.errors import ConfigError, ModelError
from llmforge.jobs.finetune import finetune
from llmforge.jobs.run import Run
from llmforge.models.adapter import add_lora, is_tied, merge
from llmforge.models.load import load_base_model, load_tokenizer
from llmforge.models.merge import merge_adapter
from llmforge.models.source import ModelSource
from llmforge.models.tokens import add_tokens, make_room, train_new_rows
from llmforge.models.trained import load_trained_model
from tiny_runs import LORA, Listener, plain_python, resume_run, run_config, run_here, tree, write_config

TEXTS = ["<stop>", "<|go now|>"]
ATOL = 1e-5  # fp32 logits of size 1 to 10; merging adds the same numbers in another order
SPARE = 7


def rows_with_new_tokens(count: int) -> list[dict[str, Any]]:
    """Rows whose answers are new tokens."""
    rows = conversation_rows(count)
    for row in rows:
        row["messages"][1]["content"] = TEXTS[len(row["messages"][0]["content"]) % 2]
    return rows


def ids(tokenizer: Any) -> torch.Tensor:
    new = tokenizer.convert_tokens_to_ids(TEXTS)
    return torch.tensor([[30, 41, *new, 52, new[0], 60, 33, new[1], 71]])


def logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().float()(input_ids=input_ids).logits


def save_base(directory: Path, *, tied: bool, spare: int) -> Path:
    """Save a tiny model whose embeddings have so many rows more than its tokenizer has tokens."""
    save_model(directory, tie_word_embeddings=tied)
    model = build_model(len(build_tokenizer()) + spare, tie_word_embeddings=tied)
    model.save_pretrained(directory)
    return directory


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_each_text_becomes_one_token_wherever_it_stands(tokenizer: Any) -> None:
    tokenizer = build_tokenizer()
    before = len(tokenizer)
    new = add_tokens(tokenizer, TEXTS, rows=before)
    assert [token.text for token in new] == TEXTS
    assert [token.id for token in new] == [before, before + 1]
    for token in new:
        assert build_tokenizer().decode(token.pieces) == token.text
        assert tokenizer.encode(f"a{token.text} b", add_special_tokens=False).count(token.id) == 1
    # A server that leaves special tokens out of its answers must not leave these out.
    assert tokenizer.decode([before, 30], skip_special_tokens=True).startswith("<stop>")


def test_a_token_that_is_known_is_not_new(tokenizer: Any) -> None:
    tokenizer = build_tokenizer()
    before = len(tokenizer)
    assert add_tokens(tokenizer, ["<|im_end|>"], rows=before) == []
    assert len(tokenizer) == before
    beyond = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (token,) = add_tokens(tokenizer, ["<|im_end|>"], rows=beyond)  # the model has no row for it
    assert token.id == beyond
    assert tokenizer.decode(token.pieces) == "<|im_end|>"
    assert beyond not in token.pieces


# --- where embeddings start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spare", [0, 1, SPARE])
@pytest.mark.parametrize("tied", [False, True])
def test_a_new_token_starts_as_the_mean_of_what_spelt_it(tied: bool, spare: int, dtype: torch.dtype) -> None:
    tokenizer = build_tokenizer()
    size = len(tokenizer)
    model = build_model(size + spare, tie_word_embeddings=tied).to(dtype)
    before = [side.weight.detach().clone() for side in (model.get_input_embeddings(), model.get_output_embeddings())]
    new = add_tokens(tokenizer, TEXTS, rows=size + spare)
    state = torch.get_rng_state()
    rows = make_room(model, new, rows=len(tokenizer))
    assert rows == [size, size + 1]
    after = [side.weight for side in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert is_tied(model) == tied
    for old, now in zip(before, after, strict=True):
        assert now.dtype == dtype
        assert len(now) == max(size + spare, size + 2)  # never shrinks
        assert model.config.vocab_size == len(now)
        for token in new:
            expected = old[list(token.pieces)].float().mean(0).to(dtype)
            assert torch.equal(now[token.id], expected)
        kept = [row for row in range(len(old)) if row not in rows]
        assert torch.equal(now[kept], old[kept])
    assert spare < 2 or torch.equal(torch.get_rng_state(), state)


def test_rows_between_model_and_new_tokens_start_as_the_mean_of_all() -> None:
    """A tokenizer that has more tokens than the model, two of them unused."""
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer) - 2)
    old = model.get_input_embeddings().weight.detach().clone()
    rows = make_room(model, add_tokens(tokenizer, TEXTS, rows=len(old)), rows=len(tokenizer))
    assert rows == list(range(len(old), len(old) + 4))
    torch.testing.assert_close(model.get_input_embeddings().weight[len(old)], old.mean(0))


def test_a_bias_of_the_output_layer_grows_too() -> None:
    config = transformers.PhiConfig(
        vocab_size=445, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 445
    model = transformers.PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias.normal_()
    old = model.lm_head.bias.detach().clone()
    new = add_tokens(tokenizer, TEXTS, rows=445)
    rows = make_room(model, new, rows=len(tokenizer))
    torch.testing.assert_close(model.lm_head.bias[445], old[list(new[0].pieces)].mean())
    options = train_new_rows(model, LORA | {"target_modules": ["q_proj"]}, rows)
    assert options["modules_to_save"] == ["lm_head"]  # PEFT's layer for single rows would leave the bias out
    assert options["trainable_token_indices"] == {"model.embed_tokens": rows}
    adapted = add_lora(model, options)
    before = logits(model, ids(tokenizer))
    torch.testing.assert_close(logits(adapted, ids(tokenizer)), before)


# --- runs -------------------------------------------------------------------------------------------------------------

# fields of lora_config, None for a full-parameter run
CASES: dict[str, dict[str, Any] | None] = {
    "lora": LORA,
    "input saved": {**LORA, "modules_to_save": ["embed_tokens"]},
    "more rows": {**LORA, "use_dora": True, "trainable_token_indices": [30, 31]},
    "full": None,
}


@dataclass
class Trained:
    """A finished run and the model that it trained, rebuilt from base and checkpoint."""

    run: Run
    base: Path
    losses: list[float]
    model: Any
    new_ids: list[int]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    directory = tmp_path_factory.mktemp("new-tokens")
    write_jsonl(directory / "train.jsonl", rows_with_new_tokens(48))
    done: dict[tuple[str, bool, int], Trained] = {}

    def once(name: str, tied: bool, spare: int) -> Trained:
        if (name, tied, spare) not in done:
            base = directory / f"base-{tied}-{spare}"
            if not base.is_dir():
                save_base(base, tied=tied, spare=spare)
            options = CASES[name]
            run, listener = run_here(
                directory,
                base,
                custom_model_tag=f"{name.replace(' ', '_')}-{tied}-{spare}",
                added_tokens=TEXTS,
                lora_config=options,
                learning_rate=1e-2,
                num_epochs=3,
            )
            tokenizer = build_tokenizer()
            model = load_base_model(ModelSource("", base), dtype=torch.float32)
            rows = make_room(model, add_tokens(tokenizer, TEXTS, rows=model.config.vocab_size), rows=len(tokenizer))
            torch.manual_seed(0)
            if options is not None:
                model = add_lora(model, train_new_rows(model, options, rows))
            load_parameters(list_checkpoints(run.run_dir / "checkpoints")[-1], model)
            losses = listener.of("step", "train_loss")
            done[name, tied, spare] = Trained(run, base, losses, model, rows, logits(model, ids(tokenizer)))
        return done[name, tied, spare]

    return once


every_name = pytest.mark.parametrize("name", CASES)
every_base = pytest.mark.parametrize(
    ("tied", "spare"), [(False, 0), (True, 0), (False, SPARE)], ids=["untied", "tied", "spare rows"]
)


@every_base
@every_name
def test_it_learns_them_and_serves_what_was_trained(
    name: str, tied: bool, spare: int, train: Callable[..., Trained]
) -> None:
    trained = train(name, tied, spare)
    assert trained.losses[-1] < trained.losses[0] - 0.5
    tokenizer = load_tokenizer(ModelSource("", trained.run.artifact_dir))
    assert tokenizer.convert_tokens_to_ids(TEXTS) == trained.new_ids
    loaded = load_trained_model(trained.run.artifact_dir, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded, ids(tokenizer)), trained.logits, rtol=0, atol=ATOL)


@every_base
def test_only_the_new_rows_and_lora_are_trained(tied: bool, spare: int, train: Callable[..., Trained]) -> None:
    trained = train("lora", tied, spare)
    sides = 1 if tied else 2
    rows = [p for key, p in trained.model.named_parameters() if p.requires_grad and "lora_" not in key]
    assert [tuple(p.shape) for p in rows] == [(2, 32)] * sides
    base = load_base_model(ModelSource("", trained.base), dtype=torch.float32)
    make_room(base, add_tokens(build_tokenizer(), TEXTS, rows=base.config.vocab_size), rows=0)
    merged = merge(load_trained_model(trained.run.artifact_dir, dtype=torch.float32))
    for get in ("get_input_embeddings", "get_output_embeddings"):
        start, end = getattr(base, get)().weight, getattr(merged, get)().weight
        moved = (start != end).any(1).nonzero().flatten().tolist()
        assert moved == trained.new_ids
    assert is_tied(merged) == tied


@every_base
@pytest.mark.parametrize("name", [name for name, options in CASES.items() if options is not None])
def test_merged_it_computes_the_same(
    name: str, tied: bool, spare: int, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train(name, tied, spare)
    assert merge_adapter(ModelSource("", trained.base), trained.run.artifact_dir, tmp_path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert is_tied(merged) == tied
    assert merged.config.vocab_size == trained.logits.shape[-1]
    tokenizer = load_tokenizer(ModelSource("", trained.run.artifact_dir))
    torch.testing.assert_close(logits(merged, ids(tokenizer)), trained.logits, rtol=0, atol=ATOL)


LOAD_PLAINLY = """
import json, os, sys, torch, transformers, peft
transformers.logging.set_verbosity_error()
from safetensors.torch import save_file
found = {}
for name, (directory, input_ids) in json.loads(sys.argv[1]).items():
    kind = peft.AutoPeftModelForCausalLM
    if not os.path.exists(os.path.join(directory, "adapter_config.json")):
        kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        found[name] = model(input_ids=torch.tensor(input_ids)).logits.contiguous()
save_file(found, sys.argv[2])
print(json.dumps(sorted(found)))
"""


def test_plain_transformers_and_peft_load_every_artifact(train: Callable[..., Trained], tmp_path: Path) -> None:
    """In a fresh process, where llmforge cannot be imported, from the artifact's path alone."""
    bases = [(False, 0), (True, 0), (False, SPARE)]
    every = {f"{name} {tied} {spare}": train(name, tied, spare) for name in CASES for tied, spare in bases}
    wanted = {}
    for name, trained in every.items():
        tokenizer = load_tokenizer(ModelSource("", trained.run.artifact_dir))
        wanted[name] = (str(trained.run.artifact_dir), ids(tokenizer).tolist())
    assert plain_python(LOAD_PLAINLY, json.dumps(wanted), tmp_path / "logits") == sorted(every)
    found = load_file(tmp_path / "logits")
    for name, trained in every.items():
        torch.testing.assert_close(found[name], trained.logits, rtol=0, atol=ATOL, msg=f"{name} differs")


@pytest.mark.parametrize(("name", "spare"), [("input saved", 0), ("lora", SPARE)])
def test_the_card_s_program_runs_without_llmforge(name: str, spare: int, train: Callable[..., Trained]) -> None:
    trained = train(name, False, spare)
    card = (trained.run.artifact_dir / "README.md").read_text(encoding="utf-8")
    program = card.partition("```python\n")[2].partition("```")[0]
    assert ("resize_token_embeddings" in program) == (spare == 0)
    program = "import os; os.chdir(sys.argv[1])\n" + program.replace("print(", "import json; print(json.dumps(") + ")"
    assert any(text in plain_python(program, trained.run.artifact_dir) for text in TEXTS)


def test_they_are_trained_in_fp32_under_bf16(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows_with_new_tokens(16))
    base = save_base(tmp_path / "base", tied=True, spare=0)
    run, _ = run_here(tmp_path, base, added_tokens=TEXTS, lora_config=LORA, dtype="bf16", learning_rate=1e-5)
    (rows,) = (t for n, t in load_file(run.artifact_dir / "adapter_model.safetensors").items() if "lora_" not in n)
    assert rows.dtype == torch.float32
    assert not torch.equal(rows, rows.bfloat16().float())  # small updates are not lost


# --- continuing and resuming ------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows_with_new_tokens(48))
    base = save_base(tmp_path / "base", tied=False, spare=0)
    keys = {"added_tokens": TEXTS, "lora_config": {**LORA, "lora_dropout": 0.1}, "learning_rate": 1e-2}
    often = {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 2}, "num_checkpoints_to_keep": 9}
    whole, _ = run_here(tmp_path, base, custom_model_tag="whole", **keys, **often)
    config = write_config(tmp_path, base, custom_model_tag="cut", **keys, **often)
    run_config(config)
    cut = tmp_path / "runs" / "cut"
    for path in (cut / "checkpoints").glob("step-*"):
        if path.name > "step-000002":
            shutil.rmtree(path)
    shutil.rmtree(cut / "artifact")
    events = (cut / "events.jsonl").read_text(encoding="utf-8").splitlines()
    (cut / "events.jsonl").write_text(
        "".join(f"{line}\n" for line in events if json.loads(line)["event"] != "finished"), encoding="utf-8"
    )
    resume_run(cut)
    name = "adapter_model.safetensors"
    assert (cut / "artifact" / name).read_bytes() == (whole.artifact_dir / name).read_bytes()
    assert tree(cut / "checkpoints") == tree(whole.run_dir / "checkpoints")


def test_an_adapter_is_continued_with_its_own_new_tokens(train: Callable[..., Trained], tmp_path: Path) -> None:
    first = train("lora", False, 0)
    write_jsonl(tmp_path / "train.jsonl", rows_with_new_tokens(48))
    keys = {
        "valid_path": str(tmp_path / "train.jsonl"),
        "initial_adapter_model_ckpt_path": str(first.run.artifact_dir),
        "lora_config": LORA,
        "eval_first": True,
    }
    _, listener = run_here(tmp_path, first.base, added_tokens=TEXTS, **keys)
    assert listener.of("evaluation", "eval_loss")[0] < first.losses[0] - 0.5
    for given in ([], TEXTS[:1], TEXTS[::-1], [*TEXTS, "<third>"], ["<other>", "<names>"]):
        config = write_config(tmp_path, first.base, added_tokens=given, custom_model_tag="refused", **keys)
        with pytest.raises(ModelError, match=r'added_tokens: \["<stop>", "<\|go now\|>"\]$'):
            finetune(load_config(config), Listener())


# --- what is refused or said ------------------------------------------------------------------------------------------


def test_lora_on_embeddings_with_new_rows_is_refused(data_dir: Path, model_dir: Path) -> None:
    options = {**LORA, "target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(ModelError, match=r"target_modules: model\.embed_tokens gets rows .* modules_to_save"):
        run_here(data_dir, model_dir, added_tokens=TEXTS, lora_config=options)


def test_repeated_and_empty_texts_are_refused(data_dir: Path, model_dir: Path) -> None:
    for given, words in ((["<a>", "<a>"], "given <a> more than once"), (["<a>", ""], "added_tokens")):
        with pytest.raises(ConfigError, match=words):
            load_config(write_config(data_dir, model_dir, added_tokens=given))


def test_known_tokens_are_named(data_dir: Path, model_dir: Path) -> None:
    run, listener = run_here(data_dir, model_dir, added_tokens=["<|im_end|>", "<new>"], lora_config=LORA)
    (note,) = (note for note in listener.notes if "added_tokens" in note)
    assert "<|im_end|>" in note
    assert "<new>" not in note
    assert load_tokenizer(ModelSource("", run.artifact_dir)).convert_tokens_to_ids("<new>") == len(build_tokenizer())


def test_the_error_about_a_missing_row_says_what_to_add(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    tokenizer = build_tokenizer()
    token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    text = tokenizer.decode([len(tokenizer) - 1])
    build_model(len(tokenizer) - 1).save_pretrained(base)
    rows = conversation_rows(16)
    rows[3]["messages"][1]["content"] = text
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(ModelError, match=r"added_tokens: \[") as caught:
        run_here(tmp_path, base, lora_config=LORA)
    assert json.dumps(text) in str(caught.value), token
    run, _ = run_here(tmp_path, base, lora_config=LORA, added_tokens=[text], custom_model_tag="learnt")
    assert run.metrics is not None
