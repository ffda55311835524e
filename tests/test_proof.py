"""The proof that what is served is what was trained: it holds for good runs, and catches the field's old bugs."""

import json
import os
import secrets
import shutil
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import chat_templates
import llmforge.export.prove_text as prove_text_module
import llmforge.train.run as training
from conftest import CHATML_TEMPLATE, PROMPT_FORMATS, build_tokenizer, conversation_rows, save_model, write_jsonl
from llmforge.config import load_config
from llmforge.data.samples import Sample
from llmforge.errors import DataError, InputError, ModelError, PromptFormatError, ProofError
from llmforge.export.artifact import build_generation_config, write_text_side
from llmforge.export.fingerprint import other_numbers, trained_numbers
from llmforge.export.proof import Proof
from llmforge.export.prove_text import Row, prove_text
from llmforge.jobs.export import export
from llmforge.jobs.finetune import finetune, resume
from llmforge.jobs.prove import check_prompts, prove
from llmforge.models.adapter import add_lora
from llmforge.models.device import DTYPES
from llmforge.models.trained import load_trained_model
from llmforge.prompt import ChatTemplate, Encoder, Format, PromptFormat, StopRules
from llmforge.tasks import CausalLM, InstructionTuning
from llmforge.tasks.language_modeling import Batch, PackedBatch
from tiny_runs import LORA, Listener, command, run_here, write_config

CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What does red mean?"},
    {"role": "assistant", "content": "stop"},
    {"role": "user", "content": "And green?"},
    {"role": "assistant", "content": "go"},
]
ROWS = [{"messages": CONVERSATION}, *conversation_rows(11)]


def text_proof(
    directory: Path,
    format: Format,
    tokenizer: Any,
    *,
    spoil: Any = lambda samples: samples,
    task: Any = InstructionTuning,
    trains_with: Encoder | None = None,
    rows: list[dict] = ROWS,
    stop: StopRules | None = None,
) -> Proof:
    """Prove a format's text side; `spoil` changes samples as a bug would, `trains_with` encodes them otherwise."""
    served = Encoder(tokenizer, format)
    encoder = trains_with or served
    stop = stop or StopRules.derive(served, [], [])
    directory.mkdir(exist_ok=True)
    write_text_side(directory, served, stop, build_generation_config(served, stop, {}))
    task = task(pad_token_id=tokenizer.pad_token_id or 0, pad_to=None)
    encoded = encoder.encode_conversations(rows, task.trained)
    proven = [
        Row(f"rows.jsonl:{number}", row, spoil(samples))
        for number, (row, samples) in enumerate(zip(rows, encoded, strict=True), 1)
    ]
    return prove_text(directory, encoder=encoder, stop=stop, task=task, rows=proven)


def only_failure(proof: Proof) -> dict[str, Any]:
    (failure,) = proof.failures()
    return failure


def codes(proof: Proof) -> list[str]:
    return [f"{failure['check']}/{failure['code']}" for failure in proof.failures()]


