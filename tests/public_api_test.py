"""The public API is what tests/support/public_api.txt says: names, kinds, signatures, home modules.

A difference is a change that users see. If it is meant, write the file again, and say in
CHANGELOG.md what changed:

    python tests/public_api_test.py --write
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import importlib
import inspect
import pathlib
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import jax_privacy_kernels

SNAPSHOT = pathlib.Path(__file__).parent / "support" / "public_api.txt"
PACKAGE = pathlib.Path(jax_privacy_kernels.__file__).parent
# The layers below the API: their names follow what they compute, and promise nothing.
PRIVATE = ("jax_privacy_kernels.ops", "jax_privacy_kernels.kernels")
WIDTH = 100
INDENT = "    "


def public_modules() -> list[types.ModuleType]:
    """The modules that no underscore and no entry of PRIVATE keeps users from."""
    found = [jax_privacy_kernels]
    for info in pkgutil.walk_packages(jax_privacy_kernels.__path__, "jax_privacy_kernels."):
        hidden = any(part.startswith("_") for part in info.name.split("."))
        if not hidden and not info.name.startswith(PRIVATE):
            found.append(importlib.import_module(info.name))
    return sorted(found, key=lambda module: module.__name__)


def public_api() -> str:
    """All of it as text that depends on neither the version of Python nor that of JAX."""
    return "\n\n".join("\n".join(described_module(module)) for module in public_modules()) + "\n"


def described_module(module: types.ModuleType) -> Iterator[str]:
    yield module.__name__
    for name in sorted(module.__all__):
        value = getattr(module, name)
        lines = list(described(name, value))
        home = getattr(value, "__module__", None) if is_defined_here(value) else None
        if home not in (None, module.__name__) and not isinstance(value, types.ModuleType):
            lines[0] += f"  # {home}"
        yield from (INDENT + line for line in lines)


def is_defined_here(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("jax_privacy_kernels")


def described(name: str, value: Any) -> Iterator[str]:
    """A public name of a module."""
    if isinstance(value, types.ModuleType):
        yield f"module {name}"
    elif isinstance(value, typing.TypeVar):
        yield f"type variable {name}"
    elif value is Any or typing.get_origin(value) is not None:
        yield f"type alias {name}"
    elif isinstance(value, type):
        yield from described_class(name, value)
    elif callable(value):
        yield from described_function("def", name, value)
    else:
        yield f"constant {name}: {type(value).__name__}"


def described_class(name: str, cls: type) -> Iterator[str]:
    if issubclass(cls, enum.Enum):
        yield f"enum {name}"
        yield from (f"{INDENT}{member.name} = {member.value!r}" for member in cls)
        members: dict[str, Any] = {}
    else:
        yield from described_function("class", name, cls)
        members = {n: inspect.getattr_static(cls, n) for n in sorted(dir(cls))}
    for member, value in members.items():
        public = not member.startswith("_") or written_here(value)
        if public and (member[0] != "_" or member[-2:] == "__") and member != "__post_init__":
            yield from (INDENT + line for line in described_member(member, value))


def described_member(name: str, value: Any) -> Iterator[str]:
    """A member of a class: what of it is written in the package. Fields stand in its signature."""
    if isinstance(value, classmethod) and written_here(value.__func__):
        yield from described_function("classmethod", name, value.__func__)
    elif isinstance(value, staticmethod) and written_here(value.__func__):
        yield from described_function("staticmethod", name, value.__func__)
    elif isinstance(value, property | functools.cached_property):
        yield f"property {name}"
    elif callable(value) and written_here(value):
        yield from described_function("def", name, value)


def written_here(function: Any) -> bool:
    """Whether a function is written in the package, and not made by a decorator of a class."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return code is not None and pathlib.Path(code.co_filename).is_relative_to(PACKAGE)


def described_function(kind: str, name: str, function: Callable[..., Any]) -> Iterator[str]:
    signature = inspect.signature(function)
    parameters = list(shown_parameters(signature.parameters.values()))
    arrow = "" if kind == "class" else f" -> {shown_type(signature.return_annotation)}"
    line = f"{kind} {name}({', '.join(parameters)}){arrow}"
    if len(line) + 2 * len(INDENT) <= WIDTH:
        yield line
    else:
        yield f"{kind} {name}("
        yield from (f"{INDENT}{parameter}," for parameter in parameters)
        yield f"){arrow}"


def shown_parameters(parameters: Any) -> Iterator[str]:
    last = inspect.Parameter.POSITIONAL_ONLY
    for parameter in parameters:
        if parameter.kind == parameter.KEYWORD_ONLY and last < parameter.VAR_POSITIONAL:
            yield "*"
        last = parameter.kind
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        text = stars.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {shown_type(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {shown_default(parameter.default)}"
        yield text


def shown_type(annotation: Any) -> str:
    """An annotation as it is written: what it evaluates to differs between versions."""
    if annotation is inspect.Signature.empty:
        return "?"
    annotation = getattr(annotation, "__forward_arg__", annotation)
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.strip("'\"")


def shown_default(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(shown_default, value))})"
    if value is dataclasses._HAS_DEFAULT_FACTORY:  # type: ignore[attr-defined]
        return "<factory>"
    return f"<{getattr(value, '__name__', type(value).__name__)}>"


def test_public_api_is_the_one_on_record():
    found, recorded = public_api().splitlines(), SNAPSHOT.read_text().splitlines()
    difference = list(difflib.unified_diff(recorded, found, SNAPSHOT.name, "found", lineterm=""))
    if difference:
        pytest.fail("\n".join([*difference, "", str(__doc__)]), pytrace=False)


def test_public_modules_say_what_is_public():
    for module in public_modules():
        assert sorted(set(module.__all__)) == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
        assert not [name for name in module.__all__ if name.startswith("_") and name[-2:] != "__"]


def test_changes_are_seen():
    def before(x: int, *, scale: float = 1.0) -> int: ...
    def after(x: int, *, scale: float = 2.0) -> int: ...

    assert list(described("f", before)) == ["def f(x: int, *, scale: float = 1.0) -> int"]
    assert list(described("f", before)) != list(described("f", after))


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        SNAPSHOT.write_text(public_api())
    else:
        print(public_api(), end="")
