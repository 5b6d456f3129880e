"""Do an sdist and the wheel that was built from it hold every file of the package, once?

The sdist also holds what its own documents link to, and the description that PyPI shows has no
links that work in the repository only.

Usage: python tests/distributions.py DIST, a folder with both. CI runs it and installs the wheel.
"""

from __future__ import annotations

import collections
import pathlib
import posixpath
import re
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).parent.parent


def tracked(*folders):
    """The files of folders that git knows, without symbolic links."""
    command = ["git", "ls-files", "-s", *folders]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = [line.split(maxsplit=3) for line in text.splitlines()]
    return {path for mode, _, _, path in lines if mode != "120000"}


def once(names, where):
    counts = collections.Counter(names)
    several = [name for name, count in counts.items() if count > 1]
    assert not several, f"{where} holds several times: {several}"
    return set(counts)


def check_sdist(file):
    with tarfile.open(file) as archive:
        members = archive.getmembers()
        links = [member.name for member in members if member.issym() or member.islnk()]
        assert not links, f"the sdist holds links: {links}"
        names = [member.name.partition("/")[2] for member in members if member.isfile()]
    found = once(names, "the sdist")
    needed = tracked("python", "kernels", "csrc") | {"CMakeLists.txt", "pyproject.toml", "LICENSE"}
    assert not needed - found, f"the sdist lacks {sorted(needed - found)}"
    broken = [link for link in links_of(file) if link not in found]
    assert not broken, f"documents of the sdist link to files that it has not got: {broken}"
    twice = [name for name in found if name.startswith("python/jax_privacy_kernels/kernels/")]
    assert not twice, f"the sdist holds kernels/ by its symbolic link, too: {twice}"


def links_of(file):
    """The files that documents of an sdist link to, by their names in it."""
    found = set()
    with tarfile.open(file) as archive:
        folders = {posixpath.dirname(m.name.partition("/")[2]) for m in archive.getmembers()}
        for member in archive.getmembers():
            if member.isfile() and member.name.endswith(".md"):
                text = archive.extractfile(member).read().decode()
                here = posixpath.dirname(member.name.partition("/")[2])
                for path in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
                    found.add(posixpath.normpath(posixpath.join(here, path)))
    return found - folders


def check_wheel(file):
    with zipfile.ZipFile(file) as archive:
        found = once(archive.namelist(), "the wheel")
        (description,) = (n for n in found if n.endswith(".dist-info/METADATA"))
        metadata_text = archive.read(description).decode()
    relative = re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata_text)
    assert not relative, f"PyPI would show links that lead nowhere: {relative}"
    package = {name.removeprefix("python/") for name in tracked("python")}
    package |= {f"jax_privacy_kernels/{name}" for name in tracked("kernels")}
    extension = {name for name in found if name.startswith("jax_privacy_kernels/_jpk.")}
    extension -= package
    metadata = {name for name in found if ".dist-info/" in name}
    assert not package - found, f"the wheel lacks {sorted(package - found)}"
    other = found - package - extension - metadata
    assert not other, f"the wheel holds {sorted(other)}"
    assert len(extension) == 1, f"expected one compiled module, found {sorted(extension)}"


def main(folder):
    (sdist,) = pathlib.Path(folder).glob("*.tar.gz")
    (wheel,) = pathlib.Path(folder).glob("*.whl")
    check_sdist(sdist)
    check_wheel(wheel)
    print(f"{sdist.name} and {wheel.name} hold every file once")


if __name__ == "__main__":
    main(*sys.argv[1:])
