"""The layers of the package, read from its imports: arrows point down, and nothing goes in circles.

docs/design.md draws the layers. A module may import from its own layer and from those below, also
inside of functions.
"""

from __future__ import annotations

import ast
import graphlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "jax_privacy_kernels"

# From the lowest to the highest, the first pattern that fits names the layer of a module.
LAYERS = {
    "base": r"_checks|_version|_jpk",
    "kernels": r"kernels(\..*)?",
    "implementations": r"ops\.\w+\._(jax|cpp|triton|pallas)",
    "shared by ops": r"ops\._\w+|ops\.\w+\._\w+",
    "ops": r"ops\.\w+|ops",
    "mirror": r".*",
}
# The layers that each may import from.
BELOW = {
    "base": {"base"},
    "kernels": {"kernels"},
    "shared by ops": {"shared by ops", "kernels", "base"},
    "implementations": {"implementations", "shared by ops", "kernels", "base"},
    "ops": {"ops", "implementations", "shared by ops", "base"},
    "mirror": {"mirror", "ops", "shared by ops", "base"},
}


def sources(folder: pathlib.Path, package: str) -> dict[str, str]:
    """The source of every module of a package, by its name; links are not followed."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = pathlib.Path(where, name)
            if path.suffix in (".py", ".pyi"):
                parts = [package, *path.relative_to(folder).with_suffix("").parts]
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found[module] = path.read_text()
    return found


def package_sources() -> dict[str, str]:
    return {
        **sources(ROOT / "python" / PACKAGE, PACKAGE),
        **sources(ROOT / "kernels", f"{PACKAGE}.kernels"),
    }


def statements(tree: ast.AST, in_functions: bool) -> Iterator[ast.AST]:
    """The statements of a module that run when it is imported; or those of its functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not in_functions:
            continue
        yield node
        yield from statements(node, in_functions)


def imports(modules: Mapping[str, str], in_functions: bool) -> dict[str, set[str]]:
    """The modules of the package that each of them names in an import.

    A package is imported along with any of its modules; that is not counted.
    """
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        named: set[str] = set()
        for node in statements(ast.parse(source), in_functions):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: relative imports are not read by this test"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {name if name in modules else str(node.module) for name in names}
        graph[module] = named & set(modules)
    return graph


def layer(module: str) -> str:
    """The layer that a module belongs to, by its name."""
    name = module.removeprefix(PACKAGE).removeprefix(".")
    return next(layer for layer, pattern in LAYERS.items() if re.fullmatch(pattern, name))


def upward(modules: Mapping[str, str]) -> list[str]:
    """The imports that point up."""
    return [
        f"{module} ({layer(module)}) imports {target} ({layer(target)})"
        for module, targets in imports(modules, in_functions=True).items()
        for target in sorted(targets)
        if layer(target) not in BELOW[layer(module)]
    ]


def cycle(modules: Mapping[str, str]) -> list[str]:
    """A circle of imports, or nothing."""
    try:
        graphlib.TopologicalSorter(imports(modules, in_functions=False)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def foreign_includes(headers: Mapping[str, str]) -> list[str]:
    """What kernels in C++ include of XLA, of Python or of the files that bind them to these."""
    found = []
    for name, text in headers.items():
        for include in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
            if re.match(r"xla/|nanobind/|pybind11/|Python\.h", include) or is_binding(include):
                found.append(f"{name} includes {include}")
    return found


def is_binding(header: str) -> bool:
    return "ffi" in header or header == "registry.h"


# -- The package ------------------------------------------------------------------------------


def test_no_import_points_up():
    assert upward(package_sources()) == []


def test_no_imports_go_in_circles():
    assert cycle(package_sources()) == []


def test_every_layer_is_found():
    found = {layer(module) for module in package_sources()}
    assert found == set(LAYERS) == set(BELOW)


def test_kernels_in_cpp_know_nothing_of_xla_and_python():
    headers = {p.name: p.read_text() for p in (ROOT / "csrc").glob("*.h") if not is_binding(p.name)}
    assert len(headers) > 5
    assert foreign_includes(headers) == []


# -- This test --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.solve_triton", f"from {PACKAGE}.ops import _coefficients"),
        ("kernels.solve_triton", f"def f():\n  import {PACKAGE}._checks"),
        ("ops.solve._jax", f"from {PACKAGE}.noise_addition import f"),
        ("ops.solve._jax", f"from {PACKAGE}.ops.solve import solve"),
        ("ops._coefficients", f"from {PACKAGE}.ops.solve import _jax"),
        ("ops.solve", f"def f():\n  from {PACKAGE} import __version__"),
        ("noise_addition", f"from {PACKAGE}.ops.solve import _jax"),
        ("noise_addition", f"from {PACKAGE}.kernels import solve_triton"),
        ("_checks", f"from {PACKAGE}.noise_addition import f"),
    ],
)
def test_an_import_that_points_up_is_seen(module, source):
    names = ["", ".kernels", ".kernels.solve_triton", ".ops", ".ops._coefficients", ".ops.solve"]
    names += [".ops.solve._cpp", ".ops.solve._jax", ".noise_addition", "._checks"]
    modules = dict.fromkeys((PACKAGE + name for name in names), "")
    assert upward(modules) == []
    modules[f"{PACKAGE}.{module}"] = source
    (found,) = upward(modules)
    assert found.startswith(f"{PACKAGE}.{module} ")


def test_a_circle_is_seen():
    modules = {"a": "import b", "b": "from c import d", "c": "", "c.d": "def f():\n  import a"}
    assert cycle(modules) == []
    modules["c.d"] = "try:\n  import a\nexcept ImportError:\n  pass"
    circle = cycle(modules)
    assert set(circle) == {"a", "b", "c.d"}


def test_an_include_of_xla_is_seen():
    header = '#include <vector>\n#include "simd.h"\n  # include "xla/ffi/api/ffi.h"\n'
    assert foreign_includes({"a.h": header}) == ["a.h includes xla/ffi/api/ffi.h"]
    assert foreign_includes({"a.h": '#include "ffi_reals.h"'}) == ["a.h includes ffi_reals.h"]
