"""What single tokens stand for, byte by byte: a token may be half a character."""

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Give the character by which byte-level tokenizers write each byte: itself if it can be seen, else a later one."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + index): byte for index, byte in enumerate(unseen)}


_ALPHABET = _byte_alphabet()


class TokenTexts:
    """Spells the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        self._is_byte_level = tokenizer.is_fast and "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)

    def bytes(self, token: int) -> bytes:
        """Give the bytes that a token adds to a text in whose middle it stands; none for an id without a token."""
        if token in self._added:
            return self._added[token].content.encode()
        spelled = self._tokenizer.convert_ids_to_tokens(token)
        if spelled is None:
            return b""
        if self._is_byte_level and all(character in _ALPHABET for character in spelled):
            return bytes(_ALPHABET[character] for character in spelled)
        if match := _BYTE.fullmatch(spelled):
            return bytes([int(match[1], 16)])
        return spelled.replace("\u2581", " ").encode()  # SentencePiece's sign for a space
