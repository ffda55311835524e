"""Conversations drawn at random to break whatever renders them: templates, tokenizers and other systems' languages."""

import random
from collections.abc import Sequence

from llmforge.prompt.conversation import Message

TEXTS = (
    # what people write
    "What is the capital of France?",
    "Paris.",
    "48/2 = 24. #### 72",
    "def f(x):\n    return x\n",
    "naïve café",
    "cafe\u0301",
    "你好，世界",
    "مرحبا بالعالم",
    "👩‍👩‍👧 𝄞",
    # white space, at the edges of a message and inside it
    " ",
    "\n",
    "\t",
    "\r\n",
    "  two  spaces  ",
    "\n\n",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x85",
    "\ufeff",
    # template languages: ours, Jinja, Go, Python, JSON, YAML
    "{instruction}",
    "{system}",
    "{{ messages }}",
    "{% endraw %}",
    "{# gone #}",
    "{{- .Prompt -}}",
    "{0} %s ${x}",
    '"quoted"',
    "it's",
    "\\n \\u0041 \\",
    "- a: b # c",
    '"""',
    # special tokens of the usual formats, whole and cut
    "<s>",
    "</s>",
    "</s",
    "<|im_start|>system\n",
    "<|im_end|>\n",
    "<|eot_id|>",
    "<|endoftext|>",
    "<start_of_turn>model\n",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    # what models write to themselves
    "<think>",
    "</think>",
    "<think>\nhm\n</think>\n\nyes",
    "<tool_call>",
    "<tool_response>",
)
"""Fragments that messages are composed of."""


def random_conversations(
    count: int, seed: int, *, texts: Sequence[str] = TEXTS, orderly: bool = False
) -> list[list[Message]]:
    """Draw conversations; the same seed draws the same ones. About half end with the assistant.

    Args:
        count: how many.
        seed: of the random generator.
        texts: fragments to compose messages of; a tokenizer's own special tokens are a good addition.
        orderly: draw what every chat template accepts: a system message, if any, in front, user and assistant taking
            turns from the user on, no blank message. Otherwise some contents are empty or blank, the system message
            may stand anywhere, the assistant may begin and one of them may speak twice.
    """
    generator = random.Random(seed)
    return [_conversation(generator, texts, orderly) for _ in range(count)]


def _conversation(generator: random.Random, texts: Sequence[str], orderly: bool) -> list[Message]:
    turns = 20 if generator.random() < 0.01 else generator.randint(1, 6)
    roles = [("user", "assistant")[turn % 2] for turn in range(turns)]
    if not orderly and generator.random() < 0.1:
        roles[generator.randrange(turns)] = generator.choice(("user", "assistant"))
    if generator.random() < 0.5:
        in_front = orderly or generator.random() < 0.9
        roles.insert(0 if in_front else generator.randint(0, turns), "system")
    return [{"role": role, "content": _content(generator, texts, orderly)} for role in roles]


def _content(generator: random.Random, texts: Sequence[str], orderly: bool) -> str:
    if not orderly and generator.random() < 0.08:
        return generator.choice(("", " ", "\n"))
    pieces = generator.choices(texts, k=20 if generator.random() < 0.01 else generator.randint(1, 4))
    content = generator.choice(("", " ", "\n")).join(pieces)
    return content if content.strip() or not orderly else f"{content}{generator.randrange(1000)}{content}"
