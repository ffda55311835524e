"""Reformer's reversible layers record nothing unless their input asks for gradients, and frozen embeddings do not.

`_ReversibleFunction` in transformers computes the layers under `no_grad` and their gradients by hand, so autograd calls
it back only for the sake of its input: https://github.com/lucidrains/reformer-pytorch/issues/29 is the same fault.
"""

from typing import Any


def mend(model: Any) -> None:
    """Let the embeddings' output require gradients."""
    model.enable_input_require_grads()