def message(proof: Proof, code: str) -> str:
    return next(failure["message"] for failure in proof.failures() if failure["code"] == code)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(path: Path, change: Any) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without_effect(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give an adapter whose product is nothing."""
    return {name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}


def reweighted(samples: list[Sample], change: Any) -> list[Sample]:
    """Give samples whose weights are changed by a function of ids and weights."""
    return [Sample(sample.input_ids, change(list(sample.input_ids), list(sample.loss_weights))) for sample in samples]


@pytest.fixture(scope="module")
def chatml():
    return build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE)


@pytest.mark.parametrize("name", PROMPT_FORMATS)
@pytest.mark.parametrize("task", [InstructionTuning, CausalLM])
def test_good_formats_are_proven(name: str, task: Any, tmp_path: Path) -> None:
    end = {"llama3": "<|eot_id|>", "gemma2": "<end_of_turn>", "chatml": "<|im_end|>", "llama_guard2": "<|eot_id|>"}
    proof = text_proof(
        tmp_path, PromptFormat(**PROMPT_FORMATS[name]), build_tokenizer(eos=end.get(name, "</s>")), task=task
    )
    assert proof.proven, proof.message()
    parity, mask, stop = (proof.sections[section] for section in ("parity", "mask", "stop"))
    assert parity["prompts"] > 350
    assert parity["differences"] == 0
    assert parity["targets"] == ["chat_template", "ollama"]
    assert parity["prompts_by_ollama"] > 60
    tokens = mask["tokens"]
    assert tokens["pad"] > 0
    assert tokens["truncated"] == 0
    if task is InstructionTuning:
        assert mask["turns"] == mask["turns_exact"] == stop["turns"] == stop["end_in_stop_token"] == 13
        assert tokens["end of turn"] >= 13
        assert tokens["prompt"] > tokens["trained"] > 13


def test_a_turn_of_weight_0_in_a_history_that_is_rewritten_is_no_difference(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=chat_templates.THINKING)
    thoughts = "<think>\nhm\n</think>\n\nred"
    messages = [
        {"role": "user", "content": "stop?"},
        {"role": "assistant", "content": thoughts, "weight": 0},
        {"role": "user", "content": "wait?"},
        {"role": "assistant", "content": thoughts},
    ]
    format = ChatTemplate(chat_templates.THINKING, tokenizer, True)
    proof = text_proof(tmp_path, format, tokenizer, rows=[{"messages": messages}])
    assert proof.proven, proof.message()
    assert proof.sections["mask"]["turns"] == 1


def test_a_modelfile_that_renders_otherwise_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler with a bug: the TEMPLATE lacks the line break behind the end of a turn."""
    compiled = prove_text_module.compile_to_go_template
    monkeypatch.setattr(
        prove_text_module,
        "compile_to_go_template",
        lambda format: compiled(format).replace("<|im_end|>\\n", "<|im_end|>"),
    )
    failure = only_failure(
        text_proof(tmp_path, PromptFormat(**PROMPT_FORMATS["chatml"]), build_tokenizer(eos="<|im_end|>"))
    )
    assert (failure["check"], failure["code"]) == ("parity", "ollama_differs")
    assert "trained on: " in failure["message"]


def test_every_token_of_a_row_has_its_reason(chatml: Any, tmp_path: Path) -> None:
    weightless = [{**message, "weight": 0} if message["content"] == "stop" else message for message in CONVERSATION]
    proof = text_proof(tmp_path, ChatTemplate(CHATML_TEMPLATE, chatml, True), chatml, rows=[{"messages": weightless}])
    assert proof.proven
    encoder = Encoder(chatml, ChatTemplate(CHATML_TEMPLATE, chatml, True))
    (pieces,) = encoder.explain([{"messages": weightless}], "assistant")[0]
    count = {reason: sum(len(p.input_ids) for p in pieces if p.reason == reason) for reason in ("prompt", "weight 0")}
    tokens = proof.sections["mask"]["tokens"]
    assert tokens["prompt"] == count["prompt"]
    assert tokens["weight 0"] == count["weight 0"] > 0
    assert tokens["end of turn"] == 2  # <|im_end|> and the line break behind it
    assert proof.sections["mask"]["turns"] == 1


class TestOldBugs:
    """Each of these has shipped in a tool of the field; each is caught, by its own name, before training."""

    def test_a_second_bos(self, tmp_path: Path) -> None:
        tokenizer = build_tokenizer()

        class Doubles(Encoder):
            def _tokenize(self, texts: list[str]) -> list[list[int]]:
                return [[tokenizer.bos_token_id, *ids] if text.startswith("<s>") else ids
                        for text, ids in zip(texts, super()._tokenize(texts), strict=True)]  # fmt: skip

        format = PromptFormat(**PROMPT_FORMATS["mistral"])
        proof = text_proof(tmp_path, format, tokenizer, trains_with=Doubles(tokenizer, format))
        assert {failure["code"] for failure in proof.failures()} == {"second_bos"}
        message = proof.failures()[0]["message"]
        assert "a second BOS" in message
        shown = [failure["message"] for failure in proof.failures()] + [f.message for f in proof.findings]
        assert any("trained on: 0 '<s>' | 0 '<s>'" in text and "served:     0 '<s>' | " in text for text in shown)

    def test_a_second_bos_that_training_and_serving_agree_on(self, tmp_path: Path) -> None:
        rows = [{"messages": [{"role": "user", "content": "<s>Hello"}, {"role": "assistant", "content": "go</s>"}]}]
        passed = dict.fromkeys(("system", "user", "assistant"), "{instruction}")
        format = PromptFormat(**passed, trailing_assistant="", bos="<s>")
        failure = only_failure(text_proof(tmp_path, format, build_tokenizer(), rows=rows))
        assert (failure["check"], failure["code"]) == ("parity", "second_bos")
        assert "rows.jsonl:1: a second BOS: the sample begins with '<s>' twice" in failure["message"]

    def test_an_end_of_turn_that_is_not_trained(self, chatml: Any, tmp_path: Path) -> None:
        end = chatml.convert_tokens_to_ids("<|im_end|>")

        def untrain(ids: list[int], weights: list[float]) -> list[float]:
            return [0.0 if token == end else weight for token, weight in zip(ids, weights, strict=True)]

        format = ChatTemplate(CHATML_TEMPLATE, chatml, True)
        proof = text_proof(tmp_path, format, chatml, spoil=lambda samples: reweighted(samples, untrain))
        failure = only_failure(proof)
        assert (failure["check"], failure["code"], failure["count"]) == ("mask", "end_untrained", 12)
        assert "the end of a turn is not trained, so the model will not learn to stop" in failure["message"]
        assert f"» {end} '<|im_end|>' «" in failure["message"]

    def test_padding_that_swallows_the_end(self, tmp_path: Path) -> None:
        tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE)
        tokenizer.pad_token = tokenizer.eos_token

        class MasksPadding(InstructionTuning):
            def collate(self, samples: Any) -> Batch:
                batch = super().collate(samples)
                return replace(
                    batch, loss_weights_BT=batch.loss_weights_BT.masked_fill(batch.input_ids_BT == self.pad_token_id, 0)
                )

        format = ChatTemplate(CHATML_TEMPLATE, tokenizer, True)
        assert text_proof(tmp_path, format, tokenizer).proven  # our own padding does not
        failure = only_failure(text_proof(tmp_path, format, tokenizer, task=MasksPadding))
        assert (failure["check"], failure["code"], failure["count"]) == ("mask", "pad_is_eos", 12)
        assert "'<|im_end|>' ends a turn and is the padding token too" in failure["message"]

    def test_a_response_marker_that_tokenises_otherwise_in_context(self, tmp_path: Path) -> None:
        """The ids of "## A" alone are looked for in a text that has them behind a "#"."""
        tokenizer = build_tokenizer()
        format = PromptFormat(
            system="{instruction}\n", user="{instruction}## A", assistant="{instruction}</s>",
            trailing_assistant="",
        )  # fmt: skip
        marker = tokenizer("## A", add_special_tokens=False)["input_ids"]

        def behind_marker(ids: list[int], weights: list[float]) -> list[float]:
            found = [n for n in range(len(ids)) if ids[n : n + len(marker)] == marker]
            start = found[-1] + len(marker) if found else len(ids)
            return [float(n >= start) for n in range(len(ids))]

        rows = conversation_rows(5)
        for row in rows:
            row["messages"][0]["content"] += " In C#"
        inside = tokenizer("In C### A", add_special_tokens=False)["input_ids"]
        assert inside[-len(marker) :] != marker
        failure = only_failure(
            text_proof(tmp_path, format, tokenizer, rows=rows, spoil=lambda samples: reweighted(samples, behind_marker))
        )
        assert (failure["check"], failure["code"], failure["count"]) == ("mask", "nothing_trained", 5)
        assert "no token of it is trained, though an assistant turn should be" in failure["message"]

    def test_a_prompt_token_that_is_trained(self, chatml: Any, tmp_path: Path) -> None:
        format = ChatTemplate(CHATML_TEMPLATE, chatml, True)
        proof = text_proof(
            tmp_path, format, chatml,
            spoil=lambda samples: reweighted(samples, lambda ids, weights: [0.0] + [1.0] * (len(ids) - 1)),
        )  # fmt: skip
        failure = only_failure(proof)
        assert (failure["check"], failure["code"]) == ("mask", "prompt_trained")

    def test_a_turn_that_ends_in_nothing(self, chatml: Any, tmp_path: Path) -> None:
        format = PromptFormat(**{**PROMPT_FORMATS["chatml"], "assistant": "<|im_start|>assistant\n{instruction}\n"})
        failure = only_failure(text_proof(tmp_path, format, chatml))
        assert (failure["check"], failure["code"], failure["count"]) == ("stop", "no_stop", 13)
        assert "ends in 'stop\\n', and generation ends only at '<|im_end|>' (4): the model will not stop" in str(
            failure["message"]
        )

    def test_a_stop_that_the_export_lacks(self, chatml: Any, tmp_path: Path) -> None:
        format = ChatTemplate(CHATML_TEMPLATE, chatml, True)
        encoder, stop = Encoder(chatml, format), StopRules(token_ids=(4,))
        text_proof(tmp_path, format, chatml)
        config = json.loads((tmp_path / "generation_config.json").read_text())
        (tmp_path / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
        task = InstructionTuning(pad_token_id=2, pad_to=None)
        proof = prove_text(tmp_path, encoder=encoder, stop=stop, task=task, rows=[])
        assert codes(proof) == ["stop/export_lacks_stop", "stop/export_stops_early"]
        assert "eos_token_id 1, without [4], at which the format ends a turn" in message(proof, "export_lacks_stop")

    @pytest.mark.parametrize("ends", [[4, 100], [4, 4.5], [4, "</s>"]])
    def test_a_stop_that_only_the_export_has(self, ends: list, chatml: Any, tmp_path: Path) -> None:
        format = ChatTemplate(CHATML_TEMPLATE, chatml, True)
        text_proof(tmp_path, format, chatml)
        edit_json(tmp_path / "generation_config.json", eos_token_id=ends)
        task = InstructionTuning(pad_token_id=2, pad_to=None)
        proof = prove_text(
            tmp_path, encoder=Encoder(chatml, format), stop=StopRules(token_ids=(4,)), task=task, rows=[]
        )
        assert codes(proof) == ["stop/export_stops_early"]
        assert f"with {ends[1:]}, at which nothing ended in training" in message(proof, "export_stops_early")

    @pytest.mark.parametrize("content", ["[]", "null", "{", None])
    def test_a_generation_config_that_is_none(self, content: str | None, chatml: Any, tmp_path: Path) -> None:
        format = ChatTemplate(CHATML_TEMPLATE, chatml, True)
        text_proof(tmp_path, format, chatml)
        (tmp_path / "generation_config.json").unlink()
        if content is not None:
            (tmp_path / "generation_config.json").write_text(content)
        task = InstructionTuning(pad_token_id=2, pad_to=None)
        encoder, stop = Encoder(chatml, format), StopRules(token_ids=(4,))
        assert codes(prove_text(tmp_path, encoder=encoder, stop=stop, task=task, rows=[])) == [
            "stop/no_generation_config"
        ]

    def test_attention_that_is_masked_by_the_padding_token(self, tmp_path: Path) -> None:
        tokenizer = build_tokenizer(eos="<|im_end|>", chat_template=CHATML_TEMPLATE)
        tokenizer.pad_token = tokenizer.eos_token

        class MasksAttention(InstructionTuning):
            def collate(self, samples: Any) -> Batch:
                batch = super().collate(samples)
                return replace(batch, attention_mask_BT=(batch.input_ids_BT != self.pad_token_id).long())

        format = ChatTemplate(CHATML_TEMPLATE, tokenizer, True)
        failure = only_failure(text_proof(tmp_path, format, tokenizer, task=MasksAttention))
        assert (failure["check"], failure["code"], failure["count"]) == ("mask", "unattended", 12)
        assert "tokens of a sample are hidden from attention, as if they were padding" in failure["message"]

    @pytest.mark.parametrize(
        ("old", "new", "key"),
        [("im_start|>user", "im_start|>User", "user"), ("stopping_tokens:\n- 4", "stopping_tokens: []", "token_ids")],
    )
    def test_a_format_file_that_says_something_else(
        self, old: str, new: str, key: str, chatml: Any, tmp_path: Path
    ) -> None:
        format = PromptFormat(**PROMPT_FORMATS["chatml"])
        text_proof(tmp_path, format, chatml)
        path = tmp_path / "prompt_format.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        task = InstructionTuning(pad_token_id=2, pad_to=None)
        encoder, stop = Encoder(chatml, format), StopRules(token_ids=(4,))
        failure = only_failure(prove_text(tmp_path, encoder=encoder, stop=stop, task=task, rows=[]))
        assert (failure["check"], failure["code"]) == ("parity", "format_differs")
        assert f"prompt_format.yaml is not the format of training, in {key}: " in failure["message"]

    def test_a_template_that_writes_a_stop_inside_the_turn(self, tmp_path: Path) -> None:
        tokenizer = build_tokenizer()
        template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}"
            "A:{% if m.reasoning_content %}{{ m.reasoning_content }}</s>{% endif %}{{ m.content }}</s>"
            "{% else %}{{ m.role }}:{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
        )
        question = {"role": "user", "content": "red?"}
        thinks = {"role": "assistant", "content": "stop", "reasoning_content": "lights"}
        says = {"role": "assistant", "content": "lights</s>stop"}
        format = ChatTemplate(template, tokenizer, False)
        failure = only_failure(text_proof(tmp_path, format, tokenizer, rows=[{"messages": [question, thinks]}]))
        assert (failure["check"], failure["code"]) == ("stop", "stops_inside")
        assert "generation ends at '</s>', which the format writes inside the turn, in front of 'stop</s>'" in str(
            failure["message"]
        )
        proof = text_proof(tmp_path, format, tokenizer, rows=[{"messages": [question, says]}])
        assert proof.proven, proof.message()  # the row's own
        assert any("1 of 1 trained turns hold a stop inside the assistant's own text" in note for note in proof.remarks)

    def test_a_stop_between_two_calls(self, tmp_path: Path) -> None:
        tokenizer = build_tokenizer()
        template = (
            "{% for m in messages %}{{ m.role }}:{% if m.tool_calls %}"
            "{% for c in m.tool_calls %}<call>{{ c.function.name }}{{ c.function.arguments }}</call>{% endfor %}"
            "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        )
        calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in ("light", "sound")]
        rows = [
            {"messages": [{"role": "user", "content": "on"}, {"role": "assistant", "content": "", "tool_calls": some}]}
            for some in (calls[:1], calls)
        ]
        format = ChatTemplate(template, tokenizer, False)
        stop = StopRules(sequences=("</call>",), token_ids=(1,))
        proof = text_proof(tmp_path, format, tokenizer, rows=rows, stop=stop)
        failure = only_failure(proof)
        assert (failure["code"], failure["count"]) == ("stops_inside", 1)
        assert failure["message"].startswith("rows.jsonl:2, assistant turn 1: generation ends at '</call>'")
        assert text_proof(tmp_path, format, tokenizer, rows=rows).proven


