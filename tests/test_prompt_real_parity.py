"""Every published tokenizer at hand, saved and loaded again, gives a server the ids of training."""

import pytest

from conftest import PROMPT_FORMATS
from llmforge.prompt import ChatTemplate, Encoder, PromptFormat, StopRules, chat_template_of
from llmforge.prompt.adversary import TEXTS, random_conversations
from llmforge.prompt.certificate import Certifier
from llmforge.prompt.served import Served
from test_prompt_real_tokenizers import load
from test_tokenizer_families import reloaded

pytestmark = pytest.mark.real_tokenizers

NAMES = (
    *("llama2", "llama3", "llama3_1", "gemma", "gemma2", "gemma3", "qwen2_5", "qwen3", "yi", "mistral_nemo"),
    *("command_r_plus", "mistral_v1", "mistral_v3", "mistral_v7"),
)


@pytest.mark.parametrize("name", NAMES)
def test_parity(name, tmp_path):
    tokenizer = load(name)
    formats = [PromptFormat(**PROMPT_FORMATS["chatml"])]
    if tokenizer.chat_template:
        formats.append(ChatTemplate(tokenizer.get_chat_template(), tokenizer, from_tokenizer=True))
    drawn = random_conversations(40, 9, texts=(*TEXTS, *tokenizer.all_special_tokens), orderly=True)
    rows = [{"messages": messages} for messages in drawn if any(m["role"] == "assistant" for m in messages)]
    for number, format in enumerate(formats):
        encoder = Encoder(tokenizer, format)
        served = Served(reloaded(tokenizer, chat_template_of(format), tmp_path / str(number)))
        certifier = Certifier(served, format, StopRules.derive(encoder, ["<|im_end|>", "</s>"], []), "assistant")
        for row, samples in zip(rows, encoder.encode_conversations(rows, "assistant"), strict=True):
            if isinstance(samples, list):  # templates may refuse, a system message above all
                certifier.examine(row, samples, str(row))
        assert [finding.message for finding in certifier.certificate.findings] == []
        assert certifier.certificate.turns > 30
