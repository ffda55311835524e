"""The console script: each command is a few lines that call one function below, nothing heavy is imported before."""

from llmforge.cli.app import main

__all__ = ["main"]
