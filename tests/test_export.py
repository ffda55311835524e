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
from llmforge.jobs.prove import prove
from llmforge.models.load import save_tokenizer
from llmforge.models.source import ModelSource
from llmforge.prompt import Encoder, PromptFormat, StopRules, build_format
from llmforge.prompt.go_template import changed_by_ollama, text_in_ollama
from llmforge.serve.models import Loading, Models
from llmforge.serve.offline import stream
from test_card import FACTS
from test_prompt_real_tokenizers import load as load_tokenizer
from tiny_runs import LORA, command, run_here, tree
from tokenizer_families import FAMILIES

QUESTION = [{"role": "user", "content": "What does red mean?"}]
OPTIONS = {"temperature": 0.7, "repetition_penalty": 1.1, "max_new_tokens": 50}
# Qwen2's way of splitting text, which Ollama's converter knows.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_artifact(
    directory, base, *, format="chatml", sequences=(), options=None, lora=None, shards=None, tokenizer=None
):
    """Write an artifact of random changes to a base model: an adapter, or whole weights if `lora` is False."""
    tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(base)
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
    return write_artifact(directory, model_dir, sequences=("<|im_end|>", "\n\nUser:"), options=OPTIONS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tied_model_dir):
    """A model with all its weights, in several files."""
    return write_artifact(tmp_path_factory.mktemp("whole") / "w", tied_model_dir, lora=False, shards="60KB")


@pytest.fixture(scope="module")
def split_dir(tmp_path_factory):
    """A tiny Llama whose tokenizer Ollama's converter knows."""
    return save_model(tmp_path_factory.mktemp("split"), split=SPLIT)


@pytest.fixture(scope="module")
def known(tmp_path_factory, split_dir):
    """An adapter like `adapter`, on a model whose tokenizer Ollama's converter knows."""
    directory = tmp_path_factory.mktemp("known") / "colours"
    return write_artifact(directory, split_dir, sequences=("<|im_end|>", "\n\nUser:"), options=OPTIONS)


@pytest.fixture
def no_converter(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))


def save_sentencepiece(directory, family, new=()):
    """Save a tiny Llama with a tokenizer of one of Llama's families, and what stands for SentencePiece's own file."""
    tokenizer = FAMILIES[family]()
    build_model(len(tokenizer) + len(new)).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    (directory / "tokenizer.model").write_bytes(b"pieces")
    return directory


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
    answers = []
    for artifact in (tmp_path / "out", adapter):
        models = Models()
        model = models.add("tiny", ModelSource(str(artifact), artifact), Loading(dtype="fp32"))
        answers.append("".join(stream(model, QUESTION, {"max_new_tokens": 4, "do_sample": False})))
        models.close()
    assert answers[0] == answers[1]


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


