"""Classes of the public API that pair up with jax_privacy's classes of the same name, if told to.

Paired, an instance of either class is an instance of the other too.
"""

from __future__ import annotations

import abc
import copyreg
from typing import Any

__all__ = ["Mirrored", "pair", "unpair"]


class _Meta(type):
    _twin: type

    # Subclasses have no twin. Nor may the twin be asked by isinstance: it might ask back.
    def __instancecheck__(cls, instance: Any) -> bool:
        twin = vars(cls).get("_twin", cls)
        return super().__instancecheck__(instance) or type.__instancecheck__(twin, instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        twin = vars(cls).get("_twin", cls)
        return super().__subclasscheck__(subclass) or type.__subclasscheck__(twin, subclass)


class Mirrored(metaclass=_Meta):
    """The first base of every class that can be paired."""


def pair(ours: Any, theirs: type) -> None:
    """Pairs a class that is `Mirrored` with another one, in place of the one it is paired with."""
    unpair(ours)
    # Ours are instances of theirs by inheritance, which also brings what only theirs has. Mirrored
    # stays first, as the first base decides on the layout of instances, which cannot change.
    first, *rest = ours.__bases__
    try:
        ours.__bases__ = (first, theirs, *rest)
    except TypeError as error:  # of an order of bases
        names = [cls.__qualname__ for cls in _below(ours) if theirs in cls.__mro__]
        if not names:
            raise
        raise TypeError(
            f"expected no class to inherit from the {ours.__name__} of both libraries, found "
            f"{', '.join(names)}"
        ) from error
    ours._twin = theirs
    # While ours is found under the name of theirs, pickles of theirs hold ours.
    copyreg.pickle(theirs, lambda instance: (object.__new__, (ours,), vars(instance)))
    _forget(theirs)


def unpair(ours: Any) -> None:
    """Takes `pair` back; does nothing to a class without a twin."""
    theirs = vars(ours).get("_twin")
    if theirs is not None:
        ours.__bases__ = tuple(base for base in ours.__bases__ if base is not theirs)
        del ours._twin
        copyreg.dispatch_table.pop(theirs)
        _forget(theirs)


def _below(cls: type) -> list[type]:
    """All subclasses."""
    subclasses: list[type] = type.__subclasses__(cls)
    return [below for sub in subclasses for below in (sub, *_below(sub))]


def _forget(cls: type) -> None:
    """Abstract classes remember whose instances theirs are: cls and its bases no longer do."""
    for base in cls.__mro__:
        if isinstance(base, abc.ABCMeta):
            base._abc_caches_clear()  # type: ignore[attr-defined]
