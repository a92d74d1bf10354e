"""Main: the parser of the command line; errors are one line on standard error, with exit code 2."""

import argparse
import os
import sys
from collections.abc import Sequence

from lightning_prune._version import __version__
from lightning_prune.command_line import commands

_FILE = "a Lightning checkpoint, a state_dict, a safetensors file or a compressed one"


def parser() -> argparse.ArgumentParser:
    """Return the parser, with a subcommand for each function in ``commands``.

    >>> parser().parse_args(["diff", "a.ckpt", "b.ckpt"]).b
    'b.ckpt'
    """
    made = argparse.ArgumentParser(
        prog="lightning-prune",
        description="Look into pruned checkpoints, and convert them. Files are loaded safely: no code in them runs.",
    )
    made.add_argument("--version", action="version", version=f"lightning_prune {__version__}")
    subcommands = made.add_subparsers(dest="command", required=True, metavar="command")

    summary = subcommands.add_parser("summary", help="zeros per layer, masks, and where the schedule stands")
    summary.add_argument("checkpoint", help=_FILE)
    summary.set_defaults(run=commands.summary)

    diff = subcommands.add_parser("diff", help="overlap of the masks of two checkpoints, layer by layer")
    diff.add_argument("a", help=_FILE)
    diff.add_argument("b", help="another one")
    diff.set_defaults(run=commands.diff)

    compress = subcommands.add_parser("compress", help="write the weights as a bitmask and the nonzero values")
    compress.add_argument("checkpoint", help=_FILE)
    compress.add_argument("output", nargs="?", help="default: beside the input, with .compressed.safetensors")
    compress.set_defaults(run=commands.compress)

    expand = subcommands.add_parser("expand", help="write the weights of a compressed file as a state_dict")
    expand.add_argument("compressed", help="a file that compress or save_compressed wrote")
    expand.add_argument("output", nargs="?", help="default: beside the input, with .pt; or *.safetensors")
    expand.set_defaults(run=commands.expand)

    report = subcommands.add_parser("report", help="print what PruningReport recorded, or draw its page again")
    report.add_argument("report", help="the JSON file of a PruningReport")
    report.add_argument("output", nargs="?", help="the HTML page to write; without it, the tables are printed")
    report.set_defaults(run=commands.report)
    for writing in (compress, expand, report):
        writing.add_argument("--force", action="store_true", help="replace the output if it exists")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit code: 0, or 2 with one line that says what is wrong.

    >>> main(["summary", "missing.ckpt"])
    2
    """
    given = parser().parse_args(argv)
    try:
        print(given.run(given), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        print(f"lightning-prune {given.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
