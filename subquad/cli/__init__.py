"""The command `subquad`: `subquad compare`, `subquad generate`, `subquad warmup` and `subquad info`."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from subquad.cli import compare, generate, info, warmup
from subquad.cli.errors import CommandError

FAILED, USAGE, CLOSED = 1, 2, 141  # the last one as shells have it for a program that a closed pipe has ended
COMPARE = (
    "Run exact attention, its approximations and the scans on real queries, keys and values with every array "
    "library on this machine, and show error, time and memory side by side: as a table here, in compare.json, and "
    "as a picture in compare.png."
)
GENERATE = (
    "Continue a prompt by a Mamba or Mamba-2 model with published weights, on any array library, and say how many "
    "tokens a second it makes."
)
WARMUP = (
    "Call operators once, so that their compiled code is kept on disk: while the image of a container is built, or "
    "before the first request. The page on performance says where it lies."
)
INFO = "List the array libraries, devices and kernels on this machine, and say why others are absent."


class _Parser(argparse.ArgumentParser):
    """A parser that reports a fault in one line, without printing the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name. Default: those of the process.

    Returns
    -------
    int
        0 if everything succeeded, 1 if a measurement failed or the output cannot be written, 2 for a wrong request,
        130 after Ctrl-C, 141 if a reader closed the pipe that the output goes to, as ``head`` does.
    """
    parser = _Parser(prog="subquad", description="Sub-quadratic sequence operators for every array library.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    compare.add_arguments(
        commands.add_parser("compare", help="error, time and memory side by side", description=COMPARE)
    )
    generate.add_arguments(
        commands.add_parser("generate", help="text by a model with published weights", description=GENERATE)
    )
    warmup.add_arguments(
        commands.add_parser("warmup", help="compile what operators need, and keep it on disk", description=WARMUP)
    )
    commands.add_parser("info", help="what this machine has", description=INFO)
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without a character gets "?" in its place
        sys.stdout.reconfigure(errors="replace")
    try:
        return _run(args)
    except BrokenPipeError:
        _discard_output()
        return CLOSED
    except OSError as error:  # commands report the files that they read; a full disk is left
        _discard_output()
        print(f"subquad {args.command}: {error}", file=sys.stderr)
        return FAILED
    except CommandError as error:
        print(f"subquad {args.command}: {error}", file=sys.stderr)
        return USAGE


def _run(args: argparse.Namespace) -> int:
    if args.command == "info":
        print(info.text(), flush=True)  # so that a pipe that is closed shows here
        return 0
    return {"compare": compare, "generate": generate, "warmup": warmup}[args.command].run(args)


def _discard_output() -> None:
    # what is left in the buffer would fail again when Python flushes it at its end
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.suppress(OSError):
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
