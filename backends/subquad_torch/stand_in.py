"""``import mamba_ssm`` and ``import causal_conv1d`` on machines where these packages are not installed.

`install` adds a finder behind all others on `sys.meta_path`: it is asked only for what no other finds, so that an
installed original always comes first. The modules that it gives are those of `subquad_torch`, under a second name.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LOGGER = logging.getLogger("subquad_torch.stand_in")
STANDS_FOR = {"mamba_ssm": "subquad_torch.mamba_ssm", "causal_conv1d": "subquad_torch.causal_conv1d"}


def install() -> tuple[str, ...]:
    """Let ``import mamba_ssm`` and ``import causal_conv1d`` find the functions and modules of subquad.

    Each of the two names is taken only where no package of that name is installed or imported: an original is never
    shadowed. What has happened is logged once, as a warning of the logger ``subquad_torch.stand_in``.

    Returns
    -------
    tuple of str
        The names that lead to subquad now.

    See Also
    --------
    uninstall : Undo it.

    Examples
    --------
    >>> from subquad_torch.mamba_ssm import install, uninstall
    >>> names = install()
    >>> from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    >>> uninstall()
    """
    if _FINDER in sys.meta_path:
        return _FINDER.names
    found = {name: _original(name) for name in STANDS_FOR}
    _FINDER.names = tuple(name for name, origin in found.items() if origin is None)
    for name, origin in found.items():
        if origin is not None:
            LOGGER.warning("%s is installed (%s), and stays what `import %s` gives", name, origin, name)
    if _FINDER.names:
        LOGGER.warning(
            "%s not installed: from now on `import` of %s gives subquad's functions of the same names, on any device; "
            "subquad_torch.mamba_ssm.uninstall() undoes it",
            " and ".join(_FINDER.names) + (" is" if len(_FINDER.names) == 1 else " are"),
            "it" if len(_FINDER.names) == 1 else "them",
        )
        sys.meta_path.append(_FINDER)
    return _FINDER.names


def uninstall() -> None:
    """Undo `install`: the names lead nowhere again. Modules and functions that were imported by them stay usable.

    See Also
    --------
    install : What is undone.
    """
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for name in [name for name in sys.modules if name.partition(".")[0] in _FINDER.names]:
        del sys.modules[name]
    _FINDER.names = ()


def _original(name: str) -> str | None:
    """Where an original package is, imported or not; None if there is none."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or "imported before"
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin or "a folder of that name on sys.path"


class _Finder(MetaPathFinder):
    """Finds the modules of ours that stand for those of the names."""

    names: tuple[str, ...] = ()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, dot, rest = fullname.partition(".")
        if top not in self.names:
            return None
        ours = importlib.util.find_spec(f"{STANDS_FOR[top]}{dot}{rest}")
        if ours is None:
            return None
        return ModuleSpec(
            fullname, _Loader(ours.name), origin=ours.origin, is_package=ours.submodule_search_locations is not None
        )


class _Loader(Loader):
    """Gives a module of ours under the name that is imported: one object, whose classes are equal by either name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # the import system takes what stands in sys.modules after a module has run
        sys.modules[module.__spec__.name] = importlib.import_module(self.name)


_FINDER = _Finder()
