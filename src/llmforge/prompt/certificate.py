"""Certifies training samples: gives every token a reason, and compares what was trained with what a server would do.

Nothing here asks the encoder. The server's tokenizer and chat template say which ids a prompt has; what lies behind it
is the completion; and from these alone follows which tokens must carry loss.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmforge.data.conversation import REASONING_KEYS
from llmforge.data.samples import Sample
from llmforge.errors import ConversationError
from llmforge.prompt.conversation import Message, Turn, check_messages
from llmforge.prompt.encoder import Format, Trained, own_bos
from llmforge.prompt.format import PromptFormat
from llmforge.prompt.served import Served, side_by_side
from llmforge.prompt.stopping import StopRules

Reason = Literal["bos", "prompt", "trained", "end of turn", "weight 0", "truncated", "pad"]
Check = Literal["parity", "mask", "stop", "round_trip"]

ANCHOR_TOKENS = 8  # decoded in front of a completion, so that its first token keeps its leading space


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be; `code` is stable, `message` is for a person and may have several lines."""

    check: Check
    code: str
    message: str


@dataclass(slots=True)
class Certificate:
    """What was looked at, and what was found.

    `tokens` counts tokens by reason. `turns` counts trained assistant turns, of which `whole_turns` are not cut off by
    the context length, and `exact_turns` decode to the completion character for character (the others hold text that
    the tokenizer itself does not keep). `prompts` were compared with the server's, id for id. `early_stops` are turns
    with a stop inside the assistant's own text. `token_stops` end in a stop token, which every server honours.
    """

    rows: int = 0
    samples: int = 0
    turns: int = 0
    whole_turns: int = 0
    exact_turns: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    token_stops: int = 0
    early_stops: int = 0
    tokens: Counter[Reason] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Trace:
    """A sample whose tokens each have the reason and the weight that follow from what a server does."""

    reasons: list[Reason]
    weights: list[float]


