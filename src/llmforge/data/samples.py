"""The unit that training consumes: token ids and how much each of them counts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and, for each, the weight of predicting it from the tokens before it.

    Both lists have the same length; `loss_weights[0]` is 0, since nothing stands before the first token.
    """

    input_ids: list[int]
    loss_weights: list[float]
