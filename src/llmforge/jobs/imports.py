"""Imports for a program that ends with its run: what can be settled only before torch is there."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# oneDNN makes a kernel for every shape of a product, some 0.5 MB each, and keeps 1,024 in each of these caches: half a
# GB in a run whose rows differ in length. A step has fewer than 100, and making one again takes a millisecond.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@contextmanager
def imports_for_good() -> Iterator[None]:
    """Keep the garbage collector from whatever is imported inside, and from all that exists by then.

    torch, transformers and PEFT make 600,000 objects. The collector goes through them again and again while they come,
    which is a quarter of the time that they take, and through all of them once more whenever as many have been made
    since as a quarter of those. And oneDNN, with torch's layer above it, is told to keep fewer kernels. Only for a
    process of our own: what is no garbage yet is never found to be any later.
    """
    for name in _KERNEL_CACHES:  # read when torch is loaded, and only then
        os.environ.setdefault(name, "128")
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
