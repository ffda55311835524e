"""Config files that deploy models with Ray, as `llmforge serve --config` takes them."""

import random
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from tokenizers.processors import TemplateProcessing

from conftest import PROMPT_FORMATS, build_tokenizer, random_conversation
from llmforge.config.serve_config import load_serve_config
from llmforge.errors import ConfigError, ConversationError, InputError, PromptFormatError
from llmforge.jobs.export import export
from llmforge.jobs.serve import find_configured
from llmforge.models.source import ModelSource
from llmforge.prompt import Encoder
from llmforge.prompt.rayllm import rayllm_format
from llmforge.serve.models import Models
from test_export import rayllm_text, write_artifact
from test_prompt_rayllm import BRACKETS, LLAMA_2

ASKED = [{"role": "user", "content": " hello "}]
OLD = {"engine_config": {"model_id": "tiny", "hf_model_id": "base", "generation": {"prompt_format": BRACKETS}}}
NEW = {
    "model_loading_config": {"model_id": "tiny", "model_source": "base"},
    "generation_config": {"prompt_format": BRACKETS},
}
SHAPES = pytest.mark.parametrize("shape", [OLD, NEW], ids=["rayllm", "ray-serve"])


def write(directory: Path, content: Any, name: str = "serve.yaml") -> Path:
    file = directory / name
    file.write_text(yaml.safe_dump(content))
    return file


def changed(shape: dict[str, Any], generation: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Give a config with another `generation` section and further keys."""
    if "engine_config" in shape:
        return {"engine_config": {**shape["engine_config"], "generation": generation}, **keys}
    return {**shape, "generation_config": generation, **keys}


def format_of(**keys: Any) -> Any:
    """Read a prompt format as a file has it, where what is not written has RayLLM's defaults."""
    tokenizer = keys.pop("tokenizer", None) or build_tokenizer()
    defaults = {
        "bos": None,
        "system_in_user": False,
        "default_system_message": "",
        "strip_whitespace": True,
        "add_system_tags_even_if_message_is_empty": False,
    }
    return rayllm_format({**defaults, **keys}, tokenizer)


@pytest.fixture
def base(tmp_path: Path, model_dir: Path) -> Path:
    """A plain base model beside the config file, without a chat template."""
    transformers.AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def models() -> Any:
    made = Models(max_batch=2, max_waiting=2)
    yield made
    made.close()


def serve(models: Models, file: Path) -> Any:
    """Serve what a file says, as `llmforge serve --config` does; give the last of its models."""
    for config in load_serve_config(file):
        source, loading, overrides = find_configured(config, "transformers")
        model = models.add(config.name, source, loading, overrides)
    return model


# --- a plain base model -----------------------------------------------------------------------------------------------


@SHAPES
def test_a_base_model_is_prompted_as_the_file_says(
    shape: dict[str, Any], tmp_path: Path, base: Path, models: Models
) -> None:
    kwargs = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    generation = {
        "prompt_format": {**BRACKETS, "default_system_message": "law"},
        "stopping_sequences": ["[user]", 5, "6"],
        "generate_kwargs": kwargs,
    }
    model = serve(models, write(tmp_path, changed(shape, generation)))
    assert model.name == "tiny"
    # What RayLLM strips unless told otherwise.
    assert model.encoder.decode(model.encode(ASKED)) == "[system] law [/system] [user] hello [/user] [assistant]"
    assert model.stop.sequences == ("[user]",)
    assert {5, 6, model.encoder.tokenizer.eos_token_id} <= set(model.stop.token_ids)
    sampling = model.sampling()
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 7)
    assert model.sampling(temperature=0.0).temperature == 0.0


def test_the_tokenizers_own_bos_stands_in_front_unless_the_file_says_another() -> None:
    adds_bos = build_tokenizer()
    adds_bos.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", adds_bos.bos_token_id)]
    )
    assert adds_bos("").input_ids == [adds_bos.bos_token_id]
    text = "[user] hello [/user] [assistant]"
    assert format_of(**BRACKETS, tokenizer=adds_bos).render(ASKED) == f"<s>{text}"
    assert format_of(**BRACKETS, tokenizer=adds_bos, bos="").render(ASKED) == text
    assert format_of(**BRACKETS).render(ASKED) == text
    ids = Encoder(adds_bos, format_of(**BRACKETS, tokenizer=adds_bos)).encode_prompt(ASKED)
    assert ids.count(adds_bos.bos_token_id) == 1


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("keys", [BRACKETS, LLAMA_2, {**LLAMA_2, "user": "{{}}{system}{instruction}{{x}}"}])
def test_what_is_served_is_what_rayllm_renders(keys: dict[str, Any], tags: bool, strip: bool) -> None:
    section = {
        "system_in_user": False,
        **keys,
        "strip_whitespace": strip,
        "add_system_tags_even_if_message_is_empty": tags,
    }
    format = format_of(**section)
    generator, compared = random.Random(3), 0
    for _ in range(300):
        messages = random_conversation(generator)
        messages = [{**m, "content": f" {m['content']}\n"} if m["role"] == "system" else m for m in messages]
        if any(not m["content"] for m in messages):
            continue  # which no server takes
        try:
            text = format.render(messages)
        except ConversationError:
            continue
        assert text == rayllm_text(section, messages)
        compared += 1
    assert compared > 150


