"""What the site is made of, without building it: links, names, tables, drawings, metadata."""

from __future__ import annotations

import ast
import collections
import inspect
import pathlib
import re
import tomllib

import mechanisms
import pytest
import site_pages
import tables
from public_api_test import public_modules

pytest.importorskip("matplotlib", reason="matplotlib is missing; install the test extra")
import drawings

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    ("source", "folder", "page", "expected"),
    [
        ("[a](scaling.md#work)", "docs", "gpu", "[a](scaling.md#work)"),
        ("[a](../bench/README.md)", "docs", "scaling", "[a](benchmarks.md)"),
        ("[a](../README.md#notation)", "docs", "design", "[a](api/index.md#notation)"),
        ("[a](../choosing.md)", "docs/tutorials", "tutorials/digits", "[a](../choosing.md)"),
        ("![a](docs/bands.png)", "", "contributing", "![a](bands.png)"),
        ("[a](CMakeLists.txt)", "", "contributing", "[a](R/blob/main/CMakeLists.txt)"),
        ("[a](https://b.c) [d](#e)", "docs", "gpu", "[a](https://b.c) [d](#e)"),
    ],
)
def test_links_lead_to_pages_of_the_site_or_to_the_repository(source, folder, page, expected):
    assert site_pages.site_links(source, folder, page, "R") == expected


def test_every_page_is_in_a_list_once():
    listed = re.findall(r"^[a-z_/]+$", (DOCS / "index.md").read_text(), re.MULTILINE)
    pages = {p.relative_to(DOCS).with_suffix("").as_posix() for p in DOCS.glob("**/*.md")}
    pages = {p for p in pages if not p.startswith(("_build", "api/jax_privacy_kernels"))}
    assert sorted({*listed, "index"}) == sorted(pages)
    assert len(listed) == len(set(listed))


def test_every_page_has_an_example():
    """A block of code; a page of a module has one that runs."""
    for path in (*DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md"), DOCS / "api/index.md"):
        name = path.relative_to(DOCS).with_suffix("").as_posix()
        source = ROOT / site_pages.WHOLE[name] if name in site_pages.WHOLE else path
        assert re.search(r"^(```+{code-cell}|```python|    \S)", source.read_text(), re.M), name
    for module in public_modules():
        described = [module, *(getattr(module, name) for name in module.__all__)]
        described += [x for y in described if isinstance(y, type) for x in vars(y).values()]
        texts = [x.__doc__ or "" for x in described]
        assert any(">>> " in text for text in texts), module.__name__


def test_every_public_name_has_one_home():
    homes = site_pages.homes()
    assert sorted(homes) == sorted(module.__name__ for module in public_modules())
    modules = {module.__name__: module for module in public_modules()}
    places = collections.Counter(
        id(getattr(modules[name], public)) for name, names in homes.items() for public in names
    )
    for module in modules.values():
        for public in module.__all__:
            value = getattr(module, public)
            ours = getattr(value, "__module__", "").startswith("jax_privacy_kernels")
            if ours and (isinstance(value, type) or inspect.isfunction(value)):
                assert places[id(value)] == 1, (module.__name__, public)


def test_tables_hold_what_was_measured():
    noise = tables.newest("noise")
    text = tables.noise_rows(noise, "bands")
    row = next(r for r in noise["rows"] if (r["case"], r["bands"]) == ("bands", 64))
    line = next(line for line in text.splitlines() if line.startswith("| 64 |"))
    assert f"{row['speedup']['cpp']:.1f}x" in line
    assert noise["environment"]["date"] in tables.environment(noise)
    for name, make in (("toeplitz", tables.toeplitz_rows), ("optimize", tables.first_calls)):
        lines = make(tables.newest(name)).splitlines()
        assert len(lines) > 4
        assert len({line.count("|") for line in lines}) == 1
    with pytest.raises(FileNotFoundError, match="expected results of nothing"):
        tables.newest("nothing")


def test_decision_table():
    rows = mechanisms.table(
        n=40, min_sep=10, max_participations=4, bands=(1, 5), buffers=(2,), coefficients=(3,)
    )
    independent, banded, blt, inverse = rows
    # For the identity the error is closed: sums of t terms, and k participations.
    assert independent.error == pytest.approx((sum(range(1, 41)) / 40 * 4) ** 0.5, rel=1e-6)
    assert [row.memory for row in rows] == [0, 4, 2, 2]
    assert max(banded.error, blt.error, inverse.error) < independent.error
    lines = mechanisms.lines(rows, tables.newest("noise"), tables.newest("noise-mechanisms"))
    assert {len(line) for line in lines} == {len(mechanisms.HEADER)}
    assert lines[0][3] != "-"


def test_drawings_follow_the_schedule():
    for figure in (drawings.ring(4, 9), drawings.schedule(4, 8, 9)):
        (axes,) = figure.axes
        assert len(axes.texts) >= 9
    made = [text.get_text() for text in drawings.schedule(4, 8, 5).axes[0].texts]
    # From step 4 on a quarter of eight tiles, or one more, is refreshed at each step.
    assert [t for t in made if t.startswith("4-")] == ["4-7", "4-7"]


def test_the_project_has_one_address_and_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    source = project["project"]["urls"]["Source"]
    version = project["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
    text = (ROOT / "pyproject.toml").read_text() + (ROOT / "CITATION.cff").read_text()
    text += (DOCS / "benchmarks.md").read_text()
    slug = source.removeprefix("https://github.com/")
    found = re.findall(r"(?:github|raw\.githubusercontent)\.com/([\w-]+/[\w-]+)", text)
    assert set(found) == {slug}


def test_readme_on_pypi_has_no_relative_links():
    """The description that PyPI shows is README.md with these substitutions."""
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]
    text = (ROOT / "README.md").read_text()
    for rule in hook["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert len(targets) > 10
    assert [t for t in targets if not t.startswith(("https://", "#"))] == []


def test_tutorials_compile():
    for page in (DOCS / "tutorials").glob("*.md"):
        cells = re.findall(r"^```{code-cell} python\n(.*?)^```", page.read_text(), re.M | re.S)
        assert len(cells) > 4
        for cell in cells:
            ast.parse(
                "\n".join(line for line in cell.splitlines() if not line.startswith(":tags:"))
            )
