"""The name of Mamba-3, so that code which imports it beside the others runs."""

from __future__ import annotations

from typing import Any

__all__ = ["Mamba3"]


class Mamba3:
    """Mamba-3, which is not provided: making one raises NotImplementedError.

    Parameters
    ----------
    *args, **kwargs : object
        Whatever the original takes.

    Raises
    ------
    NotImplementedError
        Always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        msg = "Mamba3 is not provided by subquad, whose modules are Mamba and Mamba2; it needs mamba-ssm and CUDA"
        raise NotImplementedError(msg)
