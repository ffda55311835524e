"""Formats written as Jinja chat templates: the tokenizer's own, or one from the config.

A template says how a conversation looks, not which part of it the model produced. That is found by rendering prefixes
of the conversation: with a generation prompt up to an assistant turn, and without one up to its end. Where the template
has `{% generation %}` marks, a turn ends with them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2

from llmforge.data.conversation import REASONING_KEYS
from llmforge.errors import ConversationError, PromptFormatError
from llmforge.prompt.conversation import Message, Turn, check_messages, common_prefix_length, weight_of

PROBES = ("Probe-Alpha-1", "Probe-Beta-2", "Probe-Gamma-3", "Probe-Delta-4")
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "Word."}}},
    },
}
PROBE_ARGUMENTS = {"word": "Probe-Epsilon-5"}
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
OPENING_TAG = re.compile(r"(?:<\w+>|\[[A-Z]+\])(?=\s*\Z)")
END_OF_THINKING = re.compile(r"</\w+>|\[/[A-Z]+\]|<\|?\w*(?:end|END)\w*\|?>|<\w+\|>")
EMPTY_THOUGHT = re.compile(rf"\s*(<[^<>]+>|\[[A-Z]+\])\w*\s*({END_OF_THINKING.pattern})\s*")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, rendered in transformers' sandbox by the tokenizer it belongs to.

    `from_tokenizer` says whether the source is the tokenizer's own template. `stray_suffix` is text that the template
    writes after a finished assistant turn although it belongs to the next one (Llama 3's first release opens an
    assistant header whether or not a generation prompt is asked for).
    """

    source: str
    tokenizer: Any
    from_tokenizer: bool
    stray_suffix: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stray_suffix", "")
        object.__setattr__(self, "stray_suffix", self._find_stray_suffix())

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Render a conversation as text.

        With `continue_final_message` the last message, of the assistant, is left open for the model to go on.

        Raises:
            ConversationError: the messages are malformed, the template refuses them, or it has no place for tools.
            PromptFormatError: the template is not valid Jinja, or tries to leave the sandbox.
        """
        check_messages(messages, continue_final_message=continue_final_message)
        if tools and not self._writes_tools:
            named = self.tokenizer.chat_template
            others = [name for name in named if name != "default"] if isinstance(named, dict) else []
            raise ConversationError(
                "the row has tools, of which the chat template writes nothing"
                + (f"; give the tokenizer's template {others[0]} as prompt_format.chat_template" if others else "")
            )
        return self._apply(
            self._visible(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
        )

    def _apply(self, visible: Sequence[Mapping[str, Any]], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(visible, chat_template=self.source, tokenize=False, **options)
        except jinja2.TemplateSyntaxError as error:
            raise PromptFormatError(
                f"the chat template is not valid Jinja: {error.message} (line {error.lineno})"
            ) from error
        except jinja2.exceptions.SecurityError as error:
            raise PromptFormatError(f"the chat template reaches for what the sandbox forbids: {error}") from error
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConversationError(f"the chat template refuses this conversation: {error}") from error

    def _visible(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Give messages as the template takes them: without `weight`, which is for the loss, and calls in its style.

        What is None is left out, as transformers does.
        """
        visible = [
            {key: value for key, value in message.items() if key != "weight" and value is not None}
            for message in messages
        ]
        for message in visible:
            if message.get("tool_calls"):
                needs_content, as_mapping = self._call_style
                if needs_content:
                    message.setdefault("content", "")
                message["tool_calls"] = [_with_arguments(call, as_mapping) for call in message["tool_calls"]]
        return visible

    @cached_property
    def _call_style(self) -> tuple[bool, bool]:
        """Find how the template takes a message with tool calls: must it have content, are arguments a mapping?

        OpenAI's rows hold arguments as a JSON string and null as content. vLLM gives templates a mapping, which
        transformers' documentation asks for; a template that cannot write one gets the string.
        """
        for as_mapping in (True, False):
            arguments = PROBE_ARGUMENTS if as_mapping else json.dumps(PROBE_ARGUMENTS)
            call = {"id": "probe0001", "type": "function", "function": {"name": "probe", "arguments": arguments}}
            for content in ({}, {"content": ""}):
                called: Message = {"role": "assistant", **content, "tool_calls": [call]}
                messages = [{"role": "user", "content": PROBES[0]}, called]
                try:
                    text = self._apply(messages, tools=[PROBE_TOOL])
                except ConversationError:
                    continue
                if PROBE_ARGUMENTS["word"] in text and str(PROBE_ARGUMENTS) not in text:
                    return bool(content), as_mapping
        return True, True

    @cached_property
    def _writes_tools(self) -> bool:
        """Say whether tools change what the template writes; where it refuses the probe, the row's own will show."""
        question = [{"role": "user", "content": PROBES[0]}]
        try:
            return self._apply(question, tools=[PROBE_TOOL]) != self._apply(question)
        except ConversationError:
            return True

    def turns(self, messages: Sequence[Message], tools: Sequence[Mapping] | None = None) -> list[Turn]:
        """Split a conversation into its assistant turns by rendering its prefixes.

        Raises:
            ConversationError: the template refuses a prefix, or leaves out or changes what the assistant said.
            PromptFormatError: the text that the template writes for generation is not how it begins the turn.
        """
        check_messages(messages)
        turns = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            written = self.render(messages[: index + 1], False, tools)
            whole = written.removesuffix(self.stray_suffix)
            prompt = self.render(messages[:index], True, tools) if index else self._opening(whole)
            turn = self._turn(prompt, whole, messages[: index + 1])
            if turn.is_as_written and self._has_marks:
                turn = self._up_to_mark(turn, messages[: index + 1], tools)
            turns.append(turn)
        return turns

    def _turn(self, prompt: str, whole: str, messages: Sequence[Message]) -> Turn:
        """Cut a turn out of the conversation that it ends, and check that all that was said is in it."""
        message = messages[-1]
        turn = self._cut(prompt, whole, messages)
        if turn is None:
            raise self._disagreement(prompt, whole, message)
        said = message.get("content") or ""
        opened = OPENING_TAG.search(prompt)  # what the server writes of the answer
        if not _holds((opened[0] if opened else "") + turn.completion, said):
            restored = _with_thinking(prompt, whole, message)
            if restored is None:
                raise ConversationError(
                    f"the chat template changes the assistant's text: {said[:60]!r} became {turn.completion[:90]!r}"
                )
            turn = restored
        reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
        if not _holds(turn.completion, reasoning):
            others = [key for key in REASONING_KEYS if key not in message and key in self.source]
            raise ConversationError(
                f"the chat template leaves out the assistant's reasoning ({reasoning[:60]!r}); put it into "
                + (f"{others[0]}, which the template reads" if others else "content, between the tags of thoughts")
            )
        for call in message.get("tool_calls") or ():
            name = (call.get("function") or call).get("name", "")
            if name not in turn.completion:
                raise ConversationError(f"the chat template leaves out the assistant's call of {name}")
        return turn

    def _cut(self, prompt: str, whole: str, messages: Sequence[Message]) -> Turn | None:
        """Find what the model has to produce behind a prompt, in the text of the conversation that it ends."""
        *before, message = messages
        if whole.startswith(prompt):
            return Turn(prompt, whole[len(prompt) :], weight_of(message))
        return (
            _with_thinking(prompt, whole, message)
            or _behind_last(prompt, whole, before, message)
            or self._behind_empty_thought(prompt, whole, message)
        )

    def _behind_empty_thought(self, prompt: str, whole: str, message: Message) -> Turn | None:
        """Cut a turn that does not think out of its conversation, or return None.

        Some prompts end in an empty thought to ask for such an answer, and conversations do not show it (Gemma 4), or
        only its end (DeepSeek V3.2). What is shared up to there ends between two tokens: tags begin alike.
        """
        asked, written = self.tokenizer([prompt, whole], add_special_tokens=False, verbose=False)["input_ids"]
        shared = self.tokenizer.decode(
            asked[: common_prefix_length(asked, written)], clean_up_tokenization_spaces=False
        )
        if not (prompt.startswith(shared) and whole.startswith(shared)):
            return None  # the tokenizer does not keep text as it is
        thought, completion = prompt[len(shared) :], whole[len(shared) :]
        if closed := EMPTY_THOUGHT.fullmatch(thought):
            tag, completion = closed[1], completion.removeprefix(closed[2])
        elif (opened := OPENING_TAG.fullmatch(thought.strip())) and completion.startswith(_closing(opened[0])):
            tag = opened[0]
        else:
            return None
        thinks = tag in (message.get("content") or "")
        return None if thinks else Turn(prompt, completion, weight_of(message), is_as_written=False)

    @cached_property
    def _has_marks(self) -> bool:
        return GENERATION_MARK.search(self.source) is not None

    def _up_to_mark(self, turn: Turn, messages: Sequence[Message], tools: Sequence[Mapping] | None) -> Turn:
        """End a turn where the template's last `{% generation %}` mark in it ends; an unmarked one is not trained.

        What stands in front of it is the server's part, marked or not.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        _, (marks,) = render_jinja_template(
            [self._visible(messages)],
            tools=list(tools) if tools else None,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        start = len(turn.prompt)
        end = max((end for _, end in marks if end > start), default=None)
        if end is None:
            return Turn(turn.prompt, turn.completion, 0.0)
        completion = turn.completion[: end - start]
        return Turn(turn.prompt, completion, turn.weight, is_as_written=completion == turn.completion)

    def _opening(self, whole: str) -> str:
        """Give how a conversation that the assistant begins is opened: no prefix of it can be rendered."""
        question = [{"role": "user", "content": PROBES[0]}]
        try:
            header = self.stray_suffix or self.render(question, True).removeprefix(self.render(question, False))
        except ConversationError:
            return ""
        return whole[: whole.index(header) + len(header)] if header and header in whole else ""

    def _disagreement(self, prompt: str, whole: str, message: Message) -> ConversationError | PromptFormatError:
        """Say that a generation prompt does not begin its turn: the format's error, unless another answer works."""
        where = f"it asks for an answer with {prompt[-60:]!r}, but writes {whole[max(0, len(prompt) - 60) :][:90]!r}"
        if self._can_continue(PROBES[1]):
            return ConversationError(f"the chat template does not write this conversation as it continues it: {where}")
        if (tag := OPENING_TAG.search(prompt)) and self._can_continue(
            f"{tag[0]}\n{PROBES[2]}\n{_closing(tag[0])}\n\n{PROBES[1]}"
        ):
            return ConversationError(
                f"the chat template's generation prompt opens {tag[0]}, and this answer does not think: "
                f"{(message.get('content') or '')[:60]!r}. Begin it with {tag[0]}, or write the format out as "
                "generation_config.prompt_format with a trailing_assistant that opens nothing"
            )
        return PromptFormatError(
            f"the chat template's generation prompt is not how it begins an assistant turn: {where}. "
            "Write the format out as generation_config.prompt_format with system, user, assistant and "
            "trailing_assistant, or give a template of your own as prompt_format.chat_template"
        )

    def _can_continue(self, answer: str) -> bool:
        """Say whether the template, given an answer to a plain question, writes it as it asks for it."""
        question = [{"role": "user", "content": PROBES[0]}]
        message = {"role": "assistant", "content": answer}
        try:
            prompt, whole = self.render(question, True), self.render([*question, message], False)
        except ConversationError:
            return False
        return self._cut(prompt, whole, [*question, message]) is not None

    def _find_stray_suffix(self) -> str:
        """Find text after a finished assistant turn that is not there once the conversation goes on.

        What is written behind a turn is the same, whether the conversation goes on or not, up to where the next header
        differs; how headers begin, the beginning of the conversation shows. Only text that also asks for an answer is
        stray: an EOS that a template writes behind the last turn alone is there to be learned.
        """
        user, assistant, next_user, next_assistant = PROBES
        conversation = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
            {"role": "user", "content": next_user},
            {"role": "assistant", "content": next_assistant},
        ]
        try:
            prompt = self.render(conversation[:1], True)
            short = self.render(conversation[:2], False)
            long = self.render(conversation, False)
        except ConversationError:
            return ""  # no such conversation can be rendered, so none can be mistaken
        if assistant not in short or assistant not in long or next_user not in long:
            return ""
        after_turn = short.rpartition(assistant)[2]
        between = long.partition(assistant)[2].partition(next_user)[0]
        if between.startswith(after_turn):
            return ""
        # Compared as tokens: `<|begin_of_text|>` and `<|eot_id|>` end in the same characters.
        opening = long.partition(user)[0].removeprefix(self.tokenizer.bos_token or "")
        opening, ending, asking = self.tokenizer([opening, between, after_turn], add_special_tokens=False)["input_ids"]
        shared = common_prefix_length(ending, asking)
        header = next(n for n in range(shared, -1, -1) if ending[shared - n : shared] == opening[:n])
        end_of_turn = self.tokenizer.decode(ending[: shared - header], clean_up_tokenization_spaces=False)
        if not end_of_turn or not after_turn.startswith(end_of_turn):
            return ""
        stray = after_turn[len(end_of_turn) :]
        asked = prompt.rpartition(user)[2]  # may go on behind it: Command A opens the answer only where it is asked for
        return stray if asked.endswith(stray) or stray in asked[1:] else ""


