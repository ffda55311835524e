"""`python -m llmforge` is the console script."""

from llmforge.cli import main

if __name__ == "__main__":
    main()
