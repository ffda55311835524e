"""The commands as Python functions, for notebooks and programs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from llmforge.config import LoadedConfig, load_config
from llmforge.jobs.display import open_display
from llmforge.jobs.finetune import finetune as run_finetune
from llmforge.jobs.run import Run


def finetune(config: LoadedConfig | str | Path, overrides: Sequence[str] = ()) -> Run:
    """Run the fine-tuning job that a config describes, with its progress on stderr.

    Args:
        config: a YAML file, or what `load_config` made of one.
        overrides: `key.sub=value`, as `--set` takes them; only with a file.

    Raises:
        InputError: something given is wrong; nothing was trained.
        RunError: the run failed; what it had done is in its directory.
    """
    loaded = config if isinstance(config, LoadedConfig) else load_config(config, overrides)
    with open_display(sys.stderr) as display:
        run = run_finetune(loaded, display)
    assert run is not None  # only a dry run gives none
    return run
