"""One file per way of spreading a step over devices. A backend owns backward, clipping and sums over ranks."""

from llmforge.train.backends.backend import Backend
from llmforge.train.backends.single import SingleDevice

__all__ = ["Backend", "SingleDevice"]
