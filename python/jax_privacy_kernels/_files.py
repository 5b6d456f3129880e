"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import pathlib

__all__ = ["write_whole"]


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file under another name first, so that no interrupt leaves half of it."""
    path = path.resolve()  # through a link, which stays one
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
