"""What documentation shows, runs: examples in docstrings, and Python in README.md and docs/."""

from __future__ import annotations

import doctest
import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

import jax_privacy_kernels

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(jax_privacy_kernels.__file__).parent
# The page has a test of its own, in which processes are killed and go on.
TESTED_ELSEWHERE = {"checkpointing.md"}


def modules_with_examples() -> list[str]:
    paths = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())
    parts = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in paths]
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]


def pages_with_python() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        str(page.relative_to(ROOT))
        for page in pages
        if page.name not in TESTED_ELSEWHERE and python_of(page)
    ]


def python_of(page: pathlib.Path) -> list[str]:
    """The blocks of a page that are marked as Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstrings(name):
    module = importlib.import_module(name)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests
    for test in tests:
        runner.run(test, out=report.append)
    assert not report, "".join(report)


def anchors(page: pathlib.Path) -> set[str]:
    """What links to the headings of a page end on, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links():
    """Links to pages, to their headings and to files lead somewhere."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")]
    assert len(pages) > 5
    missing = []
    for page in pages:
        for path, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", page.read_text()):
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                missing.append(f"{page.relative_to(ROOT)}: {path}#{anchor}")
    assert missing == []


@pytest.mark.subprocess
@pytest.mark.parametrize("name", pages_with_python())
def test_pages(name, tmp_path):
    """The blocks of a page are one program, which has a process of its own: it may set a mesh."""
    code = "\n".join(python_of(ROOT / name))
    if "install()" in code:
        pytest.importorskip("jax_privacy", reason="jax_privacy is missing; install the test extra")
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
