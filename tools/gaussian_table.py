"""Fits the polynomials of exact Gaussian sampling, and bounds their errors.

    python tools/gaussian_table.py            # says how good the fits are
    python tools/gaussian_table.py --write    # writes the two tables

A sample of the grid has 2 Q(|z|) = V for a uniform V on (0, 1), Q the upper tail of the normal law.
With w = -log(V (2 - V)), |z| is (1 - V) g(w) for an analytic g, which is near sqrt(w) for large w.
Three polynomials stand for g: in w up to 5, in sqrt(w) up to 4, and in sqrt(w) beyond. They are
Chebyshev interpolants, computed with 260 bits and rounded to doubles.

The bounds are on the absolute error of |z| as computed in float64 with any of its multiplications
and additions contracted or not. They are the sum of what the polynomial leaves out and of a running
error analysis (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.3): every
operation adds half a unit in the last place of its result, and hands on the errors of its operands
by its derivatives. Both are evaluated at many points of the domain; what lies between them is
covered by a quarter that is added.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence

from mpmath import mp, mpf

mp.prec = 260

ROOT = pathlib.Path(__file__).resolve().parent.parent
UNIT = mpf(2) ** -53  # half a unit in the last place of 1
LOG_TERMS = 12  # of the series of 2 atanh(s) / s in s^2


# -- The function -----------------------------------------------------------------------------


def absolute_normal(tail: mpf) -> mpf:
    """The |z| with P(|N| > |z|) = tail."""
    root = mp.sqrt(2)
    if tail > 0.01:
        return root * mp.erfinv(1 - tail)
    z = mp.sqrt(-2 * mp.log(tail))
    for _ in range(200):
        step = (mp.erfc(z / root) - tail) / (mp.sqrt(2 / mp.pi) * mp.exp(-z * z / 2))
        z += step
        if abs(step) < mpf(2) ** -220:
            return z
    raise ArithmeticError(f"Newton's method did not converge for {tail}")


def tail_of(w: mpf) -> mpf:
    """The V with w = -log(V (2 - V))."""
    e = mp.exp(-w)
    return e / (1 + mp.sqrt(1 - e))


def g(w: mpf) -> mpf:
    if w < mpf(10) ** -40:
        return mp.sqrt(mp.pi / 2)
    v = tail_of(w)
    return absolute_normal(v) / (1 - v)


# -- Polynomials ------------------------------------------------------------------------------


class Fit:
    """A polynomial of (x - center) for x in [low, high], highest power first, as doubles."""

    def __init__(
        self, name: str, f: Callable[[mpf], mpf], low: float, high: float, center: float, deg: int
    ):
        self.name, self.f = name, f
        self.low, self.high, self.center = mpf(low), mpf(high), mpf(center)
        half, middle = (self.high - self.low) / 2, (self.high + self.low) / 2
        n = deg + 1
        nodes = [mp.cos(mp.pi * (2 * k + 1) / (2 * n)) for k in range(n)]
        values = [f(half * x + middle) for x in nodes]
        series = [
            2 * sum(values[k] * mp.cos(j * mp.pi * (2 * k + 1) / (2 * n)) for k in range(n)) / n
            for j in range(n)
        ]
        series[0] /= 2
        # t = (x - middle) / half = (X + center - middle) / half for X = x - center.
        t = [(self.center - middle) / half, 1 / half]
        before, now = [mpf(1)], t
        powers = _add(_scaled(before, series[0]), _scaled(now, series[1]))
        for j in range(2, n):
            before, now = now, _add(_scaled(_product(t, now), mpf(2)), _scaled(before, mpf(-1)))
            powers = _add(powers, _scaled(now, series[j]))
        self.coefs = [float(c) for c in reversed(powers)]

    def __call__(self, x: mpf) -> mpf:
        return mp.polyval([mpf(c) for c in self.coefs], x - self.center)

    def points(self, count: int) -> list[mpf]:
        """Chebyshev points, denser than the extrema of the error, and the ends."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        return [middle - half * mp.cos(mp.pi * k / (count - 1)) for k in range(count)]

    def rounding(self, x: mpf, error: mpf) -> mpf:
        """Bounds the error of Horner's rule at an x with that error."""
        t = x - self.center
        error += UNIT * abs(t)
        total, value = mpf(0), mpf(self.coefs[0])
        for c in self.coefs[1:]:
            product = value * t
            total = total * abs(t) + UNIT * abs(product)
            value = product + mpf(c)
            total += UNIT * abs(value)
        slope = mp.polyval(_derivative([mpf(c) for c in self.coefs]), t)
        return total * (1 + 64 * UNIT) + abs(slope) * error


def _add(a: Sequence[mpf], b: Sequence[mpf]) -> list[mpf]:
    n = max(len(a), len(b))
    return [(a[i] if i < len(a) else mpf(0)) + (b[i] if i < len(b) else mpf(0)) for i in range(n)]


def _scaled(a: Sequence[mpf], factor: mpf) -> list[mpf]:
    return [x * factor for x in a]


def _product(a: Sequence[mpf], b: Sequence[mpf]) -> list[mpf]:
    out = [mpf(0)] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] += x * y
    return out


def _derivative(powers: Sequence[mpf]) -> list[mpf]:
    degree = len(powers) - 1
    return [c * (degree - i) for i, c in enumerate(powers[:-1])]


