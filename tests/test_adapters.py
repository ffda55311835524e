"""LoRA: what it may adapt, embeddings in every combination, merging, and continuing an adapter."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import build_model, conversation_rows, save_model, write_jsonl
from llmforge.checkpoint import list_checkpoints, load_parameters
from llmforge.config import load_config
from llmforge.errors import ModelError
from llmforge.jobs.finetune import finetune
from llmforge.jobs.run import Run
from llmforge.models.adapter import add_lora, is_tied, merge
from llmforge.models.load import load_base_model
from llmforge.models.source import ModelSource
from llmforge.models.trained import load_trained_model
from tiny_runs import LORA, Listener, plain_python, run_here, write_config

IDS = torch.arange(20, 60).view(2, 20)
LAYERS = ["q_proj", "down_proj"]
ATOL = 1e-5  # fp32 logits of size 1 to 10; merging adds the same numbers in another order

# fields of lora_config → names that may be whole matrices in the adapter's file
EMBEDDINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lora on both": ({"target_modules": [*LAYERS, "embed_tokens", "lm_head"]}, []),
    "lora on the input": ({"target_modules": [*LAYERS, "embed_tokens"]}, []),
    "lora on the output": ({"target_modules": [*LAYERS, "lm_head"]}, []),
    "lora by pattern": ({"target_modules": r".*\.(q_proj|embed_tokens)|lm_head"}, []),
    "input saved": ({"target_modules": LAYERS, "modules_to_save": ["embed_tokens"]}, ["embed_tokens"]),
    "output saved": ({"target_modules": LAYERS, "modules_to_save": ["lm_head"]}, ["lm_head"]),
    "both saved": (
        {"target_modules": LAYERS, "modules_to_save": ["embed_tokens", "lm_head"]},
        ["embed_tokens", "lm_head"],
    ),
    "lora on the input, output saved": (
        {"target_modules": [*LAYERS, "embed_tokens"], "modules_to_save": ["lm_head"]},
        ["lm_head"],
    ),
    "dora on both": ({"target_modules": [*LAYERS, "embed_tokens", "lm_head"], "use_dora": True}, []),
    "rslora": ({"target_modules": "all-linear", "use_rslora": True}, []),
    "pissa": ({"target_modules": LAYERS, "init_lora_weights": "pissa"}, []),
    "fast pissa": ({"target_modules": LAYERS, "init_lora_weights": "pissa_niter_4", "use_rslora": True}, []),
    "olora, dora": ({"target_modules": LAYERS, "init_lora_weights": "olora", "use_dora": True}, []),
    "some tokens": ({"target_modules": LAYERS, "trainable_token_indices": [30, 31, 32]}, []),
}


def logits(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().to(dtype)(input_ids=IDS).logits


@dataclass
class Trained:
    """A finished run, its losses, and the logits of the model that it trained."""

    run: Run
    losses: list[float]
    logits: torch.Tensor
    is_tied: bool


def trained_model(run: Run, model_dir: Path) -> Any:
    """Rebuild the model that was trained from base and checkpoint, without the artifact."""
    config = load_config(run.run_dir / "resolved_config.yaml").config
    assert config.lora_config is not None
    options = config.lora_config.model_dump(mode="json", exclude_unset=True)
    torch.manual_seed(config.seed)
    model = add_lora(load_base_model(ModelSource("", model_dir), dtype=torch.float32), options)
    load_parameters(list_checkpoints(run.run_dir / "checkpoints")[-1], model)
    return model


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    directory = tmp_path_factory.mktemp("adapters")
    write_jsonl(directory / "train.jsonl", conversation_rows(48))
    models = {tied: save_model(directory / f"tied-{tied}", tie_word_embeddings=tied) for tied in (True, False)}
    done: dict[tuple[str, bool], Trained] = {}

    def once(name: str, tied: bool) -> Trained:
        if (name, tied) not in done:
            tag = f"{name.replace(' ', '_')}-{tied}"
            options = {"r": 4, "lora_alpha": 8, **EMBEDDINGS[name][0]}
            run, listener = run_here(
                directory, models[tied], custom_model_tag=tag, lora_config=options, learning_rate=1e-2, num_epochs=4
            )
            expected = logits(trained_model(run, models[tied]))
            done[name, tied] = Trained(run, listener.of("step", "train_loss"), expected, tied)
        return done[name, tied]

    return once


every_case = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
every_name = pytest.mark.parametrize("name", EMBEDDINGS)


@every_case
@every_name
def test_it_trains_and_the_file_holds_what_was_trained(name: str, tied: bool, train: Callable[..., Trained]) -> None:
    trained = train(name, tied)
    assert trained.losses[-1] < trained.losses[0] - 0.3
    with safe_open(trained.run.artifact_dir / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    whole = [key for key, shape in shapes.items() if shape == [trained.logits.shape[-1], 32]]
    allowed = EMBEDDINGS[name][1]
    if tied and allowed and "embed_tokens" not in EMBEDDINGS[name][0]["target_modules"]:
        allowed = ["embed_tokens", "lm_head"]  # one tensor, under the name of one side or of both
    assert all(any(f".{part}." in key for part in allowed) for key in whole)
    assert bool(whole) == bool(allowed)


@every_case
@every_name
def test_the_merged_model_computes_the_same_and_survives_saving(
    name: str, tied: bool, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train(name, tied)
    loaded = load_trained_model(trained.run.artifact_dir, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), trained.logits, rtol=0, atol=ATOL)
    merged = merge(trained_model(trained.run, Path(load_config(trained.run.run_dir / "config.yaml").config.model_id)))
    assert not isinstance(merged, peft.PeftModel)
    torch.testing.assert_close(logits(merged), trained.logits, rtol=0, atol=ATOL)
    untouched = not EMBEDDINGS[name][1] and "embed_tokens" not in str(EMBEDDINGS[name][0])
    untouched = untouched and "lm_head" not in str(EMBEDDINGS[name][0]) and name != "some tokens"
    if not tied:
        assert not is_tied(merged)
    elif untouched:
        assert is_tied(merged)

    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), trained.logits, rtol=0, atol=ATOL)
    assert is_tied(again) == is_tied(merged)


LOAD_PLAINLY = """
import json, sys, torch, transformers, peft
transformers.logging.set_verbosity_error()
from safetensors.torch import save_file
found, ids = {}, torch.arange(20, 60).view(2, 20)
for name, directory in json.loads(sys.argv[1]).items():
    model = peft.AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert type(model).__name__ == "PeftModelForCausalLM"
    with torch.no_grad():
        found[name] = model(input_ids=ids).logits.contiguous()
