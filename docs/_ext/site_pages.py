"""What the site needs beside Sphinx: links out of docs/, API pages, and a count of public names."""

from __future__ import annotations

import importlib
import pathlib
import pkgutil
import posixpath
import re
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = pathlib.Path(__file__).parents[1]
ROOT = DOCS.parent
# Files outside of docs/ that the site has a place for.
PAGES = {
    "README.md": "index.md",
    "README.md#notation": "api/index.md#notation",
    "SECURITY.md": "reporting.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/README.md": "benchmarks.md",
}
# Pages that are such a file.
WHOLE = {"reporting": "SECURITY.md", "changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}
# Public names that are plain values, and so have no docstring.
VALUES = {
    "jax_privacy_kernels.__version__": "The version that is installed.",
    "jax_privacy_kernels.matrix_factorization.optimization.DEFAULT_OPTIMIZER": "L-BFGS of optax.",
    "jax_privacy_kernels.matrix_factorization.optimization.ParamT": "A tree of floating arrays.",
    "jax_privacy_kernels.monte_carlo.Scheme": "`BallsInBins`, `BMinSep` or `CyclicPoisson`.",
}
# The layers below the API: their names promise nothing.
PRIVATE = ("jax_privacy_kernels.ops", "jax_privacy_kernels.kernels")


def public_modules() -> list[str]:
    """The modules of the API, each of which has a page."""
    package = importlib.import_module("jax_privacy_kernels")
    names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    hidden = [n for n in names if "._" in n or n.startswith(PRIVATE) or n.endswith("__main__")]
    return sorted({package.__name__, *names} - set(hidden))


def site_links(source: str, folder: str, page: str, repository: str) -> str:
    """The text of a file in a folder of the repository, its links for a page of the site.

    Those to files that are no pages lead to the repository on the web.
    """

    def target(match: re.Match[str]) -> str:
        path, anchor = match["path"], match["anchor"] or ""
        found = posixpath.normpath(posixpath.join(folder, path))
        to = PAGES.get(found + anchor) or PAGES.get(found)
        if to is None and found.startswith("docs/") and found.endswith((".md", ".png", ".svg")):
            to = found.removeprefix("docs/") + anchor
        if to is not None:
            return f"]({posixpath.relpath(to, posixpath.dirname(page) or '.')})"
        if (ROOT / found).exists():
            return f"]({repository}/blob/main/{found}{anchor})"
        return match[0]

    return re.sub(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)", target, source)


def on_source_read(app: Sphinx, docname: str, content: list[str]) -> None:
    folder = posixpath.dirname(f"docs/{docname}")
    if docname in WHOLE:
        folder, content[0] = "", (ROOT / WHOLE[docname]).read_text()
    repository = app.config.html_theme_options["repository_url"]
    content[0] = site_links(content[0], folder, docname, repository)


def homes() -> dict[str, list[str]]:
    """By module, its public names that have their place there: each in one module."""
    modules = {name: importlib.import_module(name) for name in public_modules()}
    found: dict[str, list[str]] = {}
    for name, module in modules.items():
        found[name] = []
        for public in module.__all__:
            value = getattr(module, public)
            home = getattr(value, "__module__", name)
            elsewhere = home in modules and home != name and public in modules[home].__all__
            if not isinstance(value, types.ModuleType) and not elsewhere:
                found[name].append(public)
    return found


def write_api_pages() -> None:
    """One page for each public module, and names that it takes from private ones with it."""
    folder = DOCS / "api"
    wanted = {}
    for name, names in homes().items():
        directive = [f"```{{eval-rst}}\n.. automodule:: {name}"]
        plain = [public for public in names if f"{name}.{public}" in VALUES]
        members = [public for public in names if public not in plain]
        if members:
            directive += [f"   :members: {', '.join(members)}"]
            directive += ["   :imported-members:", "   :undoc-members:"]
        for public in plain:
            text = VALUES[f"{name}.{public}"]
            directive.append(f"\n.. py:data:: {public}\n   :module: {name}\n\n   {text}")
        wanted[f"{name}.md"] = f"# {title(name)}\n\n" + "\n".join([*directive, "```"]) + "\n"
    for path in folder.glob("jax_privacy_kernels*.md"):
        if path.name not in wanted:
            path.unlink()
    for file, text in wanted.items():
        path = folder / file
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def title(module: str) -> str:
    return module.removeprefix("jax_privacy_kernels.")


def check_names(app: Sphinx, exception: Exception | None) -> None:
    """Every public name has a place."""
    if exception is not None or app.builder.format != "html":
        return
    described = app.env.domaindata["py"]["objects"]
    names = [f"{module}.{name}" for module, public in homes().items() for name in public]
    missing = [name for name in names if name not in described]
    if missing:
        raise RuntimeError(f"public names without a description: {', '.join(missing)}")


def resolve_short_name(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A link for a name that docstrings shorten, `toeplitz.multiply` for instance."""
    from sphinx.util.nodes import make_refnode

    if node.get("refdomain") != "py":
        return None
    ending = "." + node.get("reftarget", "").lstrip(".")
    objects = env.domaindata["py"]["objects"]
    found = sorted((name for name in objects if name.endswith(ending)), key=len)
    if not found:
        return None
    there = objects[found[0]]
    return make_refnode(
        app.builder, node["refdoc"], there.docname, there.node_id, contnode, found[0]
    )


def setup(app: Sphinx) -> dict[str, Any]:
    write_api_pages()
    app.connect("source-read", on_source_read)
    app.connect("missing-reference", resolve_short_name)
    app.connect("build-finished", check_names, priority=900)  # after themes
    return {"parallel_read_safe": True}
