"""Code run in a fresh interpreter, in which nothing is imported yet."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

# for JAX, beside the flags that spare its compiler work
TWO_DEVICES = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"}
PATIENCE = 300  # seconds for a process of its own: one that hangs must not block the tests for ever


def python(code: str, *path: Path, **environment: str) -> str:
    """The output that the code, which may be indented as a whole, prints in a fresh interpreter."""
    search = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, **environment, "PYTHONPATH": search},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def install(folder: Path, name: str, text: str, group: str, entry: str) -> None:
    """A distribution of one module and one entry point."""
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (information / "entry_points.txt").write_text(f"[{group}]\n{entry} = {name}\n", encoding="utf-8")
