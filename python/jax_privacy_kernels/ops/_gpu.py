"""What the kernels for GPUs ask of devices and of packages, in whatever language they are.

These versions were tried, and docs/gpu.md repeats them. Triton's compiler and its launcher change
from release to release, so that others are not used; JAX keeps what Pallas needs, or drops it all.

- Triton: jax-triton 0.3.1 with Triton 3.6 and JAX 0.8.2 to 0.12, or jax-triton 0.4 with Triton 3.7
  to 3.9 and JAX 0.11 to 0.12.
- Pallas: JAX 0.8 to 0.12. Its backend by way of Triton is deprecated since 0.11. Where it is gone,
  dispatch moves on to plain JAX.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax

__all__ = ["Gpu", "TritonFamily", "families", "here", "named", "targets", "text", "too_old"]

Version = tuple[int, ...]


class TritonFamily(NamedTuple):
    """Releases of jax-triton that are called alike, and releases of Triton that go with them.

    Attributes:
      jax_triton, triton: the first release that was tried, and the first that was not.
    """

    jax_triton: tuple[Version, Version]
    triton: tuple[Version, Version]


FAMILIES = (
    TritonFamily(jax_triton=((0, 3, 1), (0, 4)), triton=((3, 6), (3, 7))),
    TritonFamily(jax_triton=((0, 4), (0, 5)), triton=((3, 7), (3, 10))),
)


def families() -> str:
    """The versions of jax-triton and Triton that go together, in words."""

    def span(first: Version, end: Version) -> str:
        return f">={text(first)},<{text(end)}"

    return " or ".join(
        f"jax-triton{span(*family.jax_triton)} with triton{span(*family.triton)}"
        for family in FAMILIES
    )


def text(version: Version) -> str:
    """The version as packages write it."""
    return ".".join(map(str, version))


class Gpu(NamedTuple):
    """What kernels are compiled for.

    Attributes:
      kind: as of `jax.Device.device_kind`.
      capability: ten times the compute capability.
    """

    kind: str
    capability: int


OLDEST = 80  # Ampere

# Ten times the compute capability, by what the kind of a device contains (NVIDIA's tables).
_CAPABILITIES = {
    75: ("T4",),
    80: ("A30", "A100"),
    86: ("A10", "A40"),
    89: ("L4", "L40", "L40S", "RTX 4090"),
    90: ("H100", "H200", "GH200"),
    100: ("B200", "GB200"),
    103: ("B300", "GB300"),
}


@functools.cache
def here() -> tuple[Gpu, ...]:
    """The GPUs of this process."""
    try:
        devices = jax.local_devices(backend="cuda")
    except (RuntimeError, AssertionError):  # the latter if JAX finds no platform at all
        return ()
    return tuple(
        dict.fromkeys(Gpu(x.device_kind, _times_ten(x.compute_capability)) for x in devices)
    )


def named() -> Gpu | None:
    """The GPU that the abstract mesh in use is made of, if it is one that is not here.

    That is how a program for GPUs is made where there is none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.device_kind in (gpu.kind for gpu in here()):
        return None
    for capability, names in _CAPABILITIES.items():
        if re.search(rf"\b({'|'.join(names)})\b", device.device_kind):
            return Gpu(device.device_kind, capability)
    return None


def targets() -> tuple[Gpu, ...]:
    """The GPUs that kernels are made for: the one that is named, else those of this process."""
    gpu = named()
    return here() if gpu is None else (gpu,)


def too_old() -> str | None:
    """Why kernels cannot be made for the targets, or None."""
    for kind, capability in targets():
        if capability < OLDEST:
            return f"it needs compute capability {OLDEST / 10}, but {kind} has {capability / 10}"
    return None


def _times_ten(capability: str) -> int:
    major, _, minor = capability.partition(".")
    return 10 * int(major) + int(minor or 0)
