"""From token ids to text, token by token: what is shown is never taken back, and nothing of a stop sequence is shown.

However an answer's tokens arrive, all that is shown of it together is what decoding them at once would give, cut at the
first stop sequence. The cost of a token does not grow with the answer.
"""

import re
from collections.abc import Sequence, Set

from llmforge.prompt import Encoder, StopRules

_ANCHOR = 8  # tokens of the prompt that are decoded in front of an answer: its first token keeps its leading space
_WINDOW = 24  # tokens that are decoded at once, but for those whose text is still open
_OPEN = 64  # open tokens from which on the text is looked at less often
_OFTEN = 16
_CHARACTER = 4  # bytes, and so tokens, of the longest character
_HALF = "\ufffd"  # what decoders write for the bytes of half a character
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """The text of one answer as its tokens come.

    After `push` or `finish`, `is_stopped` says whether a stop sequence has ended the text, `shown` how many characters
    were given out, and `settled` how many there are, but for those that further tokens may change.

    Args:
        byte_tokens: of `find_byte_tokens`.
        prompt_ids: what the answer continues.
    """

    def __init__(self, encoder: Encoder, stop: StopRules, byte_tokens: Set[int], prompt_ids: Sequence[int]) -> None:
        self._stop = stop
        self._decoder = _Decoder(encoder, byte_tokens, prompt_ids)
        self._held = ""  # settled, but it may turn out to begin a stop sequence
        self.shown = 0
        self.is_stopped = False

    @property
    def settled(self) -> int:
        return self.shown + len(self._held)

    def push(self, token: int) -> str:
        """Take a token; give the text that can be shown now."""
        settled, open_ = self._decoder.push(token)
        return self._show(settled, open_)

    def finish(self) -> str:
        """Give what was held back, as no token follows; half a character is shown as U+FFFD."""
        text = self._show(self._decoder.finish(), "")
        if not self.is_stopped:
            text += self._held
            self.shown += len(self._held)
            self._held = ""
        return text

    def _show(self, settled: str, open_: str) -> str:
        self._held += settled
        whole = self._held + open_
        text = self._stop.cut(whole)
        if len(text) < len(whole):
            self.is_stopped = True
        else:
            text = self._held[: len(self._held) - self._stop.held_back(self._held)]
        self._held = "" if self.is_stopped else self._held[len(text) :]
        self.shown += len(text)
        return text


class _Decoder:
    """Decodes an answer's tokens behind some that came before, and tells which text no further token can change.

    Text is open while it may end in half a character, and, where a tokenizer spells characters in byte tokens
    (SentencePiece), as long as such tokens come: one that does not fit makes all of them unreadable.
    """

    def __init__(self, encoder: Encoder, byte_tokens: Set[int], prompt_ids: Sequence[int]) -> None:
        self._encoder = encoder
        self._bytes = byte_tokens
        self._settled = self._length = 0  # tokens of the window, and characters of its text
        end = len(prompt_ids)
        while end and prompt_ids[end - 1] in self._bytes:  # an answer's bytes make no character with them
            end -= 1
        self._window = list(prompt_ids[max(end - _ANCHOR, 0) : end])
        self._settle(encoder.decode(self._window))

    def push(self, token: int) -> tuple[str, str]:
        """Take a token; give the text that it settles and the text that is open behind it, as it reads now."""
        if self._encoder.tokenizer.convert_ids_to_tokens(token) is None:  # models have more rows than there are tokens
            return "", ""
        self._window.append(token)
        count = len(self._window) - self._settled
        if token in self._bytes:
            often = count <= _OPEN or count % _OFTEN == 0
            return "", self._encoder.decode(self._window)[self._length :] if often else ""
        text = self._encoder.decode(self._window)
        tail = text[self._length :]
        if not text.endswith(_HALF):
            self._settle(text)
            return tail, ""
        if count > 2 * _CHARACTER:
            return self._settle_part(text)
        return "", tail

    def finish(self) -> str:
        """Give the text that is open, as no token follows."""
        text = self._encoder.decode(self._window)
        tail = text[self._length :]
        self._settle(text)
        return tail

    def _settle(self, text: str) -> None:
        """Take all text for settled; forget tokens that are not needed as context any more."""
        if len(self._window) > _WINDOW and len(text) > self._length:
            self._window = self._window[self._settled :]
            text = self._encoder.decode(self._window)
        self._settled, self._length = len(self._window), len(text)

    def _settle_part(self, text: str) -> tuple[str, str]:
        """Settle the text of bytes that are no characters, however many of them come, but for the last ones."""
        before = self._length
        for count in range(_CHARACTER, 2 * _CHARACTER):
            first = self._encoder.decode(self._window[:-count])
            if text.startswith(first):
                last = self._window[-count:]
                del self._window[-count:]
                self._settle(first)
                self._window += last
                return first[before:], text[len(first) :]
        return "", text[before:]


def find_byte_tokens(encoder: Encoder) -> frozenset[int]:
    """Find the tokens that stand for one byte of a character that the vocabulary lacks."""
    return frozenset(token for text, token in encoder.tokenizer.get_vocab().items() if _BYTE.fullmatch(text))
