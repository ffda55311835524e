"""Finds the plain templates that a tokenizer's Jinja chat template amounts to, or says why there are none.

The template is only ever watched: conversations of markers are rendered, and what stands between the markers is what
a `PromptFormat` has to write. The result is then proven equal on random conversations. The template's source is read
for nothing but what to throw at it: the texts that it looks for in messages, and the names of its switches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmforge.errors import ConversationError, PromptFormatError
from llmforge.prompt.adversary import TEXTS, random_conversations
from llmforge.prompt.chat_template import ChatTemplate
from llmforge.prompt.conversation import Message, common_prefix_length
from llmforge.prompt.encoder import Encoder
from llmforge.prompt.files import HOW_TO_WRITE
from llmforge.prompt.format import PromptFormat

CONVERSATIONS = 300
SEED = 20240723
MARKERS = {role: [f"Marker-{role.upper()}-{number}" for number in range(3)] for role in ("system", "user", "assistant")}
TOOL = {"type": "function", "function": {"name": "lookup", "description": "Look up.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "Marker-CALL"}}}
# What transformers gives to every template, or what belongs to tools.
KNOWN_VARIABLES = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"),
    *("raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner"),
    *("tool_choice", "builtin_tools", "custom_tools", "tools_in_user_message"),
}


@dataclass(frozen=True)
class Inference:
    """What became of a chat template.

    `format` is proven to write the same text and the same token ids, prompts and training turns, on `conversations`
    random conversations; it is None where `reasons` say what cannot be expressed. `remarks` name what plain
    conversations do not use and the format does not keep (tools, say).
    """

    format: PromptFormat | None
    stopping_sequences: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    conversations: int = 0


def infer_format(tokenizer: Any, *, conversations: int = CONVERSATIONS) -> Inference:
    """Find the `PromptFormat` that is equal to the tokenizer's own chat template, and prove it.

    Raises:
        PromptFormatError: the tokenizer has no chat template, or one that is not valid Jinja.
    """
    if not tokenizer.chat_template:
        raise PromptFormatError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template to infer a format from; {HOW_TO_WRITE}"
        )
    probe = _Probe(ChatTemplate(tokenizer.get_chat_template(), tokenizer, from_tokenizer=True))
    reasons = tuple(reason for find in OBSTACLES if (reason := find(probe)))
    if reasons:
        return Inference(None, reasons=reasons, remarks=_remarks(probe))
    try:
        format = _construct(probe)
        proven = _prove(probe, format, conversations)
    except _InexpressibleError as error:
        return Inference(None, reasons=(str(error),), remarks=_remarks(probe))
    stops, stop_remarks = _stopping_sequences(tokenizer, format)
    return Inference(format, stops, remarks=(*_remarks(probe), *stop_remarks), conversations=proven)


class _InexpressibleError(Exception):
    """Says which feature of the template plain templates lack."""


class _Probe:
    """A chat template to be watched."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.tokenizer = template.tokenizer
        syntax = _parse(template.source)
        self.switches = _switches(syntax)
        uses_bos = "bos_token" in jinja2.meta.find_undeclared_variables(syntax)
        self.bos = (uses_bos and self.tokenizer.bos_token) or ""
        self.constants = sorted({node.value for node in syntax.find_all(jinja2.nodes.Const) if _is_text(node.value)})
        first = [_message("user", 0)]
        if self.render(first) is None:
            raise PromptFormatError(
                "the chat template renders not even one user message, so nothing can be inferred from it: "
                f"{self.refusal(first)}"
            )
        self.takes_system = self.render([_message("system", 0), *first]) is not None

    def render(
        self, messages: Sequence[Message], ask: bool = True, tools: Sequence[Mapping] | None = None
    ) -> str | None:
        """Render, without what the template writes ahead of a turn that nobody asked for; None where it refuses."""
        try:
            text = self.template.render(messages, ask, tools)
        except (ConversationError, PromptFormatError):
            return None
        return text if ask else text.removesuffix(self.template.stray_suffix)

    def refusal(self, messages: Sequence[Message]) -> str:
        try:
            self.template.render(messages)
        except (ConversationError, PromptFormatError) as error:
            return str(error)
        return ""

    def gaps(self, messages: Sequence[Message], ask: bool = False) -> list[str] | None:
        """Give the text before, between and behind the contents, None where one is missing, repeated or elsewhere."""
        rest = self.render(messages, ask)
        gaps = []
        for content in (message["content"].strip() for message in messages):
            if rest is None or rest.count(content) != 1:
                return None
            gap, _, rest = rest.partition(content)
            gaps.append(gap)
        return None if rest is None else [*gaps, rest]

    def trims(self, role: str) -> str | None:
        """Say whether white space around a role's content is trimmed: yes, no, in part, or None where nothing is."""
        before, behind = " \n\t ", "\t \n "
        messages = _conversation(3, system=self.takes_system)
        index = next((index for index, message in enumerate(messages) if message["role"] == role), None)
        tight = self.gaps(messages)
        if index is None or tight is None:
            return None
        messages[index]["content"] = before + messages[index]["content"] + behind
        wide = self.gaps(messages)
        if wide == tight:
            return "yes"
        tight[index] += before
        tight[index + 1] = behind + tight[index + 1]
        return "no" if wide == tight else "in part"

    def texts(self) -> tuple[str, ...]:
        """Give texts to compose conversations of: the usual ones, the tokenizer's own, and the template's own."""
        return (*TEXTS, *self.tokenizer.all_special_tokens, *self.constants)


