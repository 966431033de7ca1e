"""One module at a time: its class is exchanged for one that computes the same in another way, and back.

An object's class decides what its ``forward`` is. To swap a module is to give it a class of two parents: a class below
`Swapped`, which computes, and the class that the module had. Its parameters, buffers, hooks and attributes stay as they
are, so its state_dict does too, and ``isinstance`` finds the original class. Other modules of it are not touched.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import MethodType
from typing import Any, ClassVar

from torch.nn import Module
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.utils.deprecation import deprecate_kwarg


class Swapped:
    """The first parent of the class of a swapped module: it computes `forward` with the attributes of the second.

    Attributes
    ----------
    needs : tuple of str
        Arguments that the original's ``forward`` must have.
    reads : tuple of str
        Names of children whose weights `forward` reads without calling them; offloading has to bring these along.
    original : type
        The class that the module had.
    forward : callable
        What computes; ``super().forward`` is the original's.
    """

    needs: ClassVar[tuple[str, ...]] = ("cache",)
    reads: ClassVar[tuple[str, ...]] = ()
    original: ClassVar[type[Module]]
    forward: Any

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """The reason why a module of the family cannot be swapped, or None."""
        return None

    @property
    def subquad_runs(self) -> str:
        """What runs in place of the original's code, for people."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """How to copy and pickle: the class is made again from its parents, since no module has it as an attribute."""
        return _blank, (self.original, mixin_of(type(self))), self.__dict__


@cache
def swapped_class(original: type[Module], mixin: type[Swapped]) -> type[Module]:
    """The class of a swapped module; it has the name of the original, by which device maps know it."""
    forward = deprecate_kwarg("cache_params", "5.40.0", new_name="cache")(mixin.forward)
    if mixin.reads:
        forward = force_accelerate_hooks(list(mixin.reads))(forward)
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), {**names, "original": original, "forward": forward})


def mixin_of(swapped: type) -> type[Swapped]:
    """The class that computes, of the class of a swapped module."""
    return swapped.__mro__[1]


def refuses(module: Module, mixin: type[Swapped]) -> str | None:
    """The reason why a module cannot be swapped, or None."""
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        return "its forward has been replaced by another package, whose work a swap would undo"
    missing = [name for name in mixin.needs if name not in inspect.signature(type(module).forward).parameters]
    if missing:
        return f"its forward has no argument {', '.join(missing)}: transformers 5.24 or newer is needed"
    return mixin.why_not(module)


def swap(module: Module, mixin: type[Swapped]) -> None:
    """Let `mixin` compute for a module."""
    _exchange(module, swapped_class(type(module), mixin))


def unswap(module: Module) -> None:
    """Give a swapped module back the class that it had."""
    _exchange(module, type(module).original)


def _exchange(module: Module, to: type[Module]) -> None:
    module.__class__ = to
    if "_old_forward" in vars(module):  # what hooks of the package accelerate call, bound to the class before
        vars(module)["_old_forward"] = MethodType(to.forward, module)


def _blank(original: type[Module], mixin: type[Swapped]) -> Module:
    """A swapped module without attributes."""
    made: Any = swapped_class(original, mixin)
    return made.__new__(made)
