"""The console script. Each command is a few lines that call one function below; nothing heavy is imported before then."""

from llmforge.cli.app import main

__all__ = ["main"]
