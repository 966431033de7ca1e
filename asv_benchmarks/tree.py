"""A process that imports the subquad of another tree, and runs calls on request.

The process runs this file by its path and imports no other file of this folder: an older tree has other benchmarks.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

PATIENCE = 600  # seconds after which a process that does not answer is ended
Question = tuple[str, dict[str, Any], int, dict[str, Any] | None]


def check_out(repository: Path, commit: str, folder: Path) -> Path:
    """Write the files of a commit into a folder and return the folder; the repository is only read."""
    command = ["git", "-C", str(repository), "archive", "--format=tar", commit]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder.resolve()


@contextmanager
def process(tree: Path, environment: dict[str, str]) -> Iterator[Callable[[Question | int], None]]:
    """Start a process of a tree and yield a function that sends it a request.

    A `Question` makes the process `prepare` a call; a number makes it run that call so many times. A failure in the
    process raises ChildProcessError.
    """
    path = os.pathsep.join([str(tree), str(tree / "backends"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = os.environ | environment | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": tree, "env": env}
    server = subprocess.Popen([sys.executable, "-P", __file__, str(PATIENCE)], **pipes)

    def ask(question: Question | int) -> None:
        try:
            pickle.dump(question, server.stdin)
            server.stdin.flush()
            failure = pickle.load(server.stdout)
        except (BrokenPipeError, EOFError):
            failure = f"the process ended with {server.wait()}"
        if failure:
            raise ChildProcessError(failure)

    try:
        yield ask
    finally:
        server.kill()
        with suppress(BrokenPipeError):
            server.communicate()


def prepare(name: str, arrays: dict[str, Any], positional: int, options: dict[str, Any] | None) -> Callable[[], Any]:
    """The call of a public function by its name; if `options` is None, of the `step` of a method after one token."""
    import subquad

    if not Path(subquad.__file__).is_relative_to(Path.cwd()):
        msg = f"it imported {subquad.__file__}, not the subquad of its tree"
        raise ImportError(msg)
    if options is None:
        step = subquad.METHODS[name]().step
        return partial(step, *arrays.values(), step(*arrays.values())[1])
    keywords = dict(list(arrays.items())[positional:]) | options
    return partial(getattr(subquad, name), *list(arrays.values())[:positional], **keywords)


def serve(patience: int) -> None:
    """Answer requests from standard input on standard output, each with a failure as text, or None."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that a library prints goes to stderr, not among the answers
    while True:
        question, failure = pickle.load(sys.stdin.buffer), None
        signal.alarm(patience)
        try:
            if not isinstance(question, int):
                call, question = prepare(*question), 2  # the first call compiles
            for _ in range(question):
                call()
        except Exception as error:  # the other tree goes on without this case
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        pickle.dump(failure, answers)
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
