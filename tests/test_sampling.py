"""The next token is drawn as asked: from the right distribution, by the seed alone, within the grammar."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.errors import InputError
from llmforge.serve.requests import Sampling
from llmforge.serve.sampling import Sampler
from llmforge.serve.structured import Grammars, json_grammar

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 0.5])


def drawn(logits: torch.Tensor, times: int = 4000, **options: float) -> torch.Tensor:
    """Give the shares of tokens that are drawn one after the other."""
    sampler = Sampler(Sampling(max_tokens=times, seed=5, **options), [])  # type: ignore[arg-type]
    counts = Counter(sampler.choose(logits).id for _ in range(times))
    return torch.tensor([counts[token] / times for token in range(len(logits))])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_distribution(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, -1)
    assert (drawn(LOGITS, temperature=temperature) - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [0, 4]),
        ({"top_p": 0.7}, [0, 4]),  # 0.61 of 4 alone is less
        ({"top_p": 0.6}, [4]),
        ({"min_p": 0.1}, [0, 1, 4]),  # e^-2 = 0.14, e^-2.5 = 0.08
        ({"top_k": 3, "top_p": 0.9}, [0, 4]),  # of the three: 0.67, 0.24, 0.09
        ({"top_p": 1e-9}, [4]),
    ],
)
def test_only_the_likeliest_are_chosen_among(options: dict[str, float], kept: list[int]) -> None:
    expected = torch.zeros(len(LOGITS))
    expected[kept] = torch.softmax(LOGITS[kept], -1)
    assert (drawn(LOGITS, **options) - expected).abs().max() < 0.03


def test_top_p_of_a_flat_distribution_looks_at_more_than_the_likeliest() -> None:
    logits = torch.zeros(5000)
    sampler = Sampler(Sampling(max_tokens=1, seed=1, top_p=0.9), [])
    assert len({sampler.choose(logits).id for _ in range(3000)}) > 1500


@given(seed=st.integers(0, 2**63), temperature=st.floats(0.1, 3), top_p=st.floats(0.1, 1))
@settings(max_examples=30, deadline=None)
def test_a_seed_gives_the_same_tokens_again(seed: int, temperature: float, top_p: float) -> None:
    options = Sampling(max_tokens=9, seed=seed, temperature=temperature, top_p=top_p)
    first, second = Sampler(options, []), Sampler(options, [])
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert [first.choose(logits).id for _ in range(9)] == [second.choose(logits).id for _ in range(9)]


def test_penalties_and_biases_change_what_is_likeliest() -> None:
    def greedy(prompt: list[int] | None = None, **options: object) -> list[int]:
        sampler = Sampler(Sampling(max_tokens=4, temperature=0, **options), prompt or [])  # type: ignore[arg-type]
        return [sampler.choose(LOGITS).id for _ in range(4)]

    assert greedy() == [4, 4, 4, 4]
    assert greedy(presence_penalty=1.5) == [4, 0, 4, 4]  # 3, then 1.5 against 2, then 1.5 against 0.5
    assert greedy(frequency_penalty=0.6) == [4, 4, 0, 4]  # 3, 2.4, 1.8 against 2, 1.8 against 1.4
    assert greedy([4], repetition_penalty=2.0) == [0, 4, 4, 4]  # 1.5 of 4 against 2 of 0, then against 1
    assert greedy([3], repetition_penalty=2.0) == [4, 0, 4, 4]
    assert greedy(logit_bias={3: 5.0}) == [3, 3, 3, 3]
    assert greedy(logit_bias={4: -100.0}) == [0, 0, 0, 0]
    assert LOGITS.tolist() == [2.0, 1.0, 0.0, -1.0, 3.0, 0.5]


def test_log_probabilities_are_the_models_own() -> None:
    sampler = Sampler(Sampling(max_tokens=1, temperature=0, logprobs=2, logit_bias={2: 100.0}), [])
    token = sampler.choose(LOGITS)
    expected = torch.log_softmax(LOGITS, -1)
    assert token.id == 2
    assert token.logprob == pytest.approx(float(expected[2]))
    assert token.top == ((4, pytest.approx(float(expected[4]))), (0, pytest.approx(float(expected[0]))))
    assert Sampler(Sampling(max_tokens=1, logprobs=0), []).choose(LOGITS).top == ()
    assert Sampler(Sampling(max_tokens=1), []).choose(LOGITS).logprob is None


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_follows_its_schema_whatever_the_model_wants(seed: int, chatml_tokenizer) -> None:
    vocabulary = len(chatml_tokenizer) + 7  # models have rows for more tokens than there are
    stop = chatml_tokenizer.convert_tokens_to_ids("<|im_end|>")
    matcher = Grammars(chatml_tokenizer, vocabulary).matcher(json_grammar(PERSON), frozenset([stop]))
    sampler = Sampler(Sampling(max_tokens=300, seed=seed), [], matcher)
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while not sampler.has_ended and len(ids) < 300:
        ids.append(sampler.choose(torch.randn(vocabulary, generator=generator)).id)
        if ids[-1] == stop:
            ids.pop()
            break
    answer = json.loads(chatml_tokenizer.decode(ids))
    assert set(answer) == {"name", "age"}
    assert len(answer["name"]) <= 6
    assert answer["age"] <= 99


def test_a_schema_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be followed"):
        json_grammar({"type": "no such type"})
