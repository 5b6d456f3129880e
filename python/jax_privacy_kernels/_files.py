"""Files that are there whole, or not at all."""

from __future__ import annotations

import io
import os
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_whole", "write_whole"]


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file under another name first, so that no interrupt leaves half of it."""
    path = path.resolve()  # through a link, which stays one
    in_place = not path.is_file() or not os.access(path.parent, os.W_OK)
    if path.exists() and in_place:  # a device, a pipe, or the one file here that may be written
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def draw_whole(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure in the format that the name ends on; on none it is a PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=path.suffix[1:] or "png")
    write_whole(path, drawn.getvalue())
