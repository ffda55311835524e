"""The artifact: plain Hugging Face files that hold what was trained and say what was trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import PROMPT_FORMATS, random_conversation, save_model
from llmforge.checkpoint import list_checkpoints
from llmforge.errors import ConversationError, InputError, RunError
from llmforge.export.artifact import build_generation_config, write_artifact
from llmforge.jobs.run import load_model, load_run
from llmforge.models.adapter import add_lora
from llmforge.models.load import load_base_model, load_tokenizer
from llmforge.models.source import ModelSource
from llmforge.prompt import Encoder, PromptFormat, StopRules, build_format, load_format
from tiny_runs import LORA, plain_python, run_here, tree

IDS = torch.arange(20, 60).view(2, 20)

LOAD_PLAINLY = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
from safetensors.torch import save_file
ids = torch.arange(20, 60).view(2, 20)
conversation = [{"role": "user", "content": "What does red mean?"}]
found, reports = {}, {}
for name, path in json.loads(sys.argv[1]).items():
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for dtype in (torch.float32, torch.bfloat16, "auto"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        with torch.no_grad():
            found[f"{name} {dtype}"] = model(input_ids=ids).logits.float().contiguous()
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    reports[name] = {"prompt": list(prompt), "eos": model.generation_config.eos_token_id, "dtype": str(model.dtype)}
save_file(found, sys.argv[2])
print(json.dumps(reports))
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_full_parameter_artifacts_in_plain_transformers(data_dir: Path, tied_model_dir: Path) -> None:
    runs = {
        dtype: run_here(data_dir, tied_model_dir, custom_model_tag=dtype, dtype=dtype, learning_rate=1e-2)[0]
        for dtype in ("fp32", "bf16")
    }
    directories = {name: str(run.artifact_dir) for name, run in runs.items()}
    reports = plain_python(LOAD_PLAINLY, json.dumps(directories), data_dir / "logits")
    found = load_file(data_dir / "logits")
    for dtype, run in runs.items():
        trained = load_base_model(ModelSource("", tied_model_dir), dtype=torch.float32)
        parameters = load_file(list_checkpoints(run.run_dir / "checkpoints")[-1].path / "parameters.safetensors")
        trained.load_state_dict(parameters, strict=False)
        trained.tie_weights()
        expected = logits(trained)
        if dtype == "fp32":
            assert torch.equal(found["fp32 torch.float32"], expected)
            assert torch.equal(found["fp32 auto"], expected)
        else:  # weights rounded to 8 bits of mantissa, then computed with in fp32
            torch.testing.assert_close(found["bf16 torch.float32"], expected, rtol=0, atol=0.1)
        torch.testing.assert_close(found[f"{dtype} torch.bfloat16"], expected, rtol=0, atol=0.25)
        encoder, stop = load_format(run.artifact_dir, load_tokenizer(ModelSource("", run.artifact_dir)))
        assert reports[dtype] == {
            "prompt": encoder.encode_prompt([{"role": "user", "content": "What does red mean?"}]),
            "eos": list(stop.token_ids),
            "dtype": {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype],
        }


FORMATS: dict[str, dict[str, Any]] = {
    "own": PROMPT_FORMATS["llama3"],
    "tokenizer's": {"use_hf_chat_templates": True},
    "given": {"chat_template": "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
                               "{% if add_generation_prompt %}<s>assistant: {% endif %}"},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_saved_tokenizer_renders_what_was_trained_on(name: str, lora: Any, data_dir: Path, model_dir: Path) -> None:
    import random

    stops = {"stopping_sequences": ["<|eot_id|>", "User:"], "stopping_tokens": [7]}
    run, _ = run_here(
        data_dir, model_dir, lora_config=lora, generation_config={"prompt_format": FORMATS[name], **stops}
    )
    tokenizer = AutoTokenizer.from_pretrained(run.artifact_dir)
    trained_with = build_format(FORMATS[name], load_tokenizer(ModelSource("", model_dir)))
    encoder = Encoder(load_tokenizer(ModelSource("", model_dir)), trained_with)
    loaded, stop = load_format(run.artifact_dir, tokenizer)
    rng = random.Random(0)
    compared = 0
    for _ in range(60):
        conversation = random_conversation(rng)
        try:
            prompt = encoder.encode_prompt(conversation)
        except ConversationError:
            continue
        assert loaded.encode_prompt(conversation) == prompt
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        assert list(ids) == prompt
        compared += 1
    assert compared > 30

    eot, im_end, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|im_end|>", "</s>"))
    ends_turns = {"own": eot, "tokenizer's": im_end, "given": eos}[name]
    assert set(stop.token_ids) == {7, eot, im_end, ends_turns}  # given, a one-token sequence, EOS, the format's own end
    assert GenerationConfig.from_pretrained(run.artifact_dir).eos_token_id == list(stop.token_ids)
    content = yaml.safe_load((run.artifact_dir / "prompt_format.yaml").read_text())
    assert content["stopping_sequences"] == ["<|eot_id|>", "User:"]
    assert content["prompt_format"] == (PromptFormat(**FORMATS[name]).model_dump() if name == "own" else FORMATS[name])


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({}, {}),
        ({"temperature": 0.7}, {"temperature": 0.7, "do_sample": True}),
        ({"top_p": 0.9, "max_new_tokens": 9}, {"top_p": 0.9, "do_sample": True, "max_new_tokens": 9}),
        ({"temperature": 0, "top_p": 0.9}, {"do_sample": False}),
        ({"temperature": 0.7, "do_sample": True}, {"temperature": 0.7, "do_sample": True}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_generation_options_travel(given: dict[str, Any], written: dict[str, Any], model_dir: Path) -> None:
    tokenizer = load_tokenizer(ModelSource("", model_dir))
    config = build_generation_config(
        Encoder(tokenizer, build_format(None, tokenizer)), StopRules(token_ids=(4,)), given
    )
    ids = {"eos_token_id": [4], "pad_token_id": 2, "bos_token_id": 0}
    found = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    assert found == {**ids, **written}


def test_refused_generation_options(model_dir: Path) -> None:
    tokenizer = load_tokenizer(ModelSource("", model_dir))
    encoder = Encoder(tokenizer, build_format(None, tokenizer))
    with pytest.raises(InputError, match="did you mean max_new_tokens"):
        build_generation_config(encoder, StopRules(), {"max_new_token": 4})
    with pytest.raises(InputError, match="refuses it"):
        build_generation_config(encoder, StopRules(), {"do_sample": False, "temperature": 0.5})


def test_a_base_model_whose_own_generation_config_is_invalid(data_dir: Path, tmp_path: Path) -> None:
    """Published models have such files, and transformers refuses to save what it loaded."""
    model = save_model(tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "do_sample": false}')
    run, _ = run_here(data_dir, model, learning_rate=1e-3)
    assert "temperature" not in json.loads((run.artifact_dir / "generation_config.json").read_text())


def test_an_adapter_names_its_base_model_and_everything_loads_when_moved(
    data_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data_dir)
    shutil.copytree(model_dir, data_dir / "base")
    run, _ = run_here(data_dir, Path("base"), lora_config=LORA, learning_rate=1e-2)
    settings = json.loads((run.artifact_dir / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(data_dir / "base")  # from wherever it is loaded
    question = [{"role": "user", "content": "red?"}]
    before = run.chat(question, max_new_tokens=6)
    moved = (data_dir / "runs").rename(data_dir / "elsewhere") / "run"
    monkeypatch.chdir("/")
    assert load_run(moved).chat(question, max_new_tokens=6) == before
    shutil.rmtree(data_dir / "base")
    with pytest.raises(InputError, match=r"base model: .*base"):
        load_model(moved / "artifact")


def test_a_base_model_given_by_hub_id_is_named_by_it(
    data_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cache = data_dir / "hub"
    repository = cache / "models--org--tiny"
    shutil.copytree(model_dir, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run, _ = run_here(data_dir, Path("org/tiny"), lora_config=LORA)
    settings = json.loads((run.artifact_dir / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", None)
    options = {"revision": "v1", "lora_config": LORA}
    (repository / "refs" / "v1").write_text("0" * 40)
    run, _ = run_here(data_dir, Path("org/tiny"), custom_model_tag="v1", **options)
    settings = json.loads((run.artifact_dir / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", "v1")
    shutil.copytree(repository, cache / "models--org--other")
    (cache / "models--org--other" / "refs" / "v1").unlink()  # which is of model_id, and of no other repository
    other = {"initial_base_model_ckpt_path": {"repo_id": "org/other"}}
    run, _ = run_here(data_dir, Path("org/tiny"), custom_model_tag="other", **options, **other)
    settings = json.loads((run.artifact_dir / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/other", None)


def test_the_card_and_the_curve_are_there(data_dir: Path, model_dir: Path) -> None:
    run, _ = run_here(data_dir, model_dir, lora_config=LORA)
    assert (run.artifact_dir / "README.md").read_text().startswith("---\n")
    assert (run.artifact_dir / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in run.artifact_dir.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "generation_config.json",
            "prompt_format.yaml", "tokenizer.json", "tokenizer_config.json"} <= names  # fmt: skip


@pytest.fixture
def parts(model_dir: Path) -> dict[str, Any]:
    """What `write_artifact` needs for a fresh adapter."""
    tokenizer = load_tokenizer(ModelSource("", model_dir))
    return {
        "model": add_lora(AutoModelForCausalLM.from_pretrained(model_dir), LORA),
        "start": {},
        "base_model": str(model_dir),
        "revision": None,
        "dtype": torch.float32,
        "encoder": Encoder(tokenizer, build_format(None, tokenizer)),
        "stop": StopRules(token_ids=(4,)),
        "generate_kwargs": {},
        "finish": lambda directory: None,
    }


def test_a_failure_leaves_no_artifact_or_the_one_before(parts: dict[str, Any], tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        assert (directory / "adapter_model.safetensors").is_file()
        raise RunError("the card cannot be written")

    with pytest.raises(RunError, match="card"):
        write_artifact(tmp_path / "artifact", **{**parts, "finish": fail})
    assert list(tmp_path.iterdir()) == []
    write_artifact(tmp_path / "artifact", **parts)
    before = tree(tmp_path)
    with pytest.raises(RunError, match="card"):
        write_artifact(tmp_path / "artifact", **{**parts, "finish": fail})
    assert tree(tmp_path) == before
