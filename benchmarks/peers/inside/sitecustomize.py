"""The probe: writes down each optimizer step of the program whose process this is, and how many tokens it saw.

Python imports this module at start because its directory is on PYTHONPATH. It only watches: torch's global hooks tell
of every optimizer step, of the ids that reach the embedding, and of the labels that reach the model, in any program.

A token is real if it is not the padding token, which no row contains. It is counted where it enters the embedding, so
that the count does not depend on how rows were padded, packed or ordered.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time

LOG = os.environ.get("BENCH_PROBE")
PAD = int(os.environ.get("BENCH_PAD_ID", "0"))
VOCABULARY = int(os.environ.get("BENCH_VOCABULARY", "49152"))
IGNORED = -100


class _Watch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets torch's module of optimizers be imported as ever, and then attaches the hooks."""

    name = "torch.optim.optimizer"

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        _attach(module)


class _Counts:
    tokens = positions = labels = targets = 0


def _attach(optimizers):
    import torch.nn.modules.module as modules

    log = open(LOG, "a", buffering=1)  # noqa: SIM115 - open until the process ends

    def stepped(optimizer, *_):
        torch = sys.modules["torch"]
        record = {"pid": os.getpid(), "optimizer": type(optimizer).__name__}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else the step is only queued
            record["device_bytes"] = torch.cuda.max_memory_allocated()
            record["device_bytes_reserved"] = torch.cuda.max_memory_reserved()
        record["time"] = time.time()
        record |= {"tokens": int(_Counts.tokens), "positions": int(_Counts.positions)}
        # Labels are counted once whatever the loss is; targets are for programs whose model is not given labels.
        record["trained"] = int(_Counts.labels) or int(_Counts.targets)
        log.write(json.dumps(record) + "\n")

    def entered(module, arguments):
        # By their class's name, because torch.nn may still be half imported here.
        if module.training and type(module).__name__ == "Embedding" and module.num_embeddings >= VOCABULARY:
            _Counts.tokens += (arguments[0] != PAD).sum()
            _Counts.positions += arguments[0].numel()

    def left(module, arguments, keywords, output):
        if module.training and type(module).__name__.endswith("ForCausalLM"):
            labels = keywords.get("labels")
            # PEFT's model passes labels on to the one that it wraps.
            if labels is not None and not type(module).__name__.startswith("Peft"):
                _Counts.labels += (labels[..., 1:] != IGNORED).sum()

    optimizers.register_optimizer_step_post_hook(stepped)
    modules.register_module_forward_pre_hook(entered)
    modules.register_module_forward_hook(left, with_kwargs=True)
    _count_targets()


def _count_targets():
    import torch.nn.functional as functional

    original = functional.cross_entropy

    def cross_entropy(input, target, *arguments, **keywords):
        if input.requires_grad and not target.is_floating_point():
            _Counts.targets += (target != keywords.get("ignore_index", IGNORED)).sum()
        return original(input, target, *arguments, **keywords)

    functional.cross_entropy = cross_entropy


if LOG:
    sys.meta_path.insert(0, _Watch())
