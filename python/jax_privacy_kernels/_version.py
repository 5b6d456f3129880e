"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("jax-privacy-kernels")
except PackageNotFoundError:  # imported from a source checkout
    __version__ = "0+unknown"
