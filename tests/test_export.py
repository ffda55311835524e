"""Exports: what each target's software reads is what was trained.

The Modelfile's TEMPLATE is rendered by Go, and GGUF files are written by llama.cpp's own converter; `make install-dev`
and `make install-converter` install them.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import gguf
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from conftest import PROMPT_FORMATS, build_model, build_tokenizer, random_conversation, save_model
from llmforge.errors import ConversationError, InputError, ModelError, PromptFormatError, RunError
from llmforge.export.artifact import build_generation_config, write_text_side
from llmforge.export.card import merged_card, model_card
from llmforge.export.go import render_go
from llmforge.export.targets import rayllm, vllm
from llmforge.export.targets.ollama import parameters, quote
from llmforge.export.targets.trained import Trained
from llmforge.jobs.export import export
from llmforge.prompt import Encoder, PromptFormat, StopRules, build_format
from llmforge.prompt.go_template import changed_by_ollama, text_in_ollama
from llmforge.serve.engine import Engine
from test_card import FACTS
from test_prompt_real_tokenizers import load as load_tokenizer
from tiny_runs import LORA, command, run_here, tree

QUESTION = [{"role": "user", "content": "What does red mean?"}]


def write_artifact(directory, base, *, format="chatml", sequences=(), options=None, lora=None, shards=None):
    """Write an artifact of random changes to a base model: an adapter, or whole weights if `lora` is False."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    section = PROMPT_FORMATS[format] if isinstance(format, str) else format
    encoder = Encoder(tokenizer, build_format(section, tokenizer))
    stop = StopRules.derive(encoder, sequences, [])
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if lora is not False:
        torch.manual_seed(1)
        settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **(lora or {})}
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(directory, **({"max_shard_size": shards} if shards else {}))
    write_text_side(directory, encoder, stop, build_generation_config(encoder, stop, options or {}))
    (directory / "README.md").write_text(model_card(FACTS), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model_dir):
    """An adapter with a stop sequence that is no token, trained in ChatML."""
    directory = tmp_path_factory.mktemp("artifacts") / "colours"
    options = {"temperature": 0.7, "repetition_penalty": 1.1, "max_new_tokens": 50}
    return write_artifact(directory, model_dir, sequences=("<|im_end|>", "\n\nUser:"), options=options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tied_model_dir):
    """A model with all its weights, in several files."""
    return write_artifact(tmp_path_factory.mktemp("whole") / "w", tied_model_dir, lora=False, shards="60KB")


@pytest.fixture
def no_converter(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer("What does red mean? stop", return_tensors="pt")).logits


def opened(directory, **options):
    return Trained.open(directory, name="colours", cache_dir=directory.parent, **options)


# --- adapter and merged -----------------------------------------------------------------------------------------------


def test_adapter_is_plain_peft(adapter, model_dir, tmp_path):
    exported = export(adapter, "adapter", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(adapter)
    assert exported.files == sorted(tree(adapter))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    before = logits(base, tokenizer)
    assert not torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "out"), tokenizer), before)


def test_adapter_of_whole_weights_is_an_error(whole, tmp_path):
    with pytest.raises(InputError, match="trained all parameters, so there is no adapter; use --format merged"):
        export(whole, "adapter", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damaged_adapter_is_named(adapter, tmp_path):
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        export(damaged, "adapter", tmp_path / "out")


def test_merged_computes_what_base_and_adapter_compute(adapter, model_dir, tmp_path):
    export(adapter, "merged", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    reference = logits(peft.PeftModel.from_pretrained(base, adapter), tokenizer)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, tokenizer), reference, atol=1e-5, rtol=1e-5)
    for name in ("chat_template.jinja", "generation_config.json", "prompt_format.yaml", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    assert not any(name.startswith("adapter_") for name in tree(tmp_path / "out"))
    assert Engine.load(tmp_path / "out", dtype="fp32").generate([QUESTION], max_new_tokens=4, do_sample=False) == (
        Engine.load(adapter, dtype="fp32").generate([QUESTION], max_new_tokens=4, do_sample=False)
    )


def test_merged_again_is_an_artifact_of_whole_weights(adapter, tmp_path):
    export(adapter, "merged", tmp_path / "one")
    export(tmp_path / "one", "merged", tmp_path / "two")
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.parametrize("artifact", ["adapter", "whole"])
def test_merged_in_another_number_format(artifact, tmp_path, request):
    source = request.getfixturevalue(artifact)
    export(source, "merged", tmp_path / "out", dtype="bf16")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    if artifact == "whole":
        assert len(files) > 1
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        original = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, original[name].to(torch.bfloat16))


