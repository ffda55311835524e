"""Answers without a client: one conversation as it is written, or many, as fast as the engine takes them."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from llmforge.prompt import Message
from llmforge.serve.model import Answer, ServedModel


def stream(model: ServedModel, messages: Sequence[Message], options: Mapping[str, Any]) -> Iterator[str]:
    """Answer a conversation, giving the text piece by piece.

    Args:
        options: as transformers' `generate` names them; see `ServedModel.options`.

    Raises:
        InputError: an option that an answer does not have.
        ConversationError: the format cannot render the messages.
    """
    answer = model.answer(model.encode(messages), model.options(**options))
    return (piece.text for piece in answer if piece.text)


def answer_all(
    model: ServedModel, prompts: Sequence[Sequence[int]], options: Mapping[str, Any], *, at_once: int
) -> Iterator[tuple[int, str]]:
    """Answer prompts, so many at once; give each one's place and its answer, in the order in which they are ready.

    Whoever stops reading cancels what is being answered.
    """
    sampling = model.options(**options)
    waiting = iter(enumerate(prompts))
    running: dict[Future[str], tuple[int, Answer]] = {}
    # Twice as many, so that the engine finds one waiting whenever one ends.
    with ThreadPoolExecutor(2 * at_once) as readers:
        try:
            while True:
                for place, ids in islice(waiting, 2 * at_once - len(running)):
                    answer = model.answer(ids, sampling)
                    running[readers.submit(_read, answer)] = place, answer
                if not running:
                    return
                for ready in wait(running, return_when=FIRST_COMPLETED).done:
                    place, _ = running.pop(ready)
                    yield place, ready.result()
        finally:
            for _, answer in running.values():
                answer.cancel()


def _read(answer: Answer) -> str:
    return "".join(piece.text for piece in answer)
