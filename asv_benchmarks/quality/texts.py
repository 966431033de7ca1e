"""Texts that come with Python: prose and code, one pair to tune on and another to report on."""

from __future__ import annotations

import hashlib
import importlib.util
import pydoc_data.topics
from pathlib import Path

KINDS, USES = ("prose", "code"), ("tune", "report")
# chapters of Python's manual, as pydoc shows them, and modules of the standard library; no chapter is part of another
SOURCES = {
    ("prose", "tune"): ("specialnames", "typesseq", "debugger", "assignment"),
    ("prose", "report"): ("compound", "types", "formatstrings", "string-methods"),
    ("code", "tune"): ("argparse",),
    ("code", "report"): ("asyncio.base_events",),
}

# modules of 8192 tokens and more, for sequences beyond what a model was trained on: windows of different texts, joined
MODULES = ("tarfile", "zipfile", "typing", "inspect", "turtle", "subprocess", "difflib", "enum")


def read(kind: str, use: str) -> str:
    """The text of a kind, "prose" or "code", for a use, "tune" or "report"."""
    return "\n\n".join(map(_chapter if kind == "prose" else _module, SOURCES[kind, use]))


def windows() -> list[str]:
    """Sixteen different texts of 8192 tokens and more each: parts of Python's manual, and modules, in turn."""
    manual = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    size, found = len(manual) // len(MODULES), []
    for i, name in enumerate(MODULES):
        found += [manual[i * size : (i + 1) * size], _module(name)]
    return found


def digest(text: str) -> str:
    """The first twelve hexadecimal digits of the SHA-256 of a text: other releases of Python have other texts."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _chapter(name: str) -> str:
    return pydoc_data.topics.topics[name]


def _module(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        msg = f"this Python has no source of its module {name}; use a release of CPython"
        raise FileNotFoundError(msg)
    return Path(spec.origin).read_text(encoding="utf-8")