# Far out, where a sample in 2^24 lies, the estimate only has to narrow a search down.
FITS = {
    "CENTRAL": Fit("CENTRAL", g, 0, 5, 2.5, 22),
    "MIDDLE": Fit("MIDDLE", lambda r: g(r * r), 2.236, 4, 3, 22),
    "FAR": Fit("FAR", lambda r: g(r * r), 4, 9.5, 6.5, 14),
}


# -- Bounds -----------------------------------------------------------------------------------


def error_of_w(v: mpf, w: mpf, error_of_v: mpf) -> mpf:
    """Bounds the error of w as computed: V (2 - V), and the logarithm by 2 atanh(s)."""
    relative = error_of_v / v * (2 - 2 * v) / (2 - v) + UNIT / (2 - v) + UNIT
    q = mp.exp(-w)
    mantissa, exponent = mp.frexp(q)
    if mantissa < mp.sqrt(0.5):
        mantissa, exponent = mantissa * 2, exponent - 1
    log_m = abs(mp.log(mantissa))
    s_most = mpf("0.1716")
    left_out = 2 * s_most ** (2 * LOG_TERMS + 1) / (2 * LOG_TERMS + 1) / (1 - s_most**2)
    # s has 2 roundings, s^2 five, the sum of the series less than 1.2, their product one.
    of_log = 4.3 * UNIT * log_m + left_out
    return relative + of_log + 2 * UNIT * abs(exponent) * mp.log(2) + UNIT * abs(w)


def error_of_z(fit: Fit, x: mpf, with_granularity: bool) -> tuple[mpf, mpf]:
    """|z| at a point of the fit, and a bound on its error as computed."""
    w = x if fit.name == "CENTRAL" else x * x
    v, value = tail_of(w), fit.f(x)
    u = 1 - v
    # V is known up to 2^-64, and rounded.
    error_of_v = 2 * UNIT * v + (mpf(2) ** -64 if with_granularity else 0)
    error = error_of_w(v, w, error_of_v)
    if fit.name != "CENTRAL":
        error = error / (2 * x) + UNIT * x
    of_value = fit.rounding(x, error) + abs(fit(x) - value)
    z = u * value
    return z, u * of_value + value * (error_of_v + UNIT / 2) + z * UNIT


def bounds() -> dict[str, float]:
    """The constants of the error bounds.

    CENTRAL_BOUND: |z| is wrong by less than CENTRAL_BOUND (1 + |z|) there; MIDDLE_BOUND and
    FAR_BOUND: by less than those, apart from the 2^-64 / (|z| V) of what 64 bits leave open.
    """
    central = max(
        error / (1 + z)
        for z, error in (
            error_of_z(FITS["CENTRAL"], x, True) for x in FITS["CENTRAL"].points(4001)[1:]
        )
    )
    rest = {
        name: max(error_of_z(FITS[name], x, False)[1] for x in FITS[name].points(1001))
        for name in ("MIDDLE", "FAR")
    }
    found = {"CENTRAL_BOUND": central, **{f"{name}_BOUND": e for name, e in rest.items()}}
    return {name: float(error * 5 / 4) for name, error in found.items()}


# -- Tables -----------------------------------------------------------------------------------

HEADER = "Written by tools/gaussian_table.py, which says what the numbers are. Do not edit."


def python_table(found: dict[str, float]) -> str:
    lines = [f'"""{HEADER}"""', "", "__all__ = ["]
    names = sorted([*FITS, *found])
    lines += [f'    "{name}",' for name in names] + ["]", ""]
    for name, fit in FITS.items():
        lines += [f"{name} = ("] + [f"    {c!r}," for c in fit.coefs] + [")"]
    lines += [f"{name} = {value!r}" for name, value in found.items()]
    return "\n".join(lines) + "\n"


def cpp_table(found: dict[str, float]) -> str:
    lines = [f"// {HEADER}", "#ifndef JPK_GAUSSIAN_TABLE_H_", "#define JPK_GAUSSIAN_TABLE_H_", ""]
    lines += ["namespace jpk::gaussian_table {", "", "// clang-format off"]
    for name, fit in FITS.items():
        lines.append(f"inline constexpr double k{_camel(name)}[] = {{")
        lines += [f"    {c.hex()}," for c in fit.coefs] + ["};"]
    for name, value in found.items():
        lines.append(f"inline constexpr double k{_camel(name)} = {value.hex()};")
    lines += ["// clang-format on", "", "}  // namespace jpk::gaussian_table", ""]
    return "\n".join([*lines, "#endif  // JPK_GAUSSIAN_TABLE_H_"]) + "\n"


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def tables() -> dict[pathlib.Path, str]:
    """The files and what belongs into them."""
    found = bounds()
    python = ROOT / "python" / "jax_privacy_kernels" / "ops" / "grid_noise" / "_table.py"
    return {
        python: python_table(found),
        ROOT / "csrc" / "gaussian_table.h": cpp_table(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables")
    args = parser.parse_args()
    for fit in FITS.values():
        worst = max(abs(fit(x) - fit.f(x)) for x in fit.points(601))
        print(f"{fit.name}: degree {len(fit.coefs) - 1}, off by 2^{float(mp.log(worst, 2)):.1f}")
    for path, text in tables().items():
        print(path.relative_to(ROOT))
        if args.write:
            path.write_text(text)
    for name, value in bounds().items():
        print(f"{name} = 2^{float(mp.log(value, 2)):.2f}")


if __name__ == "__main__":
    main()
