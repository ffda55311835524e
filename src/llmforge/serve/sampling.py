"""Chooses the next token of an answer from a row of logits.

Shapes: V vocabulary, K tokens that are chosen among.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from llmforge.serve.requests import Sampling, Token
from llmforge.serve.structured import Matcher

_MOST_LIKELY = 1024  # of which `top_p` is looked for first: to sort a whole vocabulary takes milliseconds


class Sampler:
    """The choice of one answer's tokens, and what it depends on of those before.

    Args:
        prompt_ids: count for the repetition penalty.
        matcher: where the answer stands in its grammar.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], matcher: Matcher | None = None) -> None:
        self._sampling, self._matcher = sampling, matcher
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed & 0xFFFFFFFFFFFFFFFF)
        self._counts: Counter[int] = Counter()
        self._seen = torch.tensor(sorted(set(prompt_ids)), dtype=torch.int64) if self._repeats else torch.empty(0)
        bias = sampling.logit_bias
        self._biased = torch.tensor(list(bias), dtype=torch.int64), torch.tensor(list(bias.values()))

    @property
    def is_plain(self) -> bool:
        """Whether it is the likeliest token, and no more is asked."""
        s = self._sampling
        return s.temperature == 0 and s.logprobs is None and not (self._changes or self._matcher)

    @property
    def has_ended(self) -> bool:
        """Whether the answer's grammar allows nothing more."""
        return self._matcher is not None and self._matcher.has_ended

    def take(self, token: int) -> None:
        """Remember a token that was chosen."""
        if self._changes:
            self._counts[token] += 1
        if self._matcher is not None:
            self._matcher.advance(token)

    def choose(self, logits_V: torch.Tensor) -> Token:
        """Choose a token, and remember it.

        Args:
            logits_V: fp32, on the CPU; left as it is.
        """
        changed = self._change(logits_V)
        if self._matcher is not None:
            changed = changed.masked_fill(~self._matcher.allowed(), -torch.inf)
        if self._sampling.temperature == 0:
            token = int(changed.argmax())
        else:
            token = self._draw(changed / self._sampling.temperature)
        self.take(token)
        return self._described(token, logits_V)

    @property
    def _repeats(self) -> bool:
        return self._sampling.repetition_penalty != 1.0

    @property
    def _changes(self) -> bool:
        s = self._sampling
        return bool(self._repeats or s.presence_penalty or s.frequency_penalty or s.logit_bias)

    def _change(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Apply penalties and biases (https://platform.openai.com/docs/api-reference, https://arxiv.org/abs/1909.05858)."""
        if not self._changes:
            return logits_V
        s = self._sampling
        changed = logits_V.clone()
        said = torch.tensor(list(self._counts), dtype=torch.int64)
        if self._repeats:
            places = torch.cat([self._seen, said]).unique()
            chosen = changed[places]
            changed[places] = torch.where(chosen > 0, chosen / s.repetition_penalty, chosen * s.repetition_penalty)
        if len(said) and (s.presence_penalty or s.frequency_penalty):
            times = torch.tensor(list(self._counts.values()), dtype=changed.dtype)
            changed[said] -= s.presence_penalty + s.frequency_penalty * times
        places, values = self._biased
        changed[places] += values.to(changed.dtype)
        return changed

    def _draw(self, logits_V: torch.Tensor) -> int:
        """Draw by one uniform number, so that the same seed needs the same numbers whatever the vocabulary does."""
        s = self._sampling
        number = torch.rand((), generator=self._generator, dtype=torch.float64)
        if not (s.top_k or s.top_p < 1 or s.min_p):
            return _at(torch.softmax(logits_V.double(), -1), number)
        limit = min(len(logits_V), s.top_k or _MOST_LIKELY)
        while True:
            values_K, ids_K = logits_V.topk(limit)
            among = values_K if s.top_k else logits_V  # what probabilities are of
            probabilities_K = (values_K.double() - among.double().logsumexp(-1)).exp()
            before_K = probabilities_K.cumsum(-1) - probabilities_K
            kept_K = (before_K < s.top_p) & (probabilities_K >= s.min_p * probabilities_K[0])
            kept_K[0] = True
            if not bool(kept_K[-1]) or s.top_k or limit == len(logits_V):
                return int(ids_K[_at(probabilities_K * kept_K, number)])
            limit = len(logits_V)

    def _described(self, token: int, logits_V: torch.Tensor) -> Token:
        wanted = self._sampling.logprobs
        if wanted is None:
            return Token(token)
        log_probs_V = torch.log_softmax(logits_V, -1)
        values, ids = log_probs_V.topk(min(wanted, len(log_probs_V)))
        return Token(token, float(log_probs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _at(weights: torch.Tensor, number: torch.Tensor) -> int:
    """Give the index that a number from 0 to 1 falls on, where each has a share of its weight."""
    sums = weights.cumsum(-1)
    place = int(torch.searchsorted(sums, number * sums[-1], right=True))
    while place >= len(weights) or not weights[place]:  # rounding, at the end
        place -= 1
    return place
