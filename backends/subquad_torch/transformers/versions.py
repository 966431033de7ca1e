"""The release of transformers that this package is written for."""

from __future__ import annotations

import importlib.metadata

OLDEST = (5, 24)


def check_version() -> None:
    """ImportError, with the fix, if transformers is absent or older than what the integration is written for."""
    needed = ".".join(map(str, OLDEST))
    fix = f"python -m pip install 'transformers>={needed}'"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        msg = f"subquad_torch.transformers needs the package transformers, which is not installed: {fix}"
        raise ImportError(msg) from error
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        msg = (
            f"subquad_torch.transformers needs transformers {needed} or newer, whose caches and mask functions it "
            f"uses, and {version} is installed: {fix}"
        )
        raise ImportError(msg)
