"""``import mamba_ssm`` and ``import causal_conv1d`` on machines where these packages are not installed.

`install` adds a finder behind all others on `sys.meta_path`: it is asked only for what no other finds, so that an
installed original always comes first. The modules that it gives are those of `subquad_torch`, under a second name. A
second finder, before all others, gives the modules inside of these: another would find their files in the folder of
the package, and load them twice.
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
    if _LAST in sys.meta_path:
        return _LAST.names
    found = {name: _original(name) for name in STANDS_FOR}
    names = tuple(name for name, origin in found.items() if origin is None)
    for name, origin in found.items():
        if origin is not None:
            LOGGER.warning("%s is installed (%s), and stays what `import %s` gives", name, origin, name)
    if names:
        LOGGER.warning(
            "not installed: %s; from now on `import` gives subquad's functions of the same names, on any device; "
            "subquad_torch.mamba_ssm.uninstall() undoes it",
            ", ".join(names),
        )
        _FIRST.names = _LAST.names = names
        sys.meta_path.insert(0, _FIRST)
        sys.meta_path.append(_LAST)
    return names


def uninstall() -> None:
    """Undo `install`: the names lead nowhere again. Modules and functions that were imported by them stay usable.

    See Also
    --------
    install : What is undone.
    """
    for finder in (_FIRST, _LAST):
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
    for name in [name for name, module in sys.modules.items() if name.partition(".")[0] in _LAST.names
                 and module.__name__.startswith("subquad_torch.")]:  # fmt: skip
        del sys.modules[name]
    _FIRST.names = _LAST.names = ()


def _original(name: str) -> str | None:
    """Where an original package is, imported or not; None if there is none."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or "imported before"
    spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin or "a folder of that name on sys.path"


class _Finder(MetaPathFinder):
    """Finds the modules of ours that stand for those of the names: the packages, or what is inside of them."""

    def __init__(self, *, inside: bool) -> None:
        self.inside = inside
        self.names: tuple[str, ...] = ()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, dot, rest = fullname.partition(".")
        if top not in self.names or bool(dot) != self.inside:
            return None
        if self.inside and sys.modules[top].__name__ != STANDS_FOR[top]:
            return None  # an original came first: it was put on sys.path after install()
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


_FIRST, _LAST = _Finder(inside=True), _Finder(inside=False)