@pytest.mark.parametrize("place", range(0, len(CHATML_TEMPLATE), 7))
def test_a_template_of_which_one_character_is_changed_does_not_pass_as_itself(
    place: int, chatml: Any, tmp_path: Path
) -> None:
    mutated = CHATML_TEMPLATE[:place] + chr(ord(CHATML_TEMPLATE[place]) ^ 1) + CHATML_TEMPLATE[place + 1 :]
    format = ChatTemplate(CHATML_TEMPLATE, chatml, True)
    text_proof(tmp_path, format, chatml)
    (tmp_path / "chat_template.jinja").write_text(mutated)
    task = InstructionTuning(pad_token_id=2, pad_to=None)
    encoder = Encoder(chatml, format)
    (samples,) = encoder.encode_conversations(ROWS[:1], "assistant")
    try:
        proof = prove_text(
            tmp_path, encoder=encoder, stop=StopRules(token_ids=(4,)), task=task, rows=[Row("r:1", ROWS[0], samples)]
        )
    except PromptFormatError:
        return  # no Jinja any more
    assert not proof.proven


class TestARun:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A run directory with an adapter that learned something."""
        directory = tmp_path_factory.mktemp("proven")
        write_jsonl(directory / "train.jsonl", conversation_rows(48))
        write_jsonl(directory / "valid.jsonl", conversation_rows(12, seed=1))
        model = save_model(directory / "model")
        run, listener = run_here(
            directory,
            model,
            lora_config=LORA,
            learning_rate=1e-2,
            num_epochs=4,
            valid_path=str(directory / "valid.jsonl"),
        )
        assert listener.of("proof", "proven") == [True]
        assert listener.of("finished", "proven") == [True]
        return run.run_dir

    @pytest.fixture
    def artifact(self, run: Path, tmp_path: Path) -> Path:
        """A copy of its artifact, away from the run."""
        shutil.copytree(run / "artifact", tmp_path / "artifact")
        return tmp_path / "artifact"

    def test_leaves_its_proof(self, run: Path) -> None:
        proof = json.loads((run / "artifact" / "proof.json").read_text())
        assert proof["proven"] is True
        assert proof["failures"] == []
        assert proof["parity"]["rows"] == 60
        weights = proof["round_trip"]
        assert weights["effect_of_training"]["kl"] > 0.1
        assert weights["reloaded"]["max_logit_difference"] < 1e-5
        assert weights["merged"]["max_logit_difference"] < 1e-3
        assert weights["merged"]["same_choice"] == 1
        assert "What does red mean?" not in (run / "artifact" / "proof.json").read_text()  # no row of the user's
        card = (run / "artifact" / "README.md").read_text()
        assert "## Proof" in card
        assert "have the same token ids in training and in serving (chat_template" in card

    def test_can_be_proven_again_with_its_data_without_and_with_others(self, run: Path, artifact: Path) -> None:
        outcome = command("prove", run)
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout.endswith("proven\n")
        assert "log-probabilities are" in outcome.stdout
        alone = prove(artifact).proof
        assert alone.proven
        assert alone.sections["parity"]["rows"] == 0
        assert alone.sections["round_trip"]["recorded"]["max_difference"] < 1e-4
        rows = write_jsonl(artifact.parent / "x.jsonl", conversation_rows(7, seed=5))
        assert prove(artifact, data=[str(rows)]).proof.sections["parity"]["rows"] == 7
        assert json.loads((artifact / "proof.json").read_text())["trained"]["conversations"]

    @pytest.mark.parametrize("dtype", [None, "bf16"])
    def test_its_merged_export_is_proven_against_the_same_record(
        self, run: Path, tmp_path: Path, dtype: str | None
    ) -> None:
        export(run, format="merged", to=tmp_path / "merged", dtype=dtype)
        assert json.loads((tmp_path / "merged" / "proof.json").read_text())["proven"] is None  # not yet
        proof = prove(tmp_path / "merged").proof
        assert proof.proven, proof.message()
        difference = proof.sections["round_trip"]["recorded"]["mean_difference"]
        assert difference < 1e-5 if dtype is None else 1e-5 < difference < 0.05
        path = tmp_path / "merged" / "model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        save_file({**tensors, name: -tensors[name]}, path, metadata={"format": "pt"})
        assert codes(prove(tmp_path / "merged").proof) == ["round_trip/edited", "round_trip/record_differs"]

    def test_a_template_that_does_not_render_any_more_is_caught(self, artifact: Path) -> None:
        path = artifact / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_start|>' + message", "<|im_start|> ' + message"))
        assert path.read_text().count("<|im_start|> ")
        codes = [failure["code"] for failure in prove(artifact).proof.failures()]
        assert sorted(codes) == ["edited", "unusable"]

    def test_a_template_that_is_edited_afterwards_is_caught(self, artifact: Path) -> None:
        path = artifact / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_end|>\n", "<|im_end|>"))
        proof = prove(artifact).proof
        found = {failure["code"]: failure["message"] for failure in proof.failures()}
        assert found["edited"] == (
            "chat_template.jinja has been edited since training: what is served is not what was trained"
        )
        assert "trained on: " in found["ids_differ"]
        assert "served:     " in found["ids_differ"]
        assert command("prove", artifact).returncode == 1

    def test_so_is_one_whose_meaning_is_the_same(self, artifact: Path) -> None:
        path = artifact / "chat_template.jinja"
        path.write_text(path.read_text() + "{# a word #}")
        assert [failure["code"] for failure in prove(artifact).proof.failures()] == ["edited"]

    def test_an_adapter_without_tensors_is_caught(self, artifact: Path) -> None:
        save_file({}, artifact / "adapter_model.safetensors", metadata={"format": "pt"})
        proof = prove(artifact).proof
        assert codes(proof) == ["round_trip/edited", "round_trip/empty_adapter"]
        assert "saved empty, and would be served as the base model" in message(proof, "empty_adapter")

    def test_weights_that_changed_are_caught(self, artifact: Path) -> None:
        edit_tensors(artifact / "adapter_model.safetensors", lambda tensors: {n: t * 0.9 for n, t in tensors.items()})
        assert codes(prove(artifact).proof) == ["round_trip/edited", "round_trip/record_differs"]

    @pytest.mark.parametrize(
        ("name", "happened"),
        [
            ("special_tokens_map.json", "was added"),
            ("added_tokens.json", "was added"),
            ("tokenizer.model", "was added"),
            ("additional_chat_templates/default.jinja", "was added"),
            ("tokenizer.json", "has been edited"),
            ("chat_template.jinja", "has been edited"),
            ("prompt_format.yaml", "has been edited"),
            ("chat_template.jinja", "is missing"),
            ("prompt_format.yaml", "is missing"),
        ],
    )
    def test_a_text_file_that_changed_is_named(self, name: str, happened: str, artifact: Path) -> None:
        path = artifact / name
        path.parent.mkdir(exist_ok=True)
        if happened == "is missing":
            path.unlink()
        else:
            path.write_text("{% {" if happened == "has been edited" else '{"eos_token": "</s>"}')
        outcome = command("prove", artifact)
        assert outcome.returncode == 1
        assert f"{name} {happened} since training: what is served is not what was trained" in outcome.stdout
        assert outcome.stderr == ""

    DAMAGE: ClassVar[dict[str, tuple[Any, list[str], str]]] = {
        "no base": (
            lambda path: edit_json(path / "adapter_config.json", base_model_name_or_path=None),
            ["unreadable"],
            "names no base model (base_model_name_or_path is null)",
        ),
        "another kind": (
            lambda path: edit_json(path / "adapter_config.json", peft_type="XX"),
            ["edited", "unreadable"],
            "cannot be loaded onto",
        ),
        "truncated": (
            lambda path: os.truncate(path / "adapter_model.safetensors", 2000),
            ["edited", "unreadable"],
            "is not a whole safetensors file",
        ),
        "emptied": (
            lambda path: os.truncate(path / "adapter_model.safetensors", 0),
            ["edited", "unreadable"],
            "is not a whole safetensors file",
        ),
        "config lost": (
            lambda path: (path / "adapter_config.json").unlink(),
            ["edited", "unreadable"],
            "has no config.json",
        ),
        "not a number": (
            lambda path: edit_tensors(path / "adapter_model.safetensors", lambda t: {n: x * nan for n, x in t.items()}),
            ["edited", "not_finite"],
            "computes NaN or infinity",
        ),
        "a tensor lost": (
            lambda path: edit_tensors(path / "adapter_model.safetensors", lambda t: dict(list(t.items())[1:])),
            ["edited", "unreadable"],
            "lacks 1 tensors (",
        ),
        "renamed": (
            lambda path: edit_tensors(
                path / "adapter_model.safetensors", lambda t: {f"x.{name}": x for name, x in t.items()}
            ),
            ["edited", "unreadable"],
            "lacks 24 tensors (",
        ),
    }

    @pytest.mark.parametrize("name", DAMAGE)
    @pytest.mark.parametrize("has_record", [True, False])
    def test_damage_is_put_into_words(self, name: str, has_record: bool, artifact: Path) -> None:
        damage, expected, words = self.DAMAGE[name]
        damage(artifact)
        if not has_record:
            (artifact / "proof.json").unlink()
            expected = [code for code in expected if code != "edited"]
        proof = prove(artifact).proof
        assert [failure["code"] for failure in proof.failures()] == expected
        assert words in message(proof, expected[-1])

    @pytest.mark.parametrize(
        ("place", "value", "words"),
        [
            (("dtype",), "fp8", "trained.dtype: Input should be 'bf16' or 'fp32'"),
            (("files",), [], "trained.files: Input should be a valid dictionary"),
            (("conversations", 0, "log_probs"), [-1.0], "there are not as many log_probs as probe_tokens ask for"),
            (
                ("conversations", 1, "input_ids"),
                "abc",
                "trained.conversations.1.input_ids: Input should be a valid list",
            ),
            (("stop",), {"sequences": 3}, "trained.stop.sequences"),
        ],
    )
    def test_a_damaged_record_is_refused(self, place: tuple, value: Any, words: str, artifact: Path) -> None:
        content = json.loads((artifact / "proof.json").read_text())
        part = content["trained"]
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = value
        (artifact / "proof.json").write_text(json.dumps(content))
        outcome = command("prove", artifact)
        assert outcome.returncode == 2
        assert words in outcome.stderr
        assert "remove it to prove the artifact without it" in outcome.stderr

    def test_without_a_record_artifact_and_merged_model_are_compared(self, artifact: Path) -> None:
        (artifact / "proof.json").unlink()
        outcome = command("prove", artifact)  # on made-up conversations
        assert outcome.returncode == 0
        assert "round trip: the merged model is " in outcome.stdout
        assert "nats from the artifact, loaded again, (" in outcome.stdout
        assert "trained model" not in outcome.stdout
        assert outcome.stdout.endswith(
            "proven, but for whether these are the weights that were trained: proof.json has no record of that\n"
        )
        long = [{"messages": [turn for row in conversation_rows(60) for turn in row["messages"]]}]
        rows = write_jsonl(artifact.parent / "long.jsonl", long)
        proof = prove(artifact, data=[str(rows)]).proof  # of more tokens than the model has positions
        assert proof.proven, proof.message()
        assert json.loads((artifact / "proof.json").read_text())["left_open"]

    def test_what_is_no_artifact_is_told_so(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"or give an artifact, a directory with prompt_format.yaml in it"):
            prove(run.parent.parent / "model")
        with pytest.raises(DataError, match=r"this file does not exist \(looked at [^ ]+/nothing.jsonl\)"):
            prove(run, data=[str(tmp_path / "nothing.jsonl")])


class TestTrainingOfLittleEffect:
    """What was hardly trained cannot be told from its base model by what it computes."""

    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory = tmp_path_factory.mktemp("weak")
        write_jsonl(directory / "train.jsonl", conversation_rows(16))
        save_model(directory / "model")
        return directory

    @pytest.fixture(scope="class")
    def run(self, data: Path) -> Path:
        run, _ = run_here(data, data / "model", lora_config=LORA, learning_rate=3e-6)
        effect = json.loads((run.artifact_dir / "proof.json").read_text())["round_trip"]["effect_of_training"]["kl"]
        assert effect < 1e-6
        return run.run_dir

    SPOILT: ClassVar[dict[str, Any]] = {
        "no effect": lambda path: edit_tensors(path / "adapter_model.safetensors", without_effect),
        "scale": lambda path: edit_json(path / "adapter_config.json", lora_alpha=16),
        "rank-stabilised": lambda path: edit_json(path / "adapter_config.json", use_rslora=True),
        "one value": lambda path: edit_tensors(
            path / "adapter_model.safetensors",
            lambda tensors: {name: tensor + 1e-9 * (name.find("layers.1.mlp") > 0) for name, tensor in tensors.items()},
        ),
    }

    @pytest.mark.parametrize("name", SPOILT)
    def test_is_held_by_its_hashes(self, name: str, run: Path, tmp_path: Path) -> None:
        shutil.copytree(run / "artifact", tmp_path / "artifact")
        self.SPOILT[name](tmp_path / "artifact")
        failure = only_failure(prove(tmp_path / "artifact").proof)
        assert (failure["check"], failure["code"]) == ("round_trip", "edited")
        assert "has been edited since training" in failure["message"]

    def test_and_may_move_with_its_base_model(self, run: Path, data: Path, tmp_path: Path) -> None:
        export(run, format="adapter", to=tmp_path / "adapter")
        assert prove(tmp_path / "adapter").proof.proven
        shutil.copytree(data / "model", tmp_path / "base")
        edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
        assert prove(tmp_path / "adapter").proof.proven
        shutil.copyfile(run / "artifact" / "adapter_model.safetensors", tmp_path / "adapter" / "model.safetensors")
        failure = only_failure(prove(tmp_path / "adapter").proof)
        assert failure["message"].startswith("model.safetensors was added since training")

    @pytest.mark.parametrize("name", ["no effect", "scale", "one value"])
    def test_and_is_compared_with_what_is_on_disk(self, name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails(data, monkeypatch, self.SPOILT[name], lora_config=LORA, learning_rate=3e-6)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_as_whole_weights_are(self, dtype: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An optimizer that trains copies, and base weights that are saved."""

        def restore(path: Path) -> None:
            base = load_file(data / "model" / "model.safetensors")
            save_file(
                {name: tensor.to(DTYPES[dtype]) for name, tensor in base.items()},
                path / "model.safetensors",
                metadata={"format": "pt"},
            )

        self.fails(data, monkeypatch, restore, dtype=dtype, learning_rate={"fp32": 1e-7, "bf16": 1e-5}[dtype])

    def fails(self, data: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, **keys: Any) -> None:
        """Spoil an artifact while it is written; its proof fails for this reason alone."""
        write = training.write_artifact

        def spoiled(directory: Path, *, finish: Any, **options: Any) -> None:
            write(directory, finish=lambda temporary: (spoil(temporary), finish(temporary)), **options)

        monkeypatch.setattr(training, "write_artifact", spoiled)
        tag = secrets.token_hex(4)
        with pytest.raises(ProofError, match=r"round_trip \(saved_differs\): of \d+ trained tensors"):
            run_here(data, data / "model", custom_model_tag=tag, **keys)
        proof = json.loads((data / "runs" / tag / "proof.json").read_text())
        assert [failure["code"] for failure in proof["failures"]] == ["saved_differs"]


