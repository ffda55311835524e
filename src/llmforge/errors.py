"""Every exception that llmforge raises on purpose.

    LlmforgeError                    something a person should read, without a stack trace
    ├── InputError (ValueError)      what was given is wrong: config, data, model, arguments (exit code 2)
    │   ├── ConfigError              a key or value of the YAML file, with file and line
    │   │   └── NotAvailableError    a valid request for a capability that this version does not have
    │   ├── DataError                a file of rows, with file and line
    │   ├── ConversationError        messages that no prompt format can render
    │   ├── PromptFormatError        a format or chat template that cannot be used for what was asked
    │   ├── ModelError               a model, tokenizer or adapter that cannot be used
    │   ├── OutputError              a place to write to that cannot be written to
    │   └── BucketError              a place in a bucket that cannot be reached, read or written
    └── RunError                     the run itself failed (exit code 1)
        ├── NonFiniteLossError       the loss or the gradient became NaN or infinite
        ├── ProofError               what would be served is not what was trained
        └── Interrupted              someone pressed ctrl-C; the run can be resumed (exit code 130)
            └── DownloadInterrupted  someone pressed ctrl-C while files were downloaded

Messages say what was given, what is allowed and what to change. This module imports nothing.
"""


class LlmforgeError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the console script ends with."""

    exit_code = 1


class InputError(LlmforgeError, ValueError):
    """What the user gave is wrong."""

    exit_code = 2


class LocatedError(InputError):
    """An input error that knows the file and line it is about (both optional, lines count from 1)."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        self.message = message
        self.file = file
        self.line = line
        place = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(f"{place}: {message}" if place else message)


class ConfigError(LocatedError):
    """A key or value of the config is wrong."""


class NotAvailableError(ConfigError):
    """The config is valid, but asks for a capability that this version of llmforge does not have."""


class DataError(LocatedError):
    """A data file or one of its rows is wrong."""


class ConversationError(InputError):
    """A list of messages that no prompt format can render."""


class PromptFormatError(InputError):
    """A prompt format or chat template that cannot be used for what was asked."""


class ModelError(InputError):
    """A model, tokenizer or adapter that is missing, unreadable or unsuitable."""


class OutputError(InputError):
    """A directory that cannot be written to, or a disk without room."""


class BucketError(InputError):
    """A directory in a bucket that cannot be reached, read or written."""


class RunError(LlmforgeError):
    """A run that started and failed."""


class NonFiniteLossError(RunError):
    """The loss or the gradient norm is NaN or infinite; nothing was updated with it."""


class ProofError(RunError):
    """An artifact that does not serve what was trained; it is not published."""


class Interrupted(RunError):  # noqa: N818 - not an error of anyone's
    """The user interrupted the run; its last checkpoint can be resumed."""

    exit_code = 130


class DownloadInterrupted(Interrupted):
    """The user interrupted a download; it goes on in the background until the program ends."""
