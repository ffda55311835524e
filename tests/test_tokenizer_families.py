"""Every family of tokenizers: training feeds the ids that a server computes, and trains what the model has to say."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import CHATML_TEMPLATE, PROMPT_FORMATS, conversation_rows
from llmforge.models.load import save_tokenizer
from llmforge.prompt import ChatTemplate, Encoder, Format, PromptFormat, StopRules, chat_template_of
from llmforge.prompt.adversary import TEXTS, random_conversations
from llmforge.prompt.certificate import Certifier
from llmforge.prompt.served import Served
from llmforge.tasks import InstructionTuning
from tokenizer_families import FAMILIES

ROWS = [
    {"messages": messages}
    for orderly in (True, False)
    for messages in random_conversations(60, 3, texts=(*TEXTS, "<s>", "</s>", "<|im_end|>"), orderly=orderly)
    if any(message["role"] == "assistant" for message in messages)
]


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return FAMILIES[request.param]()


def formats(tokenizer: Any) -> dict[str, Format]:
    return {
        "template": ChatTemplate(CHATML_TEMPLATE, tokenizer, False),
        "chatml": PromptFormat(**PROMPT_FORMATS["chatml"]),
        "plain": PromptFormat(
            system="{instruction}\n", user="User: {instruction}\n", assistant="Assistant: {instruction}<|im_end|>",
            trailing_assistant="Assistant:", bos=tokenizer.bos_token or "",
        ),
    }  # fmt: skip


def reloaded(tokenizer: Any, template: str, directory: Path) -> Any:
    """Give the tokenizer as anybody loads it from an artifact."""
    save_tokenizer(tokenizer, directory)
    loaded = AutoTokenizer.from_pretrained(directory)
    loaded.chat_template = template
    return loaded


@pytest.mark.parametrize("name", ["template", "chatml", "plain"])
def test_training_is_what_a_server_does(tokenizer: Any, name: str, tmp_path: Path) -> None:
    format = formats(tokenizer)[name]
    encoder = Encoder(tokenizer, format)
    served = Served(reloaded(tokenizer, chat_template_of(format), tmp_path))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stop = StopRules(token_ids=(end,), sequences=("<|im_end|>",))
    certifier = Certifier(served, format, stop, "assistant")
    for number, (row, samples) in enumerate(zip(ROWS, encoder.encode_conversations(ROWS, "assistant"), strict=True)):
        assert isinstance(samples, list), samples
        certifier.examine(row, samples, f"row {number}")
        certifier.compare_prompt(row["messages"], None, encoder.encode_prompt(row["messages"]), f"row {number}")
    certificate = certifier.certificate
    assert [finding.message for finding in certificate.findings] == []
    assert certificate.turns > 100
    assert certificate.tokens["end of turn"] >= certificate.turns  # `<|im_end|>`, and what follows it
    assert certificate.tokens["prompt"] > certificate.tokens["trained"] > certificate.turns


def test_one_bos_and_no_end_that_nobody_wrote(tokenizer: Any) -> None:
    """Tokenizers that put BOS and EOS around everything do not do so here: the format says what is written."""
    encoder = Encoder(tokenizer, formats(tokenizer)["plain"])
    for row in conversation_rows(5):
        ids = encoder.encode_prompt(row["messages"][:1])
        assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
        assert ids.count(tokenizer.eos_token_id) == 0


def test_padding_is_never_trained_and_the_end_always_is(tokenizer: Any) -> None:
    """Padding is masked by its place: it may have the id of the end of a turn, or be missing from the tokenizer."""
    eos = tokenizer.eos_token or "<|im_end|>"
    format = PromptFormat(
        system="{instruction}\n", user="{instruction}\n", assistant=f"{{instruction}}{eos}", trailing_assistant=""
    )
    encoder = Encoder(tokenizer, format)
    task = InstructionTuning(pad_token_id=tokenizer.pad_token_id or 0, pad_to=None)
    rows = conversation_rows(12)
    samples = [samples[0] for samples in encoder.encode_conversations(rows, "assistant")]
    batch = task.collate(samples)
    assert len({len(sample.input_ids) for sample in samples}) > 1
    for number, sample in enumerate(samples):
        length = len(sample.input_ids)
        assert batch.loss_weights_BT[number, length:].sum() == 0
        assert batch.attention_mask_BT[number].sum() == length
        assert batch.input_ids_BT[number, length - 1] == tokenizer.convert_tokens_to_ids(eos)
        assert batch.loss_weights_BT[number, length - 1] == 1


def test_llama_tokenizers_come_back_as_they_were(tmp_path: Path) -> None:
    """transformers saves no `legacy`: what is loaded then drops the space behind special tokens."""
    for legacy in (True, False):
        tokenizer = FAMILIES["Llama, legacy" if legacy else "Llama"]()
        text = "<s>User</s>go"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        loaded = reloaded(tokenizer, CHATML_TEMPLATE, tmp_path / str(legacy))
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert loaded.legacy is legacy
        tokenizer.save_pretrained(tmp_path / "plain")  # the day that this fails, save_tokenizer can go
        plain = AutoTokenizer.from_pretrained(tmp_path / "plain")
        assert (plain(text, add_special_tokens=False)["input_ids"] == ids) is not legacy