def test_a_parameter_that_was_trained_and_is_not_saved_is_noticed(model_dir: Path, tmp_path: Path) -> None:
    model = add_lora(AutoModelForCausalLM.from_pretrained(model_dir), LORA)
    norm = model.get_base_model().model.norm.weight
    norm.requires_grad_(True)  # nothing in the adapter's config says so
    model.save_pretrained(tmp_path)
    trained = trained_numbers(model, {}, torch.float32)
    assert other_numbers(load_trained_model(tmp_path, dtype=torch.float32), trained, torch.float32) == []
    with torch.no_grad():
        norm += 1e-6
    trained = trained_numbers(model, {}, torch.float32)
    assert other_numbers(load_trained_model(tmp_path, dtype=torch.float32), trained, torch.float32) == [
        "base_model.model.model.norm.weight"
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 3}},
        {"modules_to_save": ["embed_tokens", "lm_head"], "bias": "all"},
        {"use_dora": True, "trainable_token_indices": [5, 6]},
    ],
    ids=["split", "whole modules", "dora"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_every_kind_of_adapter_is_on_disk_as_it_was_trained(
    options: dict[str, Any], dtype: str, is_tied: bool, data_dir: Path, model_dir: Path, tied_model_dir: Path
) -> None:
    model = tied_model_dir if is_tied else model_dir
    run, _ = run_here(data_dir, model, lora_config={**LORA, **options}, dtype=dtype, learning_rate=1e-3)
    proof = prove(run.run_dir).proof
    assert proof.proven, proof.message()


def test_biases_that_no_base_layer_can_take_are_told_before_training(data_dir: Path, model_dir: Path) -> None:
    run, listener = run_here(data_dir, model_dir, lora_config={**LORA, "lora_bias": True}, learning_rate=1e-2)
    (note,) = [note for note in listener.notes if note.startswith("lora_bias: ")]
    assert "the base model has no biases in q_proj, k_proj, v_proj, o_proj, up_proj, down_proj" in note
    proof = prove(run.run_dir).proof
    assert proof.proven, proof.message()
    assert any(
        remark.startswith("The adapter cannot be merged, and only PEFT can serve it: ") for remark in proof.remarks
    )
    with pytest.raises(ModelError, match="cannot be merged"):
        export(run.run_dir, format="merged", to=data_dir / "merged")


def test_a_merge_that_fails_for_no_known_reason_is_no_remark(
    data_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's own word for a merge that gives NaN, from its own merge: the adapter computes well until then."""
    run, _ = run_here(data_dir, model_dir, lora_config=LORA, learning_rate=1e-2)
    delta = peft.tuners.lora.Linear.get_delta_weight
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "get_delta_weight", lambda layer, adapter: delta(layer, adapter) * float("nan")
    )
    failure = only_failure(prove(run.run_dir).proof)
    assert (failure["check"], failure["code"]) == ("round_trip", "merge_fails")
    assert "NaNs detected in the merged weights" in failure["message"]


@pytest.mark.parametrize("bug", ["shifted twice", "weight"])
def test_a_loss_that_is_not_that_of_the_samples_is_caught(
    bug: str, data_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = InstructionTuning.loss

    def shifted(self: Any, model: Any, batch: PackedBatch, head: Any) -> Any:
        """Labels that the model shifts once more."""
        trained = replace(batch.trained, tokens_S=batch.trained.tokens_S.roll(-1))
        return compute(self, model, replace(batch, trained=trained), head)

    def weighted(self: Any, model: Any, batch: PackedBatch, head: Any) -> Any:
        """The mean over all tokens of the batch, instead of those that are trained."""
        return replace(compute(self, model, batch, head), weight=float(batch.tokens))

    monkeypatch.setattr(InstructionTuning, "loss", {"shifted twice": shifted, "weight": weighted}[bug])
    with pytest.raises(ProofError, match=r"mask \(loss_differs\): the loss of a made-up conversation is [\d.]+ nats"):
        run_here(data_dir, model_dir, lora_config=LORA)


def test_a_merged_adapter_with_untied_embeddings_is_caught(data_dir: Path, tied_model_dir: Path) -> None:
    """Merging changes the head only, and config.json goes on to say that head and embedding are one."""
    run, _ = run_here(data_dir, tied_model_dir, learning_rate=1e-3)
    artifact = run.artifact_dir
    assert prove(artifact).proof.proven
    tensors = load_file(artifact / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.1
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})
    proof = prove(artifact).proof
    assert codes(proof) == ["round_trip/edited", "round_trip/untied_embeddings"]
    assert "config.json has tie_word_embeddings: true, so that one of them is lost" in message(
        proof, "untied_embeddings"
    )


def test_a_full_run_is_proven_in_bf16_too(data_dir: Path, model_dir: Path) -> None:
    run, _ = run_here(data_dir, model_dir, dtype="bf16", learning_rate=1e-3)
    proof = json.loads((run.artifact_dir / "proof.json").read_text())
    assert proof["proven"]
    assert proof["round_trip"]["dtype"] == "bf16"
    assert 0 < proof["round_trip"]["reloaded"]["kl"] < 5e-3


ENDLESS = {**PROMPT_FORMATS["chatml"], "assistant": "<|im_start|>assistant\n{instruction}"}


def test_what_cannot_be_proven_is_refused_before_training(data_dir: Path, model_dir: Path) -> None:
    config = write_config(data_dir, model_dir, generation_config={"prompt_format": ENDLESS})
    outcome = command("finetune", config)
    assert outcome.returncode == 2
    assert "what would be served is not what would be trained" in outcome.stderr
    assert "the model will not stop" in outcome.stderr
    assert "--allow-unproven" in outcome.stderr
    assert not (data_dir / "runs").exists()
    checked = command("prompt", "check", config)
    assert checked.returncode == 1
    assert checked.stdout.endswith("NOT proven\n")
    assert "FAILED: stop (no_stop, " in checked.stdout


def test_or_shipped_with_the_failure_in_its_card(data_dir: Path, model_dir: Path) -> None:
    listener = Listener()
    config = write_config(data_dir, model_dir, lora_config=LORA, generation_config={"prompt_format": ENDLESS})
    run = finetune(load_config(config), listener, allow_unproven=True)
    assert run is not None
    assert any(note.startswith("unproven: ") for note in listener.notes)
    proof = json.loads((run.artifact_dir / "proof.json").read_text())
    assert proof["proven"] is False
    assert [failure["code"] for failure in proof["failures"]] == ["no_stop"]
    assert "FAILED: stop (no_stop, " in (run.artifact_dir / "README.md").read_text()


def test_a_good_config_is_checked(data_dir: Path, model_dir: Path) -> None:
    proof, _ = check_prompts(load_config(write_config(data_dir, model_dir)))
    assert proof.proven
    outcome = command("prompt", "check", write_config(data_dir, model_dir), "--json")
    assert outcome.returncode == 0
    assert json.loads(outcome.stdout)["mask"]["turns"] == 48


def test_a_proof_that_fails_after_training_keeps_the_training(
    data_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not saved as they were trained: here the file is written with another scale."""
    write = training.write_artifact

    def spoiled(directory: Path, *, finish: Any, **options: Any) -> None:
        def spoil(temporary: Path) -> None:
            settings = json.loads((temporary / "adapter_config.json").read_text())
            (temporary / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))
            finish(temporary)

        write(directory, finish=spoil, **options)

    config = write_config(data_dir, model_dir, lora_config=LORA, learning_rate=1e-2, num_epochs=4)
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_artifact", spoiled)
        with pytest.raises(ProofError, match=r"round_trip \(reloaded_differs\): the reloaded model does not compute"):
            finetune(load_config(config), Listener())
    run_dir = data_dir / "runs" / "run"
    assert not (run_dir / "artifact").exists()
    assert json.loads((run_dir / "proof.json").read_text())["proven"] is False
    assert json.loads((run_dir / "events.jsonl").read_text().splitlines()[-1])["event"] == "failed"
    run = resume(run_dir, Listener())  # the bug is fixed: nothing has to be trained again
    assert json.loads((run.artifact_dir / "proof.json").read_text())["proven"] is True


def test_truncated_turns_are_accounted_for(data_dir: Path, model_dir: Path) -> None:
    proof, _ = check_prompts(load_config(write_config(data_dir, model_dir, context_length=24)))
    assert proof.proven, proof.message()
    mask = proof.sections["mask"]
    assert mask["tokens"]["truncated"] > 0
    assert mask["turns_cut_off"] > 0


def test_merged_logits_are_those_of_transformers(data_dir: Path, model_dir: Path) -> None:
    """What `round_trip` reports is what plain transformers computes."""
    run, _ = run_here(data_dir, model_dir, learning_rate=1e-3)
    record = json.loads((run.artifact_dir / "proof.json").read_text())["trained"]["conversations"][0]
    ids = torch.tensor([record["input_ids"][: record["probe_tokens"]]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(run.artifact_dir)(input_ids=ids).logits[0, :-1].log_softmax(-1)
    ours = torch.tensor(record["log_probs"])
    theirs = logits.gather(-1, ids[0, 1:, None]).flatten()[-len(ours) :]
    assert torch.allclose(ours, theirs, atol=1e-4)