class Certifier:
    """Examines rows one after another.

    Args:
        served: the artifact's tokenizer as a server uses it.
        format: what training rendered with.
        stop: where generation ends, as exported.
        trained: which tokens the task trains.
        context_length: tokens at which samples were cut off; None if they were not.
    """

    def __init__(
        self, served: Served, format: Format, stop: StopRules, trained: Trained, context_length: int | None = None
    ) -> None:
        self._served = served
        self._format = format
        self._stop = stop
        self._trained = trained
        self._context_length = context_length
        self.certificate = Certificate()

    def examine(
        self,
        row: Mapping[str, Any],
        samples: Sequence[Sample],
        place: str,
        *,
        batch_weights: Sequence[Sequence[float]] | None = None,
        dropped: int = 0,
    ) -> list[Trace]:
        """Compare the samples that a row was trained as with what follows from the row; note what is wrong.

        Args:
            row: `messages`, optionally `tools`.
            samples: as the data set gives them, in order.
            place: says where the row is from, for messages.
            batch_weights: the loss weights of each sample as they stand in a batch; by default the samples' own.
            dropped: how many samples of the row the ledger says were left out.
        """
        self.certificate.rows += 1
        self.certificate.samples += len(samples)
        weights = batch_weights or [sample.loss_weights for sample in samples]
        before = len(self.certificate.findings)
        if self._trained == "everything":
            traces = self._document(row, samples, place)
        else:
            traces = self._turns(row, samples, place, dropped)
        for sample, actual, trace in zip(samples, weights, traces, strict=True):
            if len(self.certificate.findings) == before:  # of other ids there is no telling which should count
                self._compare_weights(sample, actual, trace, place)
            self.certificate.tokens.update(trace.reasons)
        return traces

    def check_bos(self, sample: Sample, place: str) -> None:
        """Note a sample that begins with two BOS tokens, whoever wrote them: training and serving may agree on it."""
        bos = self._served.tokenizer.bos_token_id
        if _doubled(sample.input_ids, bos):
            self._find(
                "parity",
                "second_bos",
                f"{place}: a second BOS: the sample begins with {self._served.decode([bos])!r} twice, which the base "
                "model has never seen. Write it in one place only: prompt_format.bos, the other templates, or the data",
            )

    def compare_prompt(self, messages: Sequence[Message], tools: Any, trained_ids: Sequence[int], place: str) -> None:
        """Compare a prompt's ids with the server's; note where they part."""
        self.certificate.prompts += 1
        self.certificate.prompt_tokens += len(trained_ids)
        try:
            served_ids = self._served.ids(messages, tools)
        except ConversationError as error:
            self._find("parity", "refused", f"{place}: the saved chat template refuses what was trained on: {error}")
            return
        if list(trained_ids) != served_ids:
            self._differs(place, trained_ids, served_ids)

    def _document(self, row: Mapping[str, Any], samples: Sequence[Sample], place: str) -> list[Trace]:
        """Trace rows of which every token is trained: a plain document, or the whole conversation."""
        messages = row["messages"]
        check_messages(messages)
        if len(messages) == 1 and messages[0]["role"] == "user":
            tokenizer = self._served.tokenizer
            bos = self._format.bos if isinstance(self._format, PromptFormat) else own_bos(tokenizer)
            expected = self._served.encode(bos + messages[0]["content"] + (tokenizer.eos_token or ""))
        else:
            text = self._served.text(messages, row.get("tools"), add_generation_prompt=False)
            expected = self._served.encode(text.removesuffix(self._served.template.stray_suffix))
        self.certificate.prompts += 1
        self.certificate.prompt_tokens += len(expected)
        traces = []
        for sample in samples:
            cut = expected[: len(sample.input_ids)] if self._is_cut(sample) else expected
            if list(sample.input_ids) != cut:
                self._differs(place, sample.input_ids, cut)
            self.certificate.tokens["truncated"] += len(expected) - len(cut)
            reasons: list[Reason] = ["trained"] * len(sample.input_ids)
            self._mark_bos(sample, reasons)
            traces.append(Trace(reasons, [0.0, *[1.0] * (len(sample.input_ids) - 1)]))
        return traces

    def _turns(self, row: Mapping[str, Any], samples: Sequence[Sample], place: str, dropped: int) -> list[Trace]:
        """Trace the assistant turns of a row through its samples."""
        messages, tools = self._ordered(row["messages"]), row.get("tools")
        turns = (
            self._format.turns(messages)
            if isinstance(self._format, PromptFormat)
            else self._format.turns(messages, tools)
        )
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        traces = [Trace(["prompt"] * len(s.input_ids), [0.0] * len(s.input_ids)) for s in samples]
        for sample, trace in zip(samples, traces, strict=True):
            self._mark_bos(sample, trace.reasons)
        current = 0
        for number, (index, turn) in enumerate(zip(answers, turns, strict=True), 1):
            where = f"{place}, assistant turn {number}"
            prompt_ids = self._prompt_ids(messages[:index], tools, turn, where)
            found = next((n for n in range(current, len(samples)) if _begins(samples[n].input_ids, prompt_ids)), None)
            if found is None:
                if turn.weight and turn.completion:
                    self._lost_turn(samples[current:], prompt_ids, turn, where, dropped)
                continue
            current = found
            self._trace_turn(samples[found], traces[found], prompt_ids, turn, messages[index], where)
        if turns:
            self._compare_whole(messages[: answers[-1] + 1], tools, turns[-1], place)
        return traces

    def _compare_whole(self, messages: Sequence[Message], tools: Any, last: Turn, place: str) -> None:
        """Compare a conversation up to its last answer as it was trained with how the saved template writes it."""
        if not last.is_as_written:
            return  # the template drops what was thought, or goes on behind its generation mark
        try:
            text = self._served.text(messages, tools, add_generation_prompt=False)
        except ConversationError as error:
            if any(message["role"] == "user" for message in messages):
                self._find("parity", "refused", f"{place}: the saved chat template refuses this conversation: {error}")
            return
        served, trained = text.removesuffix(self._served.template.stray_suffix), last.prompt + last.completion
        if served != trained:
            self._differs(f"{place}, whole conversation", self._served.encode(trained), self._served.encode(served))

    def _prompt_ids(self, messages: Sequence[Message], tools: Any, turn: Turn, where: str) -> list[int]:
        """Give the ids that a server feeds the model for a turn."""
        try:
            ids = self._served.ids(messages, tools) if messages else self._served.encode(turn.prompt)
        except ConversationError as error:
            if any(message["role"] == "user" for message in messages):
                self._find("parity", "refused", f"{where}: the saved chat template refuses its prompt: {error}")
            return self._served.encode(turn.prompt)  # nobody can ask for an answer to no question
        self.certificate.prompts += 1
        self.certificate.prompt_tokens += len(ids)
        return ids

    def _trace_turn(
        self, sample: Sample, trace: Trace, prompt_ids: list[int], turn: Turn, message: Message, where: str
    ) -> None:
        """Mark a turn's completion in its sample; check its ids, its text, and that it ends in a stop."""
        start = len(prompt_ids)
        whole = self._served.encode(turn.prompt + turn.completion)
        joins = whole[:start] == prompt_ids
        room = len(sample.input_ids) - start
        # Where text merges across the boundary, generation starts there all the same: the text must be right.
        completion = whole[start:] if joins else self._covering(sample.input_ids[start:], prompt_ids, turn.completion)
        is_whole = len(completion) <= room
        kept = completion[: max(room, 0)]
        actual = list(sample.input_ids[start : start + len(kept)])
        if actual != kept and not turn.weight:
            return  # a sample of its own, left out as nothing in it is trained; here it is history, and rewritten
        if actual != kept:
            self._differs(where, list(sample.input_ids[: start + len(kept) + 4]), [*prompt_ids, *kept])
            return
        ending_text = self._ending(turn, message)
        ending = self._ending_tokens(completion, ending_text)
        for offset in range(len(kept)):
            is_end = offset >= len(completion) - ending
            trace.reasons[start + offset] = ("end of turn" if is_end else "trained") if turn.weight else "weight 0"
            trace.weights[start + offset] = turn.weight
        if start == 0 and trace.weights:
            trace.weights[0] = 0.0
        self.certificate.tokens["truncated"] += len(completion) - len(kept)
        if not turn.weight:
            return
        self.certificate.turns += 1
        if not is_whole:
            return
        self.certificate.whole_turns += 1
        is_exact = self._text_behind(prompt_ids, completion) == turn.completion
        self.certificate.exact_turns += is_exact
        # Some tokenizers write a space behind every special token: what is kept is what they make of the text alone.
        own = self._served.decode(self._served.encode(turn.completion))
        if not is_exact and not joins and self._text_behind(prompt_ids, completion).strip(" ") != own.strip(" "):
            self._find(
                "mask",
                "text",
                f"{where}: the trained tokens read {self._text_behind(prompt_ids, completion)[:120]!r}, but the "
                f"completion is {turn.completion[:120]!r}",
            )
        self._check_stop(completion, turn, message, ending_text, where)

    def _check_stop(self, completion: list[int], turn: Turn, message: Message, ending: str, where: str) -> None:
        """Check that the turn ends where the exported stop rules end generation, and not before."""
        tokens = [index for index, token in enumerate(completion) if token in self._stop.token_ids]
        texts = [
            turn.completion.index(sequence) + len(sequence)
            for sequence in self._stop.sequences
            if sequence in turn.completion
        ]
        if not tokens and not texts:
            stops = [repr(sequence) for sequence in self._stop.sequences]
            stops += [f"{self._served.decode([token])!r} ({token})" for token in self._stop.token_ids]
            self._find(
                "stop",
                "no_stop",
                f"{where} ends in {turn.completion[-40:]!r}, and generation ends only at "
                f"{', '.join(stops) or 'nothing'}: the model will not stop. End `assistant` in the EOS or another "
                "end-of-turn token, or name what ends a turn in generation_config.stopping_sequences",
            )
            return
        self.certificate.token_stops += bool(tokens)
        unreachable = [turn.completion[min(texts) :]] if texts else []
        unreachable += [self._served.decode(completion[tokens[0] + 1 :])] if tokens else []
        longest = max(unreachable, key=len)
        own = _own_texts(message)
        # Behind the first place where the last of them stands: a short text may stand in the ending again.
        behind = turn.completion.partition(own[-1])[2] if own and own[-1] in turn.completion else turn.completion
        begins = len(turn.completion) - len(longest)
        stop = next((text for text in self._stop_texts() if turn.completion.endswith(text, 0, begins)), None)
        if len(longest.strip()) > len(behind.strip()) and stop and not _says(message, turn, stop, begins):
            self._find(
                "stop",
                "stops_inside",
                f"{where}: generation ends at {stop!r}, which the format writes inside the turn, in front of "
                f"{longest[:60]!r}: the model can never give the answer that it was trained on. Take it out of the "
                "stops, or, if it is the EOS token, let the format write another one there",
            )
        else:
            self.certificate.early_stops += any(len(text.strip()) > len(ending.strip()) for text in unreachable)

    def _stop_texts(self) -> list[str]:
        """Give what ends generation, as text."""
        return [*self._stop.sequences, *(self._served.decode([token]) for token in self._stop.token_ids)]

    def _compare_weights(self, sample: Sample, actual: Sequence[float], trace: Trace, place: str) -> None:
        """Compare the weights that the loss uses with those that follow; say what kind of mistake a difference is."""
        wrong = [index for index, (a, e) in enumerate(zip(actual, trace.weights, strict=True)) if a != e]
        if not wrong:
            return
        first = wrong[0]
        reason = trace.reasons[first]
        shown = self._tokens_around(sample.input_ids, first)
        pad = self._served.tokenizer.pad_token_id
        if reason in ("prompt", "bos", "weight 0"):
            code, what = "prompt_trained", f"a token that must not be trained ({reason}) carries loss"
        elif not any(actual):
            code, what = "nothing_trained", "no token of it is trained, though an assistant turn should be"
        elif all(trace.reasons[index] == "end of turn" for index in wrong):
            code, what = "end_untrained", "the end of a turn is not trained, so the model will not learn to stop"
        else:
            code, what = "untrained", "a token that the model has to produce is not trained"
        if code != "prompt_trained" and pad is not None and all(sample.input_ids[index] == pad for index in wrong):
            code = "pad_is_eos"
            what = (
                f"{self._served.decode([pad])!r} ends a turn and is the padding token too, and was masked as padding, "
                "so the model will not learn to stop"
            )
        self._find("mask", code, f"{place}: {what}. {len(wrong)} tokens, the first at {first}: {shown}")

    def _lost_turn(
        self, samples: Sequence[Sample], prompt_ids: list[int], turn: Turn, where: str, dropped: int
    ) -> None:
        """Account for a turn that no sample holds: cut off by the context length, left out, or else a mistake."""
        is_cut = any(self._is_cut(sample) and _begins(prompt_ids, sample.input_ids) for sample in samples)
        is_beyond = self._context_length is not None and len(prompt_ids) >= self._context_length
        if is_cut or is_beyond or dropped:
            self.certificate.tokens["truncated"] += len(self._served.encode(turn.completion))
        elif not samples:
            self._find("mask", "nothing_trained", f"{where} is not trained: the row has no sample")
        else:
            best = max(samples, key=lambda sample: _shared(sample.input_ids, prompt_ids))
            self._differs(where, best.input_ids, prompt_ids)

    def _differs(self, where: str, trained_ids: Sequence[int], served_ids: Sequence[int]) -> None:
        bos = self._served.tokenizer.bos_token_id
        doubled = [name for name, ids in (("training", trained_ids), ("serving", served_ids)) if _doubled(ids, bos)]
        why = f" ({doubled[0]} puts a second BOS in front)" if len(doubled) == 1 else ""
        self._find(
            "parity",
            "second_bos" if len(doubled) == 1 else "ids_differ",
            f"{where}: training and serving use different token ids{why}: "
            f"{side_by_side(list(trained_ids), list(served_ids), self._served.decode)}",
        )

    def _find(self, check: Check, code: str, message: str) -> None:
        self.certificate.findings.append(Finding(check, code, message))

    def _ordered(self, messages: Sequence[Message]) -> list[Message]:
        """Put the system message where a plain format writes it, so that prefixes hold it."""
        if not isinstance(self._format, PromptFormat):
            return list(messages)
        return sorted(messages, key=lambda message: message["role"] != "system")

    def _mark_bos(self, sample: Sample, reasons: list[Reason]) -> None:
        bos = self._served.tokenizer.bos_token_id
        if bos is not None and list(sample.input_ids[:1]) == [bos]:
            reasons[0] = "bos"

    def _is_cut(self, sample: Sample) -> bool:
        return self._context_length is not None and len(sample.input_ids) >= self._context_length

    def _covering(self, input_ids: Sequence[int], prompt_ids: list[int], text: str) -> list[int]:
        """Give the ids at the front of `input_ids` that decode to `text` behind a prompt; all of them if none do."""
        guess = len(self._served.encode(text))
        nearest = sorted(range(len(input_ids) + 1), key=lambda count: abs(count - guess))
        for count in nearest[:64]:
            if self._text_behind(prompt_ids, list(input_ids[:count])) == text:
                return list(input_ids[:count])
        return list(input_ids[:guess])

    def _ending(self, turn: Turn, message: Message) -> str:
        """Give the text of a completion that follows the assistant's own."""
        if isinstance(self._format, PromptFormat):
            return self._format.assistant.rpartition("{instruction}")[2]
        content = (message["content"] or "").strip()
        return turn.completion.rpartition(content)[2] if content else turn.completion

    def _ending_tokens(self, completion: list[int], ending: str) -> int:
        """Count the tokens at the end of a completion that hold its ending."""
        count = 0
        while count < len(completion) and len(self._served.decode(completion[len(completion) - count :])) < len(ending):
            count += 1
        return count

    def _text_behind(self, prompt_ids: list[int], ids: list[int]) -> str:
        anchor = prompt_ids[-ANCHOR_TOKENS:]
        return self._served.decode([*anchor, *ids])[len(self._served.decode(anchor)) :]

    def _tokens_around(self, input_ids: Sequence[int], place: int) -> str:
        start = max(0, place - 2)
        tokens = [f"{token} {self._served.decode([token])!r}" for token in input_ids[start : place + 3]]
        tokens[place - start] = f"» {tokens[place - start]} «"
        return " | ".join(tokens)


def _own_texts(message: Message) -> list[str]:
    """Give what an assistant message itself says, in the order in which templates write it."""
    thoughts = [message.get(key) for key in REASONING_KEYS]
    calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    said = [*thoughts, message.get("content"), *(call.get("name") for call in calls if isinstance(call, Mapping))]
    return [text.strip() for text in said if isinstance(text, str) and text.strip()]


def _says(message: Message, turn: Turn, stop: str, ends: int) -> bool:
    """Say whether a stop that ends at this place of a completion may be the assistant's own, and not the format's."""
    start = ends - len(stop)
    own = _own_texts(message)
    if any((stop.strip() or stop) in text for text in [*own, json.dumps(message, ensure_ascii=False, default=str)]):
        return True
    places = [match.span() for text in own for match in re.finditer(re.escape(text), turn.completion)]
    return any(begins <= start < after for begins, after in places)


def _begins(ids: Sequence[int], beginning: Sequence[int]) -> bool:
    return len(ids) > len(beginning) and list(ids[: len(beginning)]) == list(beginning)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _doubled(ids: Sequence[int], bos: int | None) -> bool:
    return bos is not None and list(ids[:2]) == [bos, bos]
