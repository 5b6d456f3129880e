"""``python -m jax_privacy_kernels`` prints the capability report."""

from jax_privacy_kernels._report import report

if __name__ == "__main__":
    print(report())