@pytest.mark.parametrize(
    "user", ["{ {instruction}", "{other}{instruction}", "{instruction!r}", "{system}{instruction}"]
)
def test_a_template_that_str_format_cannot_fill_is_refused(user: str) -> None:
    with pytest.raises(PromptFormatError, match=r"prompt_format\.user: given .* any other brace is written twice"):
        format_of(**{**BRACKETS, "user": user})


def test_a_placeholders_name_that_is_meant_as_text_is_refused() -> None:
    with pytest.raises(PromptFormatError, match="stands as plain text"):
        format_of(**{**BRACKETS, "user": "{{instruction}} {instruction}"})


@pytest.mark.parametrize("key", ["use_hf_chat_templates", "use_hugging_face_chat_template"])
def test_the_tokenizers_own_template_can_be_asked_for(key: str, tmp_path: Path, base: Path, models: Models) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    build_tokenizer(chat_template=template).save_pretrained(base)
    model = serve(models, write(tmp_path, changed(NEW, {"prompt_format": {key: True}})))
    assert model.encoder.decode(model.encode(ASKED)) == "<|im_start|> hello <|im_end|>"


def test_a_base_model_without_a_template_continues_texts_and_carries_adapters(
    tmp_path: Path, base: Path, models: Models
) -> None:
    model = serve(models, write(tmp_path, {"model_loading_config": NEW["model_loading_config"]}))
    with pytest.raises(ConversationError, match="no chat template"):
        model.encode(ASKED)
    passed = {**dict.fromkeys(("system", "user", "assistant"), "{instruction}"), "strip_whitespace": False}
    named = {**NEW["model_loading_config"], "model_id": "passes"}
    chats = serve(
        models, write(tmp_path, {"model_loading_config": named, "generation_config": {"prompt_format": passed}})
    )
    assert chats.encoder.decode(chats.encode(ASKED)) == " hello "
    answer = model.answer(model.encoder.encode_text("fox"), model.sampling(max_tokens=3, ignore_stops=True))
    assert sum(len(piece.tokens) for piece in answer) == 3
    artifact = write_artifact(tmp_path / "adapter", base)
    tuned = models.add_adapter("tuned", artifact)
    assert tuned.engine is model.engine
    assert tuned.encode(ASKED)


# --- what else a file says --------------------------------------------------------------------------------------------


def test_engine_options_come_from_either_shape(tmp_path: Path) -> None:
    old = {
        **OLD,
        "deployment_config": {"max_concurrent_queries": 24, "autoscaling_config": {"min_replicas": 1}},
        "scaling_config": {"num_workers": 1},
        "lora_config": {"dynamic_lora_loading_path": "s3://bucket/loras"},
        "multiplex_config": {"max_num_models_per_replica": 3},
    }
    old["engine_config"] = {
        **OLD["engine_config"],
        "max_total_tokens": 512,
        "engine_kwargs": {"trust_remote_code": True, "dtype": "float32", "gpu_memory_utilization": 0.9},
    }
    (config,) = load_serve_config(write(tmp_path, old))
    assert (config.max_batch, config.context_length, config.dtype, config.trust_remote_code) == (24, 512, "fp32", True)
    assert config.engine_kwargs == {"gpu_memory_utilization": 0.9}
    assert config.ray_only == ("deployment_config.autoscaling_config", "scaling_config")
    assert config.lora is not None
    assert config.lora.max_num_adapters_per_replica == 3

    new = {
        **NEW,
        "llm_engine": "vLLM",
        "accelerator_type": "A10G",
        "engine_kwargs": {"max_num_seqs": 8, "max_model_len": 256, "dtype": "float16"},
        "lora_config": {"dynamic_lora_loading_path": "gs://bucket/loras", "max_num_adapters_per_replica": 5},
    }
    (config,) = load_serve_config(write(tmp_path, new))
    assert (config.max_batch, config.context_length, config.dtype) == (8, 256, None)
    assert config.engine_kwargs == {"dtype": "float16"}
    assert config.ray_only == ("accelerator_type",)


def test_the_context_and_the_batch_of_a_file_are_the_engines(tmp_path: Path, base: Path, models: Models) -> None:
    kwargs = {"max_model_len": 32, "max_num_seqs": 1, "gpu_memory_utilization": 0.9}
    model = serve(models, write(tmp_path, {**NEW, "engine_kwargs": kwargs}))
    assert model.context_length == 32
    with pytest.raises(InputError, match="context holds 32"):
        model.answer([1] * 32, model.sampling())


