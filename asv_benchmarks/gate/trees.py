"""The two trees: the files of a commit in a temporary folder, and a process that measures a tree."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 600.0  # seconds until a process that measures is ended: it may hang


class NoBaseError(Exception):
    """The base commit is not here."""


def git(*command: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *command], check=True, capture_output=True).stdout


def find_commit(name: str) -> str:
    """The hash of a commit."""
    try:
        return git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").decode().strip()
    except (OSError, subprocess.CalledProcessError) as error:
        msg = f"there is no commit {name} here"
        raise NoBaseError(msg) from error


def is_history_cut() -> bool:
    """Whether commits before the current one are absent: a clone of depth 1, or a first commit."""
    try:
        first = git("rev-list", "--count", "HEAD").strip() == b"1"
        return first or git("rev-parse", "--is-shallow-repository").strip() == b"true"
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return False


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The files of `commit` in a temporary folder.

    From `git archive` rather than `git worktree`: the repository stays as it is, even if we are killed.
    """
    with tempfile.TemporaryDirectory(prefix="subquad-gate-") as folder:
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit))) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder).resolve()


class Worker:
    """A process that has imported the subquad of one tree, and answers one question at a time."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        path = os.pathsep.join([str(tree), str(tree / "backends"), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep), "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.end = threading.Timer(PATIENCE, self.process.kill)
        self.end.daemon = True
        self.end.start()

    def ask(self, *question: Any) -> None:
        assert self.process.stdin is not None
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
        except BrokenPipeError:  # it has died: `answer` says so
            return

    def answer(self) -> dict[str, Any]:
        """With "failure" where the question could not be answered."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"failure": f"the process ended with {self.process.wait()}"}
        answer = json.loads(line)
        if "tree" in answer and not Path(answer["tree"]).is_relative_to(self.tree):
            answer["failure"] = f"it imported {answer['tree']}, not the subquad of its tree"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.end.cancel()


@contextmanager
def workers(*trees: Path) -> Iterator[list[Worker]]:
    """One for each tree."""
    started = [Worker(tree) for tree in trees]
    try:
        yield started
    finally:
        for worker in started:
            worker.close()
