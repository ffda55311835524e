"""Imports for a program that ends with its run: what is imported stays, so nobody need look for garbage in it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_for_good() -> Iterator[None]:
    """Keep the garbage collector from whatever is imported inside, and from all that exists by then.

    torch, transformers and PEFT make 600,000 objects. The collector goes through them again and again while they come,
    which is a quarter of the time that they take, and through all of them once more whenever as many have been made
    since as a quarter of those. Only for a process of our own: what is no garbage yet is never found to be any later.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
