"""Entry point of ``python -m lightning_prune``."""

import sys

from lightning_prune.command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