def _with_arguments(call: Mapping[str, Any], as_mapping: bool) -> dict[str, Any]:
    """Give a tool call with its arguments as a mapping, or as a JSON string; what is neither stays as it is."""
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], as_mapping)}
    arguments = call.get("arguments")
    if as_mapping and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except ValueError:
            parsed = None
        return {**call, "arguments": parsed if isinstance(parsed, dict) else arguments}
    if not as_mapping and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return dict(call)


def _closing(tag: str) -> str:
    """Give the tag that closes what a tag opens: `</x>`, `[/X]`."""
    return f"{tag[0]}/{tag[1:]}"


def _holds(text: str, part: str) -> bool:
    """Say whether a text holds another one, whatever the white space: templates set thinking on lines of its own."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def _with_thinking(prompt: str, whole: str, message: Message) -> Turn | None:
    """Put back the thinking that a template drops even from the answer it belongs to, or return None.

    A server's prompt may also open the thinking (`<think>`), which is then not the model's to write. What the model has
    to produce is the content as it stands in the data, and the template's end of turn.
    """
    content = (message.get("content") or "").strip()
    closings = list(END_OF_THINKING.finditer(content))
    answer = content[closings[-1].end() :].strip() if closings else ""
    written = content if content in whole else answer
    if not answer or written not in whole:
        return None
    place = whole.rindex(written)
    header, ending = whole[:place].rstrip(), whole[place + len(written) :]
    if not prompt.startswith(header):
        return None
    opened = prompt[len(header) :].strip()
    if not content.startswith(opened):
        return None
    said = content.removeprefix(opened)
    if opened and prompt[-1].isspace():
        said = said.lstrip("\n")
    return Turn(prompt, said + ending, weight_of(message), is_as_written=False)


def _behind_last(prompt: str, whole: str, before: Sequence[Message], message: Message) -> Turn | None:
    """Cut a turn out of a conversation whose history is written differently once it is answered, or return None.

    What follows the last message up to the answer must be what the server's prompt ends in.
    """
    last = (before[-1].get("content") or "").strip()
    said = (message.get("content") or "").strip()
    asking = prompt.rpartition(last)[2] if last else ""
    place = whole.rfind(last + asking, 0, whole.rindex(said) if said and said in whole else len(whole))
    if not asking or place < 0:
        return None
    return Turn(prompt, whole[place + len(last + asking) :], weight_of(message), is_as_written=False)