def test_an_application_names_files_and_models(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    write(tmp_path / "models", OLD, "a.yaml")
    write(tmp_path / "models", {**OLD, "enabled": False}, "b.yaml")
    other = {"model_loading_config": {"model_id": "other"}}
    application = {"name": "llm", "import_path": "ray.serve.llm:build_openai_app", "route_prefix": "/"}
    for args, names in (
        ({"llm_configs": ["models/a.yaml", other]}, ["tiny", "other"]),
        ({"models": ["./models/a.yaml"]}, ["tiny"]),
        ({"models": "models"}, ["tiny"]),
    ):
        found = load_serve_config(write(tmp_path, {"applications": [{**application, "args": args}]}))
        assert [config.name for config in found] == names
    assert found[0].model == "base"
    assert load_serve_config(write(tmp_path, other))[0].model == "other"  # a hub id
    with pytest.raises(ConfigError, match=r"the model config missing\.yaml is not there"):
        load_serve_config(write(tmp_path, {"applications": [{"args": {"llm_configs": ["missing.yaml"]}}]}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            changed(OLD, {"prompt_format": BRACKETS, "stoping_sequences": ["x"]}),
            r"serve\.yaml:\d+: engine_config\.generation\.stoping_sequences: unknown key in engine_config\.generation; "
            r"did you mean stopping_sequences\?",
        ),
        (
            {**NEW, "accelerator": "A10G"},
            r"serve\.yaml:1: accelerator: unknown key at the top level; did you mean acce",
        ),
        (changed(NEW, {"prompt_format": {"user": "{instruction}"}}), r"prompt_format\.system: missing"),
        (
            changed(NEW, {"generate_kwargs": {"temperature": -1}}),
            r"temperature: given -1; allowed a number of at least 0",
        ),
        (changed(OLD, {"stopping_sequences": [[1, 2]]}), r"given the token ids \[1, 2\]; allowed are texts and single"),
        ({**NEW, "engine_kwargs": {"max_num_seqs": "8"}}, 'max_num_seqs: given "8"; allowed a whole number'),
        ({"engine_confg": {}}, r"did you mean engine_config instead of engine_confg\?"),
        ({"model_id": "x", "train_path": "y"}, r"serve a run by its directory: llmforge serve RUN"),
        ({"applications": [{"args": {"models": []}}]}, "no model is served"),
        (
            {"applications": [{"args": {"llm_configs": [{**NEW, "lora_conf": {}}]}}]},
            r"llm_configs\[0\]\.lora_conf: unknown key .* did you mean lora_config\?",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(content: Any, message: str, tmp_path: Path, base: Path) -> None:
    file = write(tmp_path, content)
    with pytest.raises(InputError, match=message):
        [find_configured(config, "transformers") for config in load_serve_config(file)]


def test_another_format_than_the_artifacts_own_is_served_and_noticed(tmp_path: Path, model_dir: Path) -> None:
    write_artifact(tmp_path / "base", model_dir, lora=False)
    notes: list[str] = []
    models = Models(note=notes.append)
    try:
        model = serve(models, write(tmp_path, NEW))
        assert model.encoder.decode(model.encode(ASKED)) == "[user] hello [/user] [assistant]"
        assert len(notes) == 1
        assert "tiny is not served in the prompt format that it was trained in" in notes[0]
    finally:
        models.close()


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PROMPT_FORMATS))
def test_what_export_writes_is_served_as_it_was_trained(name: str, tmp_path: Path, model_dir: Path) -> None:
    options = {"temperature": 0.7, "max_new_tokens": 50}
    artifact = write_artifact(tmp_path / "artifact", model_dir, format=name, sequences=("\n\nUser:",), options=options)
    export(artifact, "rayllm", tmp_path / "out", name="colours")
    notes: list[str] = []
    models = Models(note=notes.append)
    try:
        trained = models.add("trained", ModelSource(str(artifact), artifact))
        files = [
            file
            for file in ("rayllm.yaml", "model_config.yaml", "serve_config.yaml")
            if (tmp_path / "out" / file).exists()
        ]
        assert "model_config.yaml" in files
        assert "serve_config.yaml" in files
        generator = random.Random(11)
        conversations = [random_conversation(generator) for _ in range(100)]
        for file in files:
            model = serve(models, tmp_path / "out" / file)
            compared = 0
            for messages in conversations:
                try:
                    expected = trained.encode(messages)
                except ConversationError:
                    continue
                assert model.encode(messages) == expected
                compared += 1
            assert compared > 50
            assert set(model.stop.token_ids) == set(trained.stop.token_ids)
            assert set(trained.stop.sequences) <= set(model.stop.sequences)
            assert model.sampling() == trained.sampling()
            models.remove(model.name)
        assert notes == []
    finally:
        models.close()
