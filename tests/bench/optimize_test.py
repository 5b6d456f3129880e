"""The planning benchmark runs, and its report is complete: times themselves are not checked."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from support import benchmarks

from jax_privacy_kernels.matrix_factorization import toeplitz

CASES = ("banded", "inverse")

bench = benchmarks.fixture("optimize")


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("optimize")

    def find(name: str, case_name: str, quick: bool) -> dict[str, Any]:
        assert quick
        return bench.find(name, bench.CASES[case_name].smaller())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "find_in_new_process", find)  # Each takes seconds to start.
        bench.main(["--quick", "--output-dir", str(folder), "--cases", *CASES])
    (path,) = folder.glob("optimize-*.json")
    return json.loads(path.read_text()), path


def _matrix(coef: np.ndarray, n: int) -> np.ndarray:
    lags = np.subtract.outer(np.arange(n), np.arange(n))
    padded = np.pad(coef, (0, n - coef.size))
    return np.where(lags >= 0, padded[lags], 0.0)


def test_report_is_complete_and_finite(run, bench):
    report, _ = run
    benchmarks.check_report(report)
    assert tuple(row["case"] for row in report["rows"]) == CASES
    for row in report["rows"]:
        names = set(bench.CASES[row["case"]].first)
        assert set(row["implementations"]) == names
        for times in row["implementations"].values():
            assert times["first_calls_s"] == [times["first_call_s"]]
            assert times["rounds"] == 2
            assert times["coefficients"] == 4
        compared = names - {"peer"} if "peer" in names else set()
        assert set(row["speedup"]) == set(row["first_call_speedup"]) == compared


def test_what_is_found_is_as_good_as_the_peers(run, bench):
    report, _ = run
    for row in report["rows"]:
        losses = [times["loss"] for times in row["implementations"].values()]
        assert max(losses) == pytest.approx(min(losses), rel=1e-6)
    assert report["acceptance"] == []  # There are no floors for tiny sizes.
    checks = bench.acceptance(report["rows"])
    assert [check["floor"] for check in checks] == [
        "banded: loss, cpp above peer",
    ]
    assert all(check["pass"] for check in checks)


def test_text_shows_every_contestant(run, bench):
    lines = bench.describe(run[0]).splitlines()
    for row in run[0]["rows"]:
        shown = [line for line in lines if line.startswith(f"{row['case']} ")]
        assert len(shown) == len(row["implementations"])


def test_plot_is_written(run):
    assert run[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_loss_of_a_banded_strategy(bench):
    case, n = bench.CASES["banded"].smaller(), 200
    coef = np.array([1.0, 0.6, 0.3, 0.1])
    B = np.tri(n) @ np.linalg.inv(_matrix(coef, n))
    assert bench.loss(case, coef) == pytest.approx((B**2).sum() / n * (coef**2).sum(), rel=1e-12)


def test_loss_by_row(bench):
    case = bench.CASES["by_row"].smaller()
    n, bands = case.steps, case.arguments["bands"]
    params = np.random.default_rng(0).uniform(0.1, 1, (n, bands))
    C = sum(np.diag(params[: n - lag, lag], -lag) for lag in range(bands))
    B = np.tri(n) @ np.linalg.inv(C / np.linalg.norm(C, axis=0))
    assert bench.loss(case, params.reshape(-1)) == pytest.approx((B**2).sum() / n, rel=1e-12)


def test_loss_of_a_dense_strategy(bench):
    case = bench.CASES["dense"].smaller()
    n, epochs = case.steps, case.arguments["epochs"]
    C = np.eye(n) + np.tril(np.random.default_rng(0).uniform(size=(n, n)))
    B = np.tri(n) @ np.linalg.inv(C)
    rounds = C.T @ C
    user = max(rounds[i :: n // epochs, i :: n // epochs].sum() for i in range(n // epochs))
    assert bench.loss(case, C.reshape(-1)) == pytest.approx((B**2).sum() / n * user, rel=1e-12)


def test_loss_of_buffers(bench):
    case = bench.CASES["buffers"].smaller()
    n, min_sep = case.steps, case.arguments["min_sep"]
    k = case.arguments["max_participations"]
    decays, scales = np.array([0.9, 0.5]), np.array([0.2, 0.3])
    tail = (scales * decays ** np.arange(n - 1)[:, None]).sum(axis=1)
    C = _matrix(np.concatenate([[1.0], tail]), n)
    B = np.tri(n) @ np.linalg.inv(C)
    user = C[:, : k * min_sep : min_sep].sum(axis=1)
    expected = (B**2).sum(axis=1).max() * (user**2).sum()
    assert bench.loss(case, [*decays, *scales]) == pytest.approx(expected, rel=1e-12)


def test_loss_of_a_banded_inverse(bench):
    case = bench.CASES["inverse"].smaller()
    n, min_sep = case.steps, case.arguments["min_sep"]
    k = case.arguments["max_participations"]
    coef = np.asarray(toeplitz.banded_inverse_square_root_noising_coefs(4), np.float64)
    B = np.tri(n) @ _matrix(coef, n)
    C = np.linalg.inv(_matrix(coef, n))
    user = C[:, : k * min_sep : min_sep].sum(axis=1)
    expected = (B**2).sum() / n * (user**2).sum()
    assert bench.loss(case, coef) == pytest.approx(expected, rel=1e-12)


def test_a_first_call_finds_bands_and_stddev(bench):
    found = bench.find("cpp", bench.CASES["amplified"].smaller())
    assert found["seconds"] > 0
    assert np.linalg.norm(found["coef"]) == pytest.approx(1)
    assert found["stddev"] > 0
    json.dumps(found)  # It goes from process to process.


def test_the_peer_may_end_early(bench):
    case = bench.CASES["dense_1024_8"]
    expected = {"n": 1024, "epochs": 8}
    assert bench.contestant("peer", case).keywords == expected | {"max_optimizer_steps": 40}
    assert case.arguments == expected


def test_a_new_process_finds_the_same(bench):
    found = bench.find_in_new_process("cpp", "banded", quick=True)
    assert found["seconds"] > 0
    assert found["coef"] == bench.find("cpp", bench.CASES["banded"].smaller())["coef"]
    assert found["stddev"] is None


def test_a_failing_process_is_reported(bench):
    with pytest.raises(RuntimeError, match=r"(?s)banded, nobody failed:.*nobody"):
        bench.find_in_new_process("nobody", "banded", quick=True)


def test_acceptance_at_full_size(bench):
    def row(name: str, value: float, **found: float) -> dict[str, Any]:
        case = bench.CASES[name]
        return {
            "case": name,
            "arguments": dict(case.arguments),
            "speedup": {"cpp": value},
            "first_call_speedup": {"cpp": value},
            "implementations": {
                n: {"first_call_s": value, "coefficients": 8, "loss": 1.0}
                | ({"stddev": 1.0} if name == "amplified" else {})
                | (found if n == "cpp" else {})
                for n in case.first
            },
        }

    def verdicts(row: dict[str, Any]) -> list[bool]:
        return [check["pass"] for check in bench.acceptance([row])]

    assert verdicts(row("banded", 20.0)) == [True, True, True]
    assert verdicts(row("banded", 2.0, loss=1 + 1e-8)) == [False, False, False]
    assert verdicts(row("banded", 20.0, loss=1 + 1e-10)) == [True, True, True]
    assert verdicts(row("banded_large", 59.0)) == [True]
    assert verdicts(row("banded_large", 61.0)) == [False]
    assert verdicts(row("inverse", 1.0, loss=1.01)) == []
    assert verdicts(row("amplified", 15.0)) == [True, True, True]
    assert verdicts(row("amplified", 14.0, coefficients=6, stddev=1.01)) == [False, False, False]