save_file(found, sys.argv[2])
print(json.dumps(sorted(found)))
"""


def test_plain_transformers_and_peft_load_every_artifact(train: Callable[..., Trained], tmp_path: Path) -> None:
    """In a fresh process, where llmforge cannot be imported, from the artifact's path alone."""
    every = {f"{name} {tied}": train(name, tied) for name in EMBEDDINGS for tied in (False, True)}
    directories = {name: str(trained.run.artifact_dir) for name, trained in every.items()}
    assert plain_python(LOAD_PLAINLY, json.dumps(directories), tmp_path / "logits") == sorted(every)
    found = load_file(tmp_path / "logits")
    for name, trained in every.items():
        torch.testing.assert_close(found[name], trained.logits, rtol=0, atol=ATOL, msg=f"{name} differs")


def test_under_bf16_all_that_is_trained_is_fp32(data_dir: Path, tied_model_dir: Path) -> None:
    """Updates of 1e-5 are below what bf16 can tell apart near 1."""
    options = {**LORA, "modules_to_save": ["embed_tokens", "model.norm"]}
    run, _ = run_here(data_dir, tied_model_dir, lora_config=options, dtype="bf16", learning_rate=1e-5)
    saved = load_file(run.artifact_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    norm = saved["base_model.model.model.norm.weight"]
    assert 0 < (norm - 1).abs().max() < 1e-3
    answers = run.generate([[{"role": "user", "content": "red?"}]], max_new_tokens=4)
    assert len(answers) == 1


def test_tied_lora_matrices_are_refused(data_dir: Path, tied_model_dir: Path) -> None:
    options = {**LORA, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    with pytest.raises(ModelError, match=r"ensure_weight_tying: .*modules_to_save"):
        run_here(data_dir, tied_model_dir, lora_config=options)


# --- what cannot be adapted -------------------------------------------------------------------------------------------

NAMES = "embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["c_attn"]}, "target_modules: c_attn matches no module"),
        ({"target_modules": ["q_proj", "w1", "w2"]}, "target_modules: w1, w2 matches no module"),
        ({"target_modules": r".*\.query"}, r"target_modules: .*query matches no module"),
        (
            {"target_modules": ["q_proj", "input_layernorm"]},
            r"matches input_layernorm \(LlamaRMSNorm\), which LoRA cannot",
        ),
        ({"target_modules": ["self_attn"]}, r"matches self_attn \(LlamaAttention\), which LoRA cannot"),
        ({"target_modules": ["layers"]}, r"matches layers \(ModuleList\), which LoRA cannot"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["score"]}, "modules_to_save: score matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["nothing"]}, "exclude_modules: nothing matches no module"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "lora_config: "),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_weights_load(
    options: dict[str, Any], words: str, data_dir: Path, model_dir: Path
) -> None:
    model = shutil.copytree(model_dir, data_dir / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]  # loading would fail
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = write_config(data_dir, model, lora_config={"r": 4, **options})
    with pytest.raises(ModelError, match=words) as caught:
        finetune(load_config(config), Listener())
    assert NAMES in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (data_dir / "runs").exists()


# --- continuing -------------------------------------------------------------------------------------------------------


def test_a_continued_adapter_starts_where_the_old_one_ended(data_dir: Path, model_dir: Path) -> None:
    keys = {"valid_path": str(data_dir / "valid.jsonl"), "learning_rate": 1e-2, "eval_first": True}
    options = {**LORA, "target_modules": [*LAYERS, "embed_tokens"], "modules_to_save": ["lm_head"], "use_rslora": True}
    first, heard = run_here(data_dir, model_dir, **keys, lora_config=options, num_epochs=3, custom_model_tag="first")
    continued = {**options, "lora_dropout": 0.1}  # how it is trained may change, what it computes may not
    second, listener = run_here(
        data_dir,
        model_dir,
        **keys,
        lora_config=continued,
        initial_adapter_model_ckpt_path="runs/first/artifact",  # relative to the config file
        custom_model_tag="second",
    )
    best = min(heard.of("evaluation", "eval_loss"))
    assert listener.of("evaluation", "eval_loss")[0] == pytest.approx(best, rel=1e-5)
    assert heard.of("evaluation", "eval_loss")[0] > best + 1
    assert second.metrics["eval_loss"] < best
    assert first.artifact_dir != second.artifact_dir
    settings = json.loads((second.artifact_dir / "adapter_config.json").read_text())
    assert (settings["lora_dropout"], settings["base_model_name_or_path"]) == (0.1, str(model_dir))


def test_a_run_starts_from_other_base_weights(data_dir: Path, model_dir: Path) -> None:
    keys = {"valid_path": str(data_dir / "valid.jsonl"), "eval_first": True, "learning_rate": 1e-2}
    first, heard = run_here(data_dir, model_dir, **keys, num_epochs=3, custom_model_tag="first")
    best = min(heard.of("evaluation", "eval_loss"))
    second, listener = run_here(
        data_dir,
        model_dir,
        **keys,
        initial_base_model_ckpt_path=str(first.artifact_dir),
        lora_config=LORA,
        custom_model_tag="second",
    )
    assert listener.of("evaluation", "eval_loss")[0] == pytest.approx(best, rel=1e-5)
    settings = json.loads((second.artifact_dir / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(first.artifact_dir)  # what the adapter belongs to


def test_base_weights_of_another_architecture_are_refused(data_dir: Path, model_dir: Path) -> None:
    other = data_dir / "other"
    build_model(64).save_pretrained(other)
    with pytest.raises(ModelError, match=r"initial_base_model_ckpt_path: .*another architecture"):
        run_here(data_dir, model_dir, initial_base_model_ckpt_path=str(other))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """An adapter that PEFT saved itself, without llmforge."""
    directory = tmp_path_factory.mktemp("adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 8, "lora_alpha": 8}, r"trained with r 4 \(here 8\).*set lora_config: \{r: 4\}"),
        ({"r": 2}, r"r 4 \(here 2\), lora_alpha 8 \(here 4\).*\{r: 4, lora_alpha: 8\}"),
        ({"r": 4, "use_dora": True}, r"use_dora false \(here true\)"),
        ({"r": 4, "rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 4, "target_modules": ["q_proj"]}, "it has, but lora_config does not name, down_proj"),
        ({"r": 4, "target_modules": [*LAYERS, "v_proj"]}, r"it lacks v_proj.*target_modules are \["),
        ({"r": 4, "modules_to_save": ["lm_head"]}, "it lacks lm_head"),
    ],
)
def test_an_adapter_is_continued_only_under_its_own_values(
    options: dict[str, Any], words: str, adapter: Path, data_dir: Path, model_dir: Path
) -> None:
    with pytest.raises(ModelError, match=f"initial_adapter_model_ckpt_path: .*{words}"):
        run_here(
            data_dir,
            model_dir,
            lora_config={"target_modules": LAYERS, **options},
            initial_adapter_model_ckpt_path=str(adapter),
        )
    assert not (data_dir / "runs").exists()


def test_an_adapter_of_another_model_or_damaged_is_refused(adapter: Path, data_dir: Path, model_dir: Path) -> None:
    keys: dict[str, Any] = {"lora_config": {"r": 4, "target_modules": LAYERS}}
    other = shutil.copytree(adapter, data_dir / "adapter")
    weights = load_file(other / "adapter_model.safetensors")
    wide = {name: torch.zeros(2 * tensor.shape[0], *tensor.shape[1:]) if "lora_B" in name else tensor
            for name, tensor in weights.items()}  # fmt: skip
    save_file(wide, other / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"trained on another model.*has shape"):
        run_here(data_dir, model_dir, **keys, initial_adapter_model_ckpt_path=str(other))
    (other / "adapter_model.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        run_here(data_dir, model_dir, **keys, initial_adapter_model_ckpt_path=str(other))
    with pytest.raises(ModelError, match="adapter"):
        run_here(data_dir, model_dir, **keys, initial_adapter_model_ckpt_path=str(model_dir))