def _message(role: str, number: int) -> dict[str, Any]:
    return {"role": role, "content": MARKERS[role][number]}


def _conversation(turns: int, system: bool = False) -> list[dict[str, Any]]:
    """Write a conversation of markers: the user and the assistant in turn, `turns` messages in all."""
    messages = [_message(("user", "assistant")[turn % 2], turn // 2) for turn in range(turns)]
    return [_message("system", 0), *messages] if system else messages


class _Generation(Extension):
    """Lets templates with `{% generation %}` marks be parsed; only the syntax tree is wanted."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _parse(source: str) -> Any:
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise PromptFormatError(
            f"the chat template is not valid Jinja: {error.message} (line {error.lineno})"
        ) from error


def _switches(syntax: Any) -> list[str]:
    """Name the variables that a caller may give to a template to change what it writes."""
    assigned = {name.name for name in syntax.find_all(jinja2.nodes.Name) if name.ctx == "store"}
    return sorted(jinja2.meta.find_undeclared_variables(syntax) - assigned - KNOWN_VARIABLES)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 40


# What plain templates cannot express. Each looks at the template's behaviour and says what it saw, or nothing.


def _writes_dates(probe: _Probe) -> str | None:
    """Render on two different days: a macro stands in for the function that transformers gives to templates."""
    written = []
    for day in ("1 Jan 2001", "2 Feb 2002"):
        source = f"{{% macro strftime_now(format) %}}{day}{{% endmacro %}}{probe.template.source}"
        dated = _Probe(ChatTemplate(source, probe.tokenizer, from_tokenizer=False))
        written.append([dated.render(_conversation(n, system)) for n in (1, 2, 5) for system in (False, True)])
    if written[0] == written[1]:
        return None
    return "dates: the day on which a prompt is rendered (strftime_now) is written into it"


def _misplaces_system(probe: _Probe) -> str | None:
    if not probe.takes_system:
        return None
    system, user = MARKERS["system"][0], MARKERS["user"][0]
    for turns in (1, 3, 5):
        text = probe.render(_conversation(turns, system=True))
        if text is None:
            return "system messages: conversations of several turns are refused once they have one"
        if text.count(system) != 1:
            return f"system messages: their text is written {text.count(system)} times instead of once"
        if user in text and text.index(system) > text.index(user):
            return "system messages: they are written into the last user turn, not before or into the first"
    return None


def _drops_thinking(probe: _Probe) -> str | None:
    """Put tags around a part of an answer and see whether it is still there once the conversation goes on."""
    dropped = []
    for before, after in dict.fromkeys((("<think>", "</think>"), *_tag_pairs(probe.constants))):
        messages = _conversation(3)
        messages[1]["content"] = f"{before}\nMarker-INNER\n{after}\n\n{messages[1]['content']}"
        text = probe.render(messages)
        if text is not None and "Marker-INNER" not in text and MARKERS["assistant"][0] in text:
            dropped.append(f"{before}…{after}")
    if not dropped:
        return None
    return (
        f"thinking: {' and '.join(dropped)} is dropped from earlier assistant turns, though that is how they were said"
    )


def _tag_pairs(constants: Sequence[str]) -> list[tuple[str, str]]:
    """Pair the tags among a template's constants: `<x>` with `</x>`, `[X]` with `[/X]`."""
    stripped = {constant.strip() for constant in constants}
    pairs = []
    for closing in sorted(stripped):
        for bracket in ("<", "["):
            opening = closing.replace(f"{bracket}/", bracket, 1)
            if closing.startswith(f"{bracket}/") and len(closing) > 3 and "\n" not in closing:
                pairs.append((opening, closing))
    return pairs


def _treats_turns_differently(probe: _Probe) -> str | None:
    """Compare what is written around turns as a conversation goes on, and around its first and later ones."""
    conversations = {turns: probe.gaps(_conversation(turns)) for turns in (2, 4, 6)}
    for turns, gaps in conversations.items():
        if gaps is None:
            return _lost_content(probe, _conversation(turns))
    short, middle, long = (gaps for gaps in conversations.values() if gaps is not None)
    for gaps in (short, middle):
        last = len(gaps) - 2
        if gaps[last] != long[last]:
            extra = _difference(gaps[last], long[last])
            kind = "thinking: an empty block" if "think" in extra else "per-turn conditions: the text"
            return (
                f"{kind} {extra!r} is written in front of the last assistant turn, which a model so learns to write, "
                "but is gone from the same turn once the conversation goes on"
            )
        if gaps[:last] != long[:last]:
            return "per-turn conditions: earlier turns are written differently once the conversation goes on"
    for between in (long[1:6:2], long[2:6:2]):
        if len(set(between)) > 1:
            return "per-turn conditions: what is written between two messages depends on the turn: " + " or ".join(
                repr(gap) for gap in dict.fromkeys(between)
            )
    if not long[2].startswith(short[-1]):
        return (
            f"per-turn conditions: behind the last assistant turn stands {short[-1]!r}, but behind one inside a "
            f"conversation {long[2]!r}"
        )
    return None


def _lost_content(probe: _Probe, messages: Sequence[Message]) -> str:
    text = probe.render(messages, ask=False)
    if text is None:
        return f"turns: a conversation of {len(messages)} turns is refused ({probe.refusal(messages)})"
    for message in messages:
        count = text.count(message["content"])
        if count != 1:
            return f"content: the text of a message ({message['role']}) is written {count} times instead of once"
    return "content: messages are not written in their order"


def _difference(first: str, second: str) -> str:
    """Give what the first text has where the second goes on otherwise."""
    start = common_prefix_length(first, second)
    end = common_prefix_length(first[start:][::-1], second[start:][::-1])
    return first[start : len(first) - end]


def _trims_some(probe: _Probe) -> str | None:
    answers = {role: probe.trims(role) for role in ("system", "user", "assistant")}
    answers = {role: answer for role, answer in answers.items() if answer}
    if len(set(answers.values())) <= 1 and "in part" not in answers.values():
        return None
    alike = "is trimmed in part around" if set(answers.values()) == {"in part"} else "is not trimmed alike around"
    return (
        f"white space: it {alike} the content of messages ("
        + ", ".join(f"{role}: {answer}" for role, answer in answers.items())
        + ")"
    )


def _opens_differently(probe: _Probe) -> str | None:
    """Compare what asks for an answer with what the answer then begins with."""
    question, answered = probe.gaps(_conversation(1), ask=True), probe.gaps(_conversation(2))
    if question is None or answered is None or answered[1].startswith(question[-1]):
        return None
    return (
        f"generation prompt: an answer is asked for with {question[-1]!r}, but once written it stands behind "
        f"{answered[1]!r}"
    )


OBSTACLES: tuple[Callable[[_Probe], str | None], ...] = (
    _writes_dates,
    _misplaces_system,
    _drops_thinking,
    _treats_turns_differently,
    _trims_some,
    _opens_differently,
)


def _construct(probe: _Probe) -> PromptFormat:
    """Cut what stands between the markers into the templates of a `PromptFormat`."""
    question, asked, answered, long = (
        probe.gaps(_conversation(turns), ask) for turns, ask in ((1, False), (1, True), (2, False), (3, False))
    )
    if question is None or asked is None or answered is None or long is None:
        raise _InexpressibleError(_lost_content(probe, _conversation(3)))
    start, user_end, answer_end = question[0], question[1], answered[2]
    user_begin = long[2].removeprefix(answer_end)
    if not asked[1].startswith(user_end) or not answered[1].startswith(user_end):
        raise _InexpressibleError(f"turns: a user turn ends in {user_end!r}, or in {answered[1]!r} once answered")
    if not start.endswith(user_begin):
        raise _InexpressibleError(
            f"per-turn conditions: the first user turn begins with {start!r}, later ones with {user_begin!r}"
        )
    parts: dict[str, Any] = {
        "user": f"{user_begin}{{instruction}}{user_end}",
        "assistant": f"{answered[1].removeprefix(user_end)}{{instruction}}{answer_end}",
        "trailing_assistant": asked[1].removeprefix(user_end),
        "strip_whitespace": probe.trims("user") == "yes",
    }
    return PromptFormat(**parts | _construct_system(probe, start.removesuffix(user_begin), user_begin, user_end))


def _construct_system(probe: _Probe, head: str, user_begin: str, user_end: str) -> dict[str, Any]:
    """Find the system template and what stands in front of everything.

    Args:
        head: what is written before the first user turn where there is no system message.
        user_begin: what every user turn begins with.
        user_end: what every user turn ends with.
    """
    if not probe.takes_system:
        # The usual place for a system text where the template has none: in the first user turn, on its own lines.
        user = f"{user_begin}{{system}}{{instruction}}{user_end}"
        return {"bos": head, "system": "{instruction}\n\n", "system_in_user": True, "user": user}
    gaps = probe.gaps(_conversation(1, system=True))
    if gaps is None:
        raise _InexpressibleError(_lost_content(probe, _conversation(1, system=True)))
    before, behind, _ = gaps
    if behind.endswith(user_begin):
        system_end = behind.removesuffix(user_begin)
        if before.startswith(head):
            return {"bos": head, "system": f"{before.removeprefix(head)}{{instruction}}{system_end}"}
        default = head[len(before) : len(head) - len(system_end)]
        if head == before + default + system_end:
            bos = probe.bos if before.startswith(probe.bos) else ""
            return {
                "bos": bos,
                "system": f"{before.removeprefix(bos)}{{instruction}}{system_end}",
                "default_system_message": default,
                "add_system_tags_even_if_message_is_empty": not default,
            }
    if before.startswith(head):
        for cut in range(len(user_begin), -1, -1):
            begin, rest = user_begin[:cut], user_begin[cut:]
            if before.removeprefix(head).startswith(begin) and behind.endswith(rest):
                system = before.removeprefix(head + begin) + "{instruction}" + behind.removesuffix(rest)
                user = f"{begin}{{system}}{rest}{{instruction}}{user_end}"
                return {"bos": head, "system": system, "system_in_user": True, "user": user}
    raise _InexpressibleError(
        f"system messages: a conversation begins with {head + user_begin!r} without one, and with "
        f"{before + '…' + behind!r} around one"
    )


def _prove(probe: _Probe, format: PromptFormat, count: int) -> int:
    """Compare text, prompt ids and training turns on random conversations; return how many were compared."""
    ours, theirs = (Encoder(probe.tokenizer, format) for format in (format, probe.template))
    compared = 0
    for messages in random_conversations(count, SEED, texts=probe.texts(), orderly=True):
        if messages[0]["role"] == "system" and not probe.takes_system:
            messages = messages[1:]
        _compare(format.render(messages), probe.render(messages), messages)
        _compare(format.render(messages, False), probe.render(messages, ask=False), messages)
        served = probe.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if ours.encode_prompt(messages) != served:
            raise _InexpressibleError(f"token ids: the same text becomes other ids for {_shown(messages)}")
        if any(message["role"] == "assistant" for message in messages):
            try:
                same = format.turns(messages) == probe.template.turns(messages)
            except (ConversationError, PromptFormatError) as error:
                raise _InexpressibleError(f"turns: {error}") from error
            rows = [{"messages": messages}]
            if not same or ours.explain(rows, "assistant") != theirs.explain(rows, "assistant"):
                raise _InexpressibleError(f"turns: what would be trained differs for {_shown(messages)}")
        compared += 1
    return compared


def _compare(ours: str, theirs: str | None, messages: Sequence[Message]) -> None:
    if theirs is None:
        raise _InexpressibleError(f"content: the template refuses {_shown(messages)}")
    if ours == theirs:
        return
    for message in messages:
        if message["content"].strip() not in theirs:
            raise _InexpressibleError(
                f"content: the text of a message ({message['role']}) is changed: {message['content']!r:.120} is not "
                f"in what is written"
            )
    start = max(0, common_prefix_length(ours, theirs) - 20)
    raise _InexpressibleError(
        f"other conditions: where plain templates write {ours[start : start + 80]!r}, the template writes "
        f"{theirs[start : start + 80]!r}, for {_shown(messages)}"
    )


def _shown(messages: Sequence[Message]) -> str:
    return ", ".join(f"{message['role']} {message['content'][:40]!r}" for message in messages[:3]) + (
        f" and {len(messages) - 3} more" if len(messages) > 3 else ""
    )


def _stopping_sequences(tokenizer: Any, format: PromptFormat) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give the text that ends an assistant turn: its first token where that is a special one, else all of it."""
    ending = format.assistant.rpartition("{instruction}")[2]
    ids = tokenizer(ending.lstrip(), add_special_tokens=False)["input_ids"] if ending.strip() else []
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if ids and ids[0] in special:
        return (tokenizer.convert_ids_to_tokens(ids[0]),), ()
    if ending.strip():
        return (ending.strip(),), ()
    return (), (
        "stopping: an assistant turn ends in no text of its own, so the model cannot learn where to stop; write an end "
        "into `assistant`",
    )


def _remarks(probe: _Probe) -> tuple[str, ...]:
    return tuple(_each_remark(probe))


def _each_remark(probe: _Probe) -> Iterator[str]:
    """Name what plain conversations do not show: what the template offers or refuses beside them."""
    question = _conversation(1)
    call = probe.render([*question, {"role": "assistant", "content": None, "tool_calls": [CALL]}])
    if probe.render(question, tools=[TOOL]) not in (None, probe.render(question)) or "Marker-CALL" in (call or ""):
        yield "tools: the template writes a row's tools or their calls; rows with them need use_hf_chat_templates"
    if probe.switches:
        yield f"switches: the template may be given {', '.join(probe.switches)}; a prompt_format does without"
    thought = [*question, {**_message("assistant", 0), "reasoning_content": "Marker-THOUGHT"}]
    if "Marker-THOUGHT" in (probe.render(thought) or ""):
        yield "reasoning_content: the template writes this key of a message; plain templates know content alone"
    if not probe.takes_system:
        yield (
            "system messages: the template refuses them; plain templates write them into the first user turn, "
            "followed by an empty line, which the template says nothing about"
        )
    elif probe.render([{"role": "system", "content": ""}, *question]) not in (None, probe.render(question)):
        yield "system messages: the template writes an empty one too; a prompt_format leaves it out"
    late = [*question, _message("assistant", 0), _message("system", 0), _message("user", 1)]
    text = probe.render(late) or ""
    if probe.takes_system and MARKERS["user"][0] in text.partition(MARKERS["system"][0])[0]:
        yield "system messages: one that comes late is written where it stands; a prompt_format moves it to the front"
    if probe.render([*question, _message("user", 1)]) is None:
        yield "turns: the template refuses two messages of a role in a row; a prompt_format writes them"
    if probe.template.stray_suffix:
        yield (
            f"generation prompt: the template always ends in {probe.template.stray_suffix!r}, asked for or not; as a "
            "prompt_format, only where an answer is asked for"
        )