SCALED = {"rope_theta": 250_000.0, "rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("lora", [None, False], ids=["adapter", "whole"])
@pytest.mark.parametrize("rope", [{"rope_theta": 500_000.0, "rope_type": "default"}, SCALED], ids=["theta", "scaled"])
def test_merged_says_rope_in_the_old_words_too(rope, lora, tmp_path):
    base = tmp_path / "base"
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(base)
    build_model(len(tokenizer), rope_parameters=rope).save_pretrained(base)
    artifact = write_artifact(tmp_path / "a", base, lora=lora)
    export(artifact, "merged", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == rope["rope_theta"]
    scaling = config.get("rope_scaling", {})
    assert scaling == ({"rope_type": "linear", "type": "linear", "factor": 4.0} if rope is SCALED else {})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reference = transformers.AutoModelForCausalLM.from_pretrained(base if lora is None else artifact)
    if lora is None:
        reference = peft.PeftModel.from_pretrained(reference, artifact)
    torch.testing.assert_close(logits(loaded, tokenizer), logits(reference, tokenizer), atol=1e-5, rtol=1e-5)


def test_everyone_can_read_what_everyone_can_list(adapter, tmp_path):
    export(adapter, "vllm", tmp_path / "adapter")
    export(adapter, "merged", tmp_path / "merged")
    expected = (tmp_path / "merged").stat().st_mode & 0o666
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {expected}


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


def test_modelfile(known, tmp_path, no_converter):
    export(known, "ollama", tmp_path / "out")
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


def test_modelfile_of_a_chat_template_is_inferred(split_dir, tmp_path, no_converter):
    artifact = write_artifact(tmp_path / "a", split_dir, format={"use_hf_chat_templates": True})
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


def test_sentencepieces_own_file_comes_from_the_base_model(tmp_path, no_converter):
    """And what transformers added to it from the tokenizer."""
    base = save_sentencepiece(tmp_path / "base", "Llama, legacy", new=("<turn>", "<end>"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    first = len(tokenizer)
    tokenizer.add_tokens(["<turn>", "<end>"])
    artifact = write_artifact(tmp_path / "a", base, tokenizer=tokenizer)
    assert not (artifact / "tokenizer.model").exists()
    export(artifact, "ollama", tmp_path / "out")
    assert (tmp_path / "out" / "model" / "tokenizer.model").read_bytes() == b"pieces"
    added = json.loads((tmp_path / "out" / "model" / "added_tokens.json").read_text())
    assert added == {"<turn>": first, "<end>": first + 1}


def test_ollamas_converter_is_not_trusted_with_a_tokenizer_that_it_does_not_know(tmp_path, no_converter):
    """It would take a way of splitting that is nobody's; GPT-2's, which is no expression in the file, included."""
    for name, split in (("gpt2", None), ("other", r"\p{L}+|\p{N}+|[^\p{L}\p{N}]+")):
        artifact = write_artifact(tmp_path / name, save_model(tmp_path / f"{name}-base", split=split))
        with pytest.raises(InputError, match=r"does not know how this tokenizer splits text.* set LLAMA_CPP_DIR"):
            export(artifact, "ollama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "possible"), [("Llama, legacy", True), ("Llama", False)])
def test_ollamas_converter_puts_a_space_behind_special_tokens(family, possible, tmp_path, no_converter):
    artifact = write_artifact(tmp_path / "a", save_sentencepiece(tmp_path / "base", family), format="mistral")
    if not possible:
        with pytest.raises(InputError, match="this tokenizer puts no space behind special tokens"):
            export(artifact, "ollama", tmp_path / "out")
        return
    export(artifact, "ollama", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "model" / "tokenizer_config.json").read_text())
    assert settings["add_prefix_space"] is True


def test_ollama_gets_no_chat_template_that_it_could_prefer(known, tmp_path, no_converter):
    export(known, "ollama", tmp_path / "out")
    model = tmp_path / "out" / "model"
    assert not list(model.rglob("*.jinja"))
    assert "chat_template" not in json.loads((model / "tokenizer_config.json").read_text())


def test_an_architecture_whose_prompts_ollama_writes_itself_is_refused(tmp_path):
    tokenizer = build_tokenizer(split=SPLIT)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "vocab_size": len(tokenizer)}
    config = transformers.Gemma4TextConfig(**sizes, vocab_size_per_layer_input=len(tokenizer), num_kv_shared_layers=0)
    transformers.Gemma4ForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    artifact = write_artifact(tmp_path / "a", tmp_path / "base", lora=False)
    with pytest.raises(PromptFormatError, match="Ollama writes the prompts of gemma4_text models itself"):
        export(artifact, "ollama", tmp_path / "out")


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


def test_a_file_that_lost_a_token_is_refused(adapter, tmp_path, monkeypatch):
    """As llama.cpp's converter writes the tokens that it finds in no file: `[PAD445]`."""
    trained = opened(adapter)
    lost = trained.encoder.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    tokens = [trained.encoder.tokenizer.convert_ids_to_tokens(i) for i in range(len(trained.encoder.tokenizer))]
    tokens[lost] = f"[PAD{lost}]"
    program = (
        "import sys, gguf\n"
        "writer = gguf.GGUFWriter(sys.argv[sys.argv.index('--outfile') + 1], 'llama')\n"
        "writer.add_add_bos_token(False)\n"
        f"writer.add_eos_token_id({trained.end_token()})\n"
        f"writer.add_chat_template({(adapter / 'chat_template.jinja').read_text()!r})\n"
        f"writer.add_token_list({tokens!r})\n"
        "writer.write_header_to_file()\n"
        "writer.write_kv_data_to_file()\n"
        "writer.write_tensors_to_file()\n"
        "writer.close()\n"
    )
    stand_in(tmp_path / "c", program, monkeypatch)
    with pytest.raises(
        RunError, match=rf"'\[PAD{lost}\]' as token {lost}, but the model was trained with '<|eot_id|>'"
    ):
        export(adapter, "gguf", tmp_path / "out")


def test_where_a_converter_fails_the_other_route_is_named(known, tmp_path, monkeypatch):
    stand_in(tmp_path / "c", "raise SystemExit('BPE pre-tokenizer was not recognized')", monkeypatch)
    with pytest.raises(RunError, match=r"was not recognized\nOllama converts .* export again without LLAMA_CPP_DIR"):
        export(known, "ollama", tmp_path / "out")
    unknown = write_artifact(tmp_path / "a", save_model(tmp_path / "base"))
    with pytest.raises(RunError) as error:
        export(unknown, "ollama", tmp_path / "out")
    assert "LLAMA_CPP_DIR" not in str(error.value)


@pytest.fixture
def converter(monkeypatch):
    """llama.cpp's own converter."""
    path = Path(os.environ.get("LLMFORGE_CONVERTER") or Path(__file__).parent.parent / ".cache" / "llama-cpp")
    if not (path / "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"no converter in {path}: run `make install-converter`, or set LLMFORGE_CONVERTER")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(path))


def gguf_tokenizer(path):
    fields = gguf.GGUFReader(path).fields.items()
    return {
        name.removeprefix("tokenizer."): field.contents() for name, field in fields if name.startswith("tokenizer.")
    }


@pytest.mark.real_tokenizers
@pytest.mark.parametrize("bos", ["<s>", ""])
def test_sentencepiece_models_keep_new_tokens_and_the_spaces_of_their_tokenizer(bos, tmp_path, converter):
    """Mistral's tokenizer puts a space at the beginning of a text alone, and no GGUF file can say that."""
    directory = Path(load_tokenizer("mistral_v1").name_or_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    build_model(len(tokenizer) + 2).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    shutil.copyfile(directory / "tokenizer.model", tmp_path / "base" / "tokenizer.model")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    keys = {**PROMPT_FORMATS["chatml"], "bos": bos, "system": "{instruction}\n", "default_system_message": "Hm."}
    artifact = write_artifact(
        tmp_path / "colours", tmp_path / "base", format=keys, sequences=["<|im_end|>"], tokenizer=tokenizer
    )
    exported = export(artifact, "gguf", tmp_path / "out")
    fields = gguf_tokenizer(tmp_path / "out" / "colours.gguf")
    assert fields["ggml.tokens"][32000:] == ["<|im_start|>", "<|im_end|>"]
    assert fields["ggml.eos_token_id"] == 32001
    assert fields["ggml.add_space_prefix"] is False
    assert any("this tokenizer puts a space in front of a text" in note for note in exported.notes) == (not bos)


@pytest.mark.real_tokenizers
def test_llama_cpps_own_converter(tmp_path, converter):
    """Llama 3's first release: its EOS is not what ends a turn, and llama.cpp would put a BOS of its own in front."""
    tokenizer = load_tokenizer("llama3")
    base = tmp_path / "base"
    build_model(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    artifact = write_artifact(tmp_path / "colours", base, format="llama3", sequences=("<|eot_id|>",))
    exported = export(artifact, "ollama", tmp_path / "out", dtype="bf16")
    assert exported.files == ["Modelfile", "model.gguf"]
    assert dict(read_modelfile((tmp_path / "out" / "Modelfile").read_text()))["FROM"] == "./model.gguf"

    fields = gguf_tokenizer(tmp_path / "out" / "model.gguf")
    assert "chat_template" not in fields  # which Ollama might prefer over TEMPLATE
    assert fields["ggml.add_bos_token"] is False
    assert fields["ggml.tokens"][fields["ggml.eos_token_id"]] == "<|eot_id|>"
    export(artifact, "gguf", tmp_path / "plain", dtype="bf16")
    assert gguf_tokenizer(tmp_path / "plain" / "colours.gguf") == {
        **fields,
        "chat_template": (artifact / "chat_template.jinja").read_text(),
    }
    base_model = transformers.AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(base_model, artifact).merge_and_unload().state_dict()
    tensors = gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    (tensor,) = [tensor for tensor in tensors if tensor.name == "blk.1.ffn_up.weight"]
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
    assert "stopping_tokens" not in generation  # which RayLLM does not have
    assert generation["generate_kwargs"] == {"temperature": 0.7, "max_tokens": 50}
    (application,) = yaml.safe_load((tmp_path / "out" / "serve_config.yaml").read_text())["applications"]
    (config,) = application["args"]["llm_configs"]
    assert config["model_loading_config"] == {"model_id": "colours", "model_source": rayllm.MODEL}
    (application,) = yaml.safe_load((tmp_path / "out" / "serve_config_lora.yaml").read_text())["applications"]
    (config,) = application["args"]["llm_configs"]
    assert config["lora_config"]["dynamic_lora_loading_path"].startswith("s3://")
    assert config["engine_kwargs"]["chat_template"] == (adapter / "chat_template.jinja").read_text()
    for name in ("rayllm.yaml", "serve_config.yaml", "serve_config_lora.yaml", "model_config.yaml"):
        text = (tmp_path / "out" / name).read_text()
        assert text.startswith("# `llmforge serve --config` takes this file as it is.")
        assert "# ./model into where every node finds" in text
    new = yaml.safe_load((tmp_path / "out" / "model_config_lora.yaml").read_text())
    assert new["generation_config"]["prompt_format"]["strip_whitespace"] is False
    assert new["generation_config"]["stopping_sequences"] == ["<|im_end|>", "\n\nUser:"]
    assert new["lora_config"] == config["lora_config"]
    assert any("clients of Ray Serve LLM have to send stop" in note for note in exported.notes)


def test_rays_own_schema_takes_the_serve_configs(adapter, tmp_path):
    try:
        from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
        from ray.serve.schema import ServeDeploySchema
    except ImportError as error:
        pytest.skip(f"needs ray[serve,llm], of which there is too little here: {error}")
    export(adapter, "rayllm", tmp_path / "out")
    for name in ("serve_config.yaml", "serve_config_lora.yaml"):
        content = yaml.safe_load((tmp_path / "out" / name).read_text())
        (application,) = ServeDeploySchema.model_validate(content).applications
        (config,) = (LLMConfig.model_validate(each) for each in application.args["llm_configs"])
        assert config.model_id.startswith("colours")
    for name in ("model_config.yaml", "model_config_lora.yaml"):
        content = yaml.safe_load((tmp_path / "out" / name).read_text())
        del content["generation_config"]  # the one key that the schema had once, and has no more
        assert LLMConfig.model_validate(content).model_id.startswith("colours")


def test_rayllm_is_not_given_a_second_or_a_missing_bos(tmp_path, model_dir):
    artifact = write_artifact(tmp_path / "a", model_dir, format="llama3")  # this tokenizer adds no BOS by itself
    exported = export(artifact, "rayllm", tmp_path / "out")
    assert "rayllm.yaml" not in exported.files
    assert any("rayllm.yaml is not written: RayLLM begins every text with" in note for note in exported.notes)
    assert "serve_config.yaml" in exported.files


@pytest.mark.parametrize(
    ("sequences", "why"), [(["42"], "'42' for a token id"), ([f"stop {n}" for n in range(9)], "allows 8 stopping")]
)
def test_stops_that_rayllm_cannot_express(sequences, why, tmp_path, model_dir):
    exported = export(write_artifact(tmp_path / "a", model_dir, sequences=sequences), "rayllm", tmp_path / "out")
    assert "rayllm.yaml" not in exported.files
    assert any("rayllm.yaml is not written" in note and why in note for note in exported.notes)


# --- all of them ------------------------------------------------------------------------------------------------------


def test_every_target_of_whole_weights(tmp_path, no_converter):
    base = save_model(tmp_path / "base", tie_word_embeddings=True, split=SPLIT)
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


def test_a_turn_that_ends_in_a_new_token_ends_there_in_a_gguf_file():
    tokenizer = build_tokenizer(eos="</s>")
    tokenizer.add_tokens(["<turn>", "<end>"])
    keys = {role: f"<turn>{role}\n{{instruction}}<end>\n" for role in ("system", "user", "assistant")}
    encoder = Encoder(tokenizer, PromptFormat(**keys, trailing_assistant="<turn>assistant\n"))
    stop = StopRules.derive(encoder, ("\n\n", "<end>"), [])
    trained = Trained(Path(), "x", encoder, stop, transformers.GenerationConfig(), Path())
    assert tokenizer.convert_ids_to_tokens(trained.end_token()) == "<end>"


@pytest.mark.real_tokenizers
def test_clients_of_llama_cpp_send_every_other_stop(tmp_path, converter):
    tokenizer = load_tokenizer("llama3")
    build_model(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    artifact = write_artifact(tmp_path / "a", tmp_path / "base", format="llama3", sequences=("User:",))
    notes = export(artifact, "gguf", tmp_path / "out").notes
    assert any("clients have to send stop: ['User:', '<|end_of_text|>'];" in note for note in notes)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_context_that_was_derived_limits_no_server(data_dir, model_dir, tmp_path):
    run, _ = run_here(data_dir, model_dir, lora_config=LORA)
    assert "context_length: 64  # derived" in (run.run_dir / "resolved_config.yaml").read_text()
    export(run.run_dir, "rayllm", tmp_path / "out")
    old = yaml.safe_load((tmp_path / "out" / "rayllm.yaml").read_text())
    assert old["engine_config"]["max_total_tokens"] == 2048
    assert "max_model_len" not in (tmp_path / "out" / "serve_config.yaml").read_text()


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_merged_run_is_proven_again(lora, data_dir, model_dir, tmp_path):
    run, _ = run_here(data_dir, model_dir, lora_config=lora)
    export(run.run_dir, "merged", tmp_path / "merged")
    assert "rope_theta" in json.loads((tmp_path / "merged" / "config.json").read_text())
    proof = prove(tmp_path / "merged", data=[str(data_dir / "valid.jsonl")]).proof
    assert proof.proven, proof.message()


def test_a_run_lends_its_name_and_its_context(data_dir, model_dir, tmp_path):
    run, _ = run_here(data_dir, model_dir, lora_config=LORA, context_length=64)
    export(run.run_dir, "rayllm", tmp_path / "out")
    old = yaml.safe_load((tmp_path / "out" / "rayllm.yaml").read_text())
    assert old["engine_config"]["model_id"] == "run"
    assert old["engine_config"]["max_total_tokens"] == 64
    assert "max_model_len: 64" in (tmp_path / "out" / "serve_config.yaml").read_text()
    again = export(run.artifact_dir, "rayllm", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    assert again.directory == str(tmp_path / "again")


def test_generation_options_in_ollamas_words():
    options = {"max_new_tokens": 2_000_000, "top_k": 5, "min_p": 0.05, "do_sample": True}
    expected = {"num_predict": "2000000", "top_k": "5", "min_p": "0.05"}
    assert parameters(options, 2048) == expected
    assert parameters(options, 8192) == {**expected, "num_ctx": "8192"}
    assert parameters({"do_sample": False}, None) == {"temperature": "0"}