def test_the_card_of_a_merged_model_is_its_own():
    card = merged_card(model_card(FACTS))
    assert "base_model_relation: finetune" in card
    assert "library_name: transformers" in card
    assert "with a LoRA adapter merged into it, made with llmforge" in card
    assert 'model = AutoModelForCausalLM.from_pretrained(artifact)\n\nmessages = [{"role"' in card
    for adapters_own in ("PeftModel", "peft", "## Proof", "A LoRA adapter for"):
        assert adapters_own not in card.partition("## Versions")[0]


# --- places, arguments and the command --------------------------------------------------------------------------------


def test_nothing_is_overwritten(adapter, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for place in ("file", "full"):
        with pytest.raises(InputError, match="nothing is overwritten"):
            export(adapter, "merged", tmp_path / place)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert "config.json" in export(adapter, "merged", tmp_path / "empty").files


def test_no_place_in_the_model_that_is_exported(adapter):
    before = tree(adapter)
    for place in (adapter, adapter / "merged", adapter / "x" / ".." / "merged"):
        with pytest.raises(InputError, match="lies in the model that is exported"):
            export(adapter, "merged", place)
    assert tree(adapter) == before


def test_a_place_below_a_file_is_named(adapter, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = command("export", adapter, "--format", "adapter", "--to", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert "a part of the path is a file; give a place below directories" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"format": "onnx"}, "given --format onnx; allowed are adapter, merged, ollama"),
        ({"format": "merged", "dtype": "int3"}, "given --dtype int3; allowed are fp32, fp16, bf16"),
        ({"format": "adapter", "dtype": "bf16"}, "--dtype goes with --format merged"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(adapter, tmp_path, options, error):
    with pytest.raises(InputError, match=error):
        export(adapter, to=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_command(adapter, tmp_path):
    done = command("export", adapter, "--format", "vllm", "--to", tmp_path / "out", "--name", "red/blue", "--json")
    assert done.returncode == 0, done.stderr
    exported = json.loads(done.stdout)
    assert exported["format"] == "vllm"
    assert "vllm.yaml" in exported["files"]
    assert yaml.safe_load((tmp_path / "out" / "vllm.yaml").read_text())["lora-modules"] == ["red--blue=./adapter"]
    again = command("export", adapter, "--format", "vllm", "--to", tmp_path / "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert "nothing is overwritten" in again.stderr


# --- generation_config.json -------------------------------------------------------------------------------------------


def test_stop_strings_are_written_where_no_token_stands_for_them(adapter, whole):
    assert json.loads((adapter / "generation_config.json").read_text())["stop_strings"] == ["\n\nUser:"]
    assert "stop_strings" not in json.loads((whole / "generation_config.json").read_text())


def test_plain_generate_stops_at_them_or_says_what_it_needs(adapter, model_dir, tmp_path):
    export(adapter, "merged", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tokenizer("red", return_tensors="pt")
    written = model.generate(**inputs, tokenizer=tokenizer, stop_strings=None, do_sample=False, max_new_tokens=12)
    text = tokenizer.decode(written[0])
    stop = text[len("red") + 4 : len("red") + 6]
    model.generation_config.stop_strings = [stop]
    cut = model.generate(**inputs, tokenizer=tokenizer, do_sample=False, max_new_tokens=12)
    assert stop in tokenizer.decode(cut[0])
    assert cut.shape[1] < written.shape[1]
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(**inputs)


# --- ollama -----------------------------------------------------------------------------------------------------------


def read_modelfile(text):
    """Read a Modelfile by the rules of Ollama's parser: a value ends at the line break behind its closing quotes."""
    commands, rest = [], text
    while rest := rest.lstrip(" \t\r\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, _, rest = rest.partition(" ")
        if name == "PARAMETER":
            name, _, rest = rest.partition(" ")
        end = 0
        while True:
            breaks = [place for place in (rest.find("\n", end), len(rest)) if place >= end]
            end = min(breaks)
            value = "".join(c for c in rest[:end] if c.isprintable() or c in "\t\r\n").strip()
            quotes = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
            if not quotes or (len(value) >= 2 * len(quotes) and value.endswith(quotes)):
                break
            assert end < len(rest), "the last value is not closed"
            end += 1
        commands.append((name, value[len(quotes) : len(value) - len(quotes)]))
        rest = rest[end:]
    return commands


def test_modelfile(adapter, tmp_path, no_converter):
    export(adapter, "ollama", tmp_path / "out")
    (source, template, *parameters) = read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert source == ("FROM", "./model")
    assert parameters == [
        ("stop", "<|im_end|>"),
        ("stop", "\n\nUser:"),
        ("num_predict", "50"),
        ("temperature", "0.7"),
        ("repeat_penalty", "1.1"),
        ("repeat_last_n", "-1"),
    ]
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    settings = json.loads((tmp_path / "out" / "model" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is False
    generator = random.Random(1)
    conversations = [random_conversation(generator) for _ in range(200)]
    conversations = [messages for messages in conversations if not changed_by_ollama(messages)]
    texts = render_go(template[1], conversations)
    assert texts == [
        text_in_ollama(PromptFormat(**PROMPT_FORMATS["chatml"]), conversation) for conversation in conversations
    ]


def test_modelfile_of_a_chat_template_is_inferred(model_dir, tmp_path, no_converter):
    artifact = write_artifact(tmp_path / "a", model_dir, format={"use_hf_chat_templates": True})
    export(artifact, "ollama", tmp_path / "out")
    template = dict(read_modelfile((tmp_path / "out" / "Modelfile").read_text()))["TEMPLATE"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact)
    conversation = [{"role": "system", "content": "Hm."}, *QUESTION, {"role": "assistant", "content": "x"}, *QUESTION]
    assert render_go(template, [conversation]) == [
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    ]


def test_a_chat_template_that_plain_templates_cannot_express_says_why(model_dir, tmp_path):
    dated = "{{ strftime_now('%d %B %Y') }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    artifact = write_artifact(tmp_path / "a", model_dir, format={"chat_template": dated})
    with pytest.raises(PromptFormatError, match=r"cannot be written as such: .*date.*--format merged or vllm"):
        export(artifact, "ollama", tmp_path / "out")


def test_sentencepieces_own_file_comes_from_the_base_model(model_dir, tmp_path, no_converter):
    base = shutil.copytree(model_dir, tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"pieces")
    artifact = write_artifact(tmp_path / "a", base)
    assert not (artifact / "tokenizer.model").exists()
    export(artifact, "ollama", tmp_path / "out")
    assert (tmp_path / "out" / "model" / "tokenizer.model").read_bytes() == b"pieces"


def test_quotes_keep_a_value_or_say_that_they_cannot():
    for value in ("a", " a ", '"', 'a"b', '""" x', "\n\n", "\t", "é", "{{ .Prompt }}", "# no comment"):
        assert read_modelfile(f"FROM x\nPARAMETER stop {quote(value)}\nPARAMETER top_k 3\n") == [
            ("FROM", "x"),
            ("stop", value),
            ("top_k", "3"),
        ]
    for value in ("\x00", "a\xa0b", "\ufeff", '"""\nx', '""" \n'):
        with pytest.raises(PromptFormatError, match="Ollama's Modelfile cannot hold"):
            quote(value)


# --- gguf -------------------------------------------------------------------------------------------------------------


def test_without_converter_the_error_says_how_to_get_it(adapter, tmp_path, no_converter, monkeypatch):
    with pytest.raises(InputError, match=r"convert_hf_to_gguf.py.* set LLAMA_CPP_DIR to its directory"):
        export(adapter, "gguf", tmp_path / "out")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"which has no convert_hf_to_gguf.py; give a llama.cpp directory"):
        export(adapter, "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def stand_in(directory, program, monkeypatch):
    """Put a program in the converter's place."""
    directory.mkdir()
    (directory / "convert_hf_to_gguf.py").write_text(program)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(directory))


def test_a_converter_that_fails_is_quoted(adapter, tmp_path, monkeypatch):
    stand_in(tmp_path / "c", "raise SystemExit('BPE pre-tokenizer was not recognized')", monkeypatch)
    with pytest.raises(RunError, match=r"could not convert the model; it said:\n  BPE pre-tokenizer was not"):
        export(adapter, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_without_the_chat_template_is_refused(adapter, tmp_path, monkeypatch):
    program = (
        "import sys, gguf\n"
        "writer = gguf.GGUFWriter(sys.argv[sys.argv.index('--outfile') + 1], 'llama')\n"
        "writer.add_add_bos_token(False)\n"
        "writer.write_header_to_file()\n"
        "writer.write_kv_data_to_file()\n"
        "writer.write_tensors_to_file()\n"
        "writer.close()\n"
    )
    stand_in(tmp_path / "c", program, monkeypatch)
    with pytest.raises(RunError, match=r"tokenizer.chat_template = None, but the model was trained with '\{%- set"):
        export(adapter, "gguf", tmp_path / "out")


@pytest.mark.real_tokenizers
def test_llama_cpps_own_converter(tmp_path, monkeypatch):
    """Llama 3's first release: its EOS is not what ends a turn, and llama.cpp would put a BOS of its own in front."""
    converter = Path(os.environ.get("LLMFORGE_CONVERTER") or Path(__file__).parent.parent / ".cache" / "llama-cpp")
    if not (converter / "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"no converter in {converter}: run `make install-converter`, or set LLMFORGE_CONVERTER")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(converter))
    tokenizer = load_tokenizer("llama3")
    base = tmp_path / "base"
    build_model(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    artifact = write_artifact(tmp_path / "colours", base, format="llama3", sequences=("<|eot_id|>",))
    exported = export(artifact, "ollama", tmp_path / "out", dtype="bf16")
    assert exported.files == ["Modelfile", "model.gguf"]
    assert dict(read_modelfile((tmp_path / "out" / "Modelfile").read_text()))["FROM"] == "./model.gguf"

    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    assert fields["tokenizer.chat_template"] == (artifact / "chat_template.jinja").read_text()
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eos_token_id"]] == "<|eot_id|>"
    base_model = transformers.AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(base_model, artifact).merge_and_unload().state_dict()
    (tensor,) = [tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight"]
    up = torch.from_numpy(tensor.data.view("int16").copy()).view(torch.bfloat16)
    assert torch.equal(up, merged["model.layers.1.mlp.up_proj.weight"].to(torch.bfloat16))


# --- vllm -------------------------------------------------------------------------------------------------------------


def test_vllm_serves_the_adapter_where_it_can(adapter, model_dir, tmp_path):
    exported = export(adapter, "vllm", tmp_path / "out", name="colours")
    config = yaml.safe_load((tmp_path / "out" / "vllm.yaml").read_text())
    assert config == {
        "model": str(model_dir),
        "tokenizer": "./adapter",
        "enable-lora": True,
        "max-lora-rank": 8,
        "lora-modules": ["colours=./adapter"],
        "generation-config": "./adapter",
        "chat-template": "./chat_template.jinja",
        "chat-template-content-format": "string",
    }
    assert any('{"stop": ["\\n\\nUser:"]}' in note for note in exported.notes)
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (adapter / "chat_template.jinja").read_bytes()
    assert vllm.command(config) in (tmp_path / "out" / "README.md").read_text()
    assert "--enable-lora --max-lora-rank 8 --lora-modules colours=./adapter" in vllm.command(config)


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, False])
def test_vllm_gets_merged_weights_otherwise(model_dir, tmp_path, lora):
    artifact = write_artifact(tmp_path / "a", model_dir, lora=lora)
    exported = export(artifact, "vllm", tmp_path / "out", name="colours")
    config = yaml.safe_load((tmp_path / "out" / "vllm.yaml").read_text())
    assert (config["model"], config["served-model-name"], config["generation-config"]) == (
        "./model",
        "colours",
        "./model",
    )
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert any("modules_to_save" in note if lora else "holds all its weights" in note for note in exported.notes)


# --- rayllm -----------------------------------------------------------------------------------------------------------


def rayllm_text(section, messages):
    """Render as RayLLM does: an independent restatement of its `PromptFormat.generate_prompt`."""
    assert set(section) == {
        *("system", "user", "assistant", "trailing_assistant", "default_system_message", "system_in_user"),
        *("strip_whitespace", "add_system_tags_even_if_message_is_empty"),
    }
    clean = str.strip if section["strip_whitespace"] else str
    always = section["add_system_tags_even_if_message_is_empty"]
    systems = [message["content"] for message in messages if message["role"] == "system"]
    if not systems and (section["default_system_message"] or always):
        systems = [section["default_system_message"]]
    text, waiting = "", systems
    if systems and not section["system_in_user"] and (systems[0] or always):
        text = section["system"].format(instruction=clean(systems[0]))
    for message in messages:
        if message["role"] == "user" and section["system_in_user"]:
            inner = section["system"].format(instruction=waiting[0]) if waiting else ""
            text += section["user"].format(instruction=clean(message["content"]), system=inner)
            waiting = []
        elif message["role"] != "system":
            text += section[message["role"]].format(instruction=clean(message["content"]))
    return text + section["trailing_assistant"]


def expressible_in_rayllm(format, messages):
    """RayLLM writes tags around an empty system message inside a user turn, and around one that is blank."""
    systems = [message["content"] for message in messages if message["role"] == "system"]
    if any(message["role"] == "assistant" and not message["content"] for message in messages):
        return False
    return not systems or bool(systems[0].strip() if format.strip_whitespace else systems[0])


HOSTILE_BRACES = {
    "system": "{system}{{}} {instruction} {",
    "user": '}{instruction}{"role": "user"}{0}',
    "assistant": "{a}{instruction}{{instruction}}",
    "trailing_assistant": "{{",
    "add_system_tags_even_if_message_is_empty": True,
}


@pytest.mark.parametrize("keys", [*PROMPT_FORMATS.values(), HOSTILE_BRACES], ids=[*PROMPT_FORMATS, "braces"])
def test_rayllm_renders_what_was_trained(keys):
    format = PromptFormat(**keys)
    if format.strip_whitespace and format.system_in_user:
        with pytest.raises(PromptFormatError, match="RayLLM does not strip the system message"):
            rayllm.rayllm_prompt_format(format, format.bos)
        return
    section = rayllm.rayllm_prompt_format(format, format.bos)
    assert section["strip_whitespace"] is format.strip_whitespace
    generator = random.Random(5)
    compared = 0
    for _ in range(400):
        messages = random_conversation(generator)
        if not expressible_in_rayllm(format, messages):
            continue
        try:
            expected = format.render(messages)
        except ConversationError:
            continue
        assert format.bos + rayllm_text(section, messages) == expected
        compared += 1
    assert compared > 200
    if keys is not HOSTILE_BRACES:
        assert PromptFormat(**section, bos=format.bos) == format


def test_rayllm_files(adapter, tmp_path):
    exported = export(adapter, "rayllm", tmp_path / "out", name="colours")
    old = yaml.safe_load((tmp_path / "out" / "rayllm.yaml").read_text())
    generation = old["engine_config"]["generation"]
    assert generation["prompt_format"]["strip_whitespace"] is False
    assert generation["stopping_sequences"] == ["<|im_end|>", "\n\nUser:"]
    assert generation["stopping_tokens"] == list(opened(adapter).stop.token_ids)
    assert generation["generate_kwargs"] == {"temperature": 0.7, "max_tokens": 50}
    (application,) = yaml.safe_load((tmp_path / "out" / "ray_serve_llm.yaml").read_text())["applications"]
    (config,) = application["args"]["llm_configs"]
    assert config["model_loading_config"] == {"model_id": "colours", "model_source": rayllm.MODEL}
    (application,) = yaml.safe_load((tmp_path / "out" / "ray_serve_llm_lora.yaml").read_text())["applications"]
    (config,) = application["args"]["llm_configs"]
    assert config["lora_config"]["dynamic_lora_loading_path"].startswith("s3://")
    assert config["engine_kwargs"]["chat_template"] == (adapter / "chat_template.jinja").read_text()
    for name in ("rayllm.yaml", "ray_serve_llm.yaml", "ray_serve_llm_lora.yaml"):
        assert (tmp_path / "out" / name).read_text().startswith("# Placeholders: /path/on/every/node/model")
    assert any("clients of Ray Serve LLM have to send stop" in note for note in exported.notes)


def test_rayllm_is_not_given_a_second_or_a_missing_bos(tmp_path, model_dir):
    artifact = write_artifact(tmp_path / "a", model_dir, format="llama3")  # this tokenizer adds no BOS by itself
    exported = export(artifact, "rayllm", tmp_path / "out")
    assert "rayllm.yaml" not in exported.files
    assert any("rayllm.yaml is not written: RayLLM begins every text with" in note for note in exported.notes)
    assert "ray_serve_llm.yaml" in exported.files


# --- all of them ------------------------------------------------------------------------------------------------------


def test_every_target_of_whole_weights(tmp_path, no_converter):
    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    artifact = write_artifact(tmp_path / "colours", base, lora=False)
    for target in ("merged", "ollama", "vllm", "rayllm"):
        exported = export(artifact, target, tmp_path / target)
        assert exported.notes
        weights = [file for file in exported.files if file.endswith(".safetensors")]
        assert len(weights) == 1
        assert (tmp_path / target / weights[0]).read_bytes() == (artifact / "model.safetensors").read_bytes()


def test_the_name_that_the_tokenizer_ends_turns_with_goes_into_the_file():
    tokenizer = build_tokenizer(eos="</s>")
    encoder = Encoder(tokenizer, PromptFormat(**PROMPT_FORMATS["llama3"]))
    stop = StopRules.derive(encoder, (), [])
    trained = Trained(Path(), "x", encoder, stop, transformers.GenerationConfig(), Path())
    assert tokenizer.convert_ids_to_tokens(trained.end_token()) == "<|eot_id|>"
    assert trained.stop_texts() == ["</s>", "<|eot_id|>"]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_lends_its_name_and_its_context(data_dir, model_dir, tmp_path):
    run, _ = run_here(data_dir, model_dir, lora_config=LORA, context_length=64)
    export(run.run_dir, "rayllm", tmp_path / "out")
    old = yaml.safe_load((tmp_path / "out" / "rayllm.yaml").read_text())
    assert old["engine_config"]["model_id"] == "run"
    assert old["engine_config"]["max_total_tokens"] == 64
    again = export(run.artifact_dir, "rayllm", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    assert again.directory == str(tmp_path / "again")


def test_generation_options_in_ollamas_words():
    options = {"max_new_tokens": 2_000_000, "top_k": 5, "min_p": 0.05, "do_sample": True}
    expected = {"num_predict": "2000000", "top_k": "5", "min_p": "0.05"}
    assert parameters(options, 2048) == expected
    assert parameters(options, 8192) == {**expected, "num_ctx": "8192"}
    assert parameters({"do_sample": False}, None) == {"temperature": "0"}
