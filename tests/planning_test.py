"""The planner: rows say what their mechanisms are, and no row claims too much privacy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_privacy_kernels import (
    _plan_command,
    _plan_privacy,
    _plan_rows,
    _step_times,
    monte_carlo,
    planning,
)
from jax_privacy_kernels.__main__ import main
from jax_privacy_kernels.matrix_factorization import (
    _amplification,
    dense,
    streaming_matrix,
    toeplitz,
)

TARGET = {"steps": 32, "dataset_size": 80, "batch_size": 10, "epsilon": 2.0, "delta": 1e-3}


@pytest.fixture(scope="module")
def workload():
    return np.asarray(toeplitz.momentum_sgd_coefs(32, momentum=0.5), np.float64)


@pytest.fixture(scope="module")
def table(workload, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    A = streaming_matrix.momentum_sgd_matrix(0.5)
    yield planning.plan(**TARGET, workload=A, parameters=1000)
    patch.undo()


def participations(n, min_sep, most):
    """The patterns with as many participations as there may be."""
    return [range(first, n, min_sep)[:most] for first in range(min_sep)]


def test_rows_are_those_asked_for(table):
    samplings = {row.sampling for row in table.rows}
    assert samplings == {"fixed", "poisson"}
    names = [row.mechanism.split(",")[0] for row in table.rows]
    toeplitz_families = {"independent noise", "banded Toeplitz", "BLT", "banded inverse"}
    assert set(names) == toeplitz_families | {"column-normalized", "lambda-CGD"}
    rmse = [row.rmse for row in table.rows]
    assert rmse == sorted(rmse)
    assert table.best() is table.rows[0]
    assert table.target["min_sep"] == 8
    assert table.target["participations"] == 4


def test_columns_of_their_own_have_less_error(table):
    by_name = {row.mechanism: row for row in table.rows if row.sampling == "fixed"}
    best = by_name["column-normalized, 8 bands"]
    assert 0.97 < best.rmse / by_name["banded Toeplitz, 8 bands"].rmse < 1
    assert best is table.best() or table.best().sampling == "poisson"
    reports = []
    with jax.enable_x64(True):
        A = jnp.asarray(streaming_matrix.momentum_sgd_matrix(0.5).materialize(32))
        dense.optimize(
            32, bands=8, epochs=4, equal_norm=True, A=A, rtol=1e-4, report=reports.append
        )
    least = best.noise_multiplier / TARGET["batch_size"] * math.sqrt(reports[0].loss)
    np.testing.assert_allclose(best.rmse, least, rtol=1e-3)


def test_workloads_are_known_by_their_coefficients(workload):
    """Where they are Toeplitz; and columns of their own are optimized where errors are cheap."""
    matrix = streaming_matrix.momentum_sgd_matrix(0.5, np.full(3, 2.0))
    coefs, A, followed = planning._workload(matrix, 32)
    np.testing.assert_allclose(coefs, 2 * workload, rtol=1e-6)
    assert A is None
    assert followed is matrix
    changing = streaming_matrix.momentum_sgd_matrix(0.5, np.array([2.0, 1.0]))
    assert planning._workload(changing, 32) == (None, changing, changing)
    assert planning._workload(changing, 1)[0] == pytest.approx([2.0])
    other = streaming_matrix.diagonal(np.ones(32))
    assert planning._workload(other, 32) == (None, other, None)
    coefs, A, followed = planning._workload(workload, 32)
    np.testing.assert_array_equal(coefs, workload)
    assert A is None
    assert followed is None


def test_epsilon_is_what_an_accountant_says(table):
    pld = pytest.importorskip("dp_accounting.pld")
    for row in table.rows:
        assert row.epsilon <= 2
        # Numbers in sentences are no better than those that hold.
        stated = float(row.guarantee.rpartition("noise multiplier ")[2].rstrip("."))
        assert row.noise_multiplier <= stated <= row.noise_multiplier * (1 + 1e-5)
        assert row.epsilon <= float(row.guarantee.split("(")[1].split(",")[0]) <= 2
    events = {row.noise_multiplier: row.event for row in table.rows}
    for event in events.values():
        accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
        spent = accountant.compose(event).get_epsilon(TARGET["delta"])
        assert 2 * 0.999 < spent <= 2 * (1 + 1e-6)


def test_error_and_sensitivity_are_those_of_the_matrix(table, workload):
    """Of the noising matrix as it is run, in float32, by definition."""
    n = TARGET["steps"]
    A = sum(a * np.eye(n, k=-lag) for lag, a in enumerate(workload))
    for row in table.rows:
        noising = np.asarray(row.noising_matrix().materialize(n), np.float64)
        errors = np.sum((A @ noising) ** 2, axis=1)
        stddev = row.stddev / TARGET["batch_size"]
        np.testing.assert_allclose(row.rmse, stddev * math.sqrt(errors.mean()), rtol=1e-5)
        np.testing.assert_allclose(row.rmse_last, stddev * math.sqrt(errors[-1]), rtol=1e-5)
        C = np.linalg.inv(noising)
        if row.sampling == "fixed":
            norms = [
                np.linalg.norm(np.abs(C[:, list(rounds)]).sum(axis=1))
                for rounds in participations(n, 8, 4)
            ]
            worst = max(norms)
        else:
            worst = np.linalg.norm(C, axis=0).max()
        assert row.sensitivity >= worst
        assert row.sensitivity <= worst * 1.05
        assert row.stddev >= row.noise_multiplier * row.sensitivity


def test_privatizers_are_ready(table):
    gradients = {"w": jnp.zeros(1000)}
    for row in table.rows:
        privatizer = row.privatizer(clip_norm=3.0, prng_key=jax.random.key(1))
        state = privatizer.init(gradients)
        noise, state = jax.jit(privatizer.update)(gradients, state)
        assert row.state_bytes == 4 * 1000 * round(row.state_bytes / 4000)
        # The first row of C^-1 has one entry.
        first = abs(float(row.noising_matrix().materialize(1)[0, 0]))
        expected = 3 * row.stddev * first
        np.testing.assert_allclose(float(jnp.std(noise["w"])), expected, rtol=0.12)


def test_the_table_is_shown(table, tmp_path):
    text = str(table)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert table.best().mechanism in text
    assert " ".join(text.split("\n\n")[1].split()) == table.best().guarantee
    assert table.to_markdown().count("\n") == len(table.rows) + 1
    assert json.loads(json.dumps(table.to_dict()))["rows"][0]["rmse"] == table.best().rmse
    pytest.importorskip("matplotlib")
    table.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_every_row_is_drawn_once_within_the_axes(table, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(planning, "draw_whole", lambda figure, path: drawn.append(figure))
    table.plot("plan.png")
    (axes,) = drawn[0].axes
    points = sorted(xy for line in axes.lines for xy in zip(*line.get_data(), strict=True))
    assert points == sorted((row.state_bytes, row.rmse) for row in table.rows)
    low, high = axes.get_xlim()
    assert all(low < x < high for x, _ in points)
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks[0] == "0"
    assert all(tick.endswith("B") for tick in ticks[1:])
    labels = axes.get_legend_handles_labels()[1]
    assert len(set(labels)) == len(labels)


def test_wide_numbers_fit(table):
    row = dataclasses.replace(
        table.rows[0],
        mechanism="banded Toeplitz, 128 bands",
        noise_multiplier=12345.6,
        rmse=1.23456e-5,
        rmse_last=1.23456e-5,
        state_bytes=1000 * 1024**2,
        milliseconds=123456.0,
        seconds=1234.5,
    )
    text = str(planning.Plan((row,), table.target))
    assert max(map(len, text.splitlines())) <= 80
    assert "1000 MiB" in text


def test_guarantees_are_rounded_to_the_safe_side():
    target = _amplification.Target(32, 80, 10, 1.2345634, 1.2345678e-5)
    assert _plan_privacy._claim(target, 1.2345633) == "The run is (1.2345634, 1.2345678e-05)-DP"
    assert _plan_privacy._claim(target, 1.2) == "The run is (1.2, 1.2345678e-05)-DP"
    assert _plan_privacy._up(8.333331) == "8.33334"
    assert _plan_privacy._down(0.0083333399) == "0.00833333"


def test_times_are_measured_once(table, monkeypatch):
    def fails(*_):
        raise AssertionError

    monkeypatch.setattr(_step_times, "_measure", fails)
    row = table.best()
    key = f"{row.mechanism.partition(' =')[0]}, {row.state_bytes // 4000} slots"
    assert _step_times.milliseconds(key, None, 1000) == row.milliseconds > 0
    _step_times._path().write_text("not JSON")
    with pytest.raises(AssertionError):
        _step_times.milliseconds(key, None, 1000)


@pytest.mark.slow
def test_a_budget_leaves_out_what_does_not_fit(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = {"sampling": "poisson", "parameters": 1000}
    small = planning.plan(**TARGET, **options, memory_budget=4000)
    assert [row.state_bytes for row in small.rows] == [4000, 0]
    none = planning.plan(**TARGET, **options, memory_budget=3999)
    assert [row.mechanism for row in none.rows] == ["independent noise"]
    all_of_them = planning.plan(**TARGET, **options, memory_budget=math.inf)
    assert max(row.state_bytes for row in all_of_them.rows) == 4 * 1000 * 7


@pytest.mark.slow
def test_workloads_that_are_matrices():
    """Learning rates that fall: errors are those of the matrices, and banded ones are optimal."""
    rates = np.linspace(1, 0.1, 32)
    A = streaming_matrix.momentum_sgd_matrix(0.5, rates)
    table = planning.plan(**TARGET, workload=A, sampling="fixed")
    full = np.asarray(A.materialize(32), np.float64)
    for row in table.rows:
        noising = np.asarray(row.noising_matrix().materialize(32), np.float64)
        error = np.sum((full @ noising) ** 2, axis=1)
        expected = row.stddev / TARGET["batch_size"] * math.sqrt(error.mean())
        np.testing.assert_allclose(row.rmse, expected, rtol=1e-5)
    by_name = {row.mechanism: row for row in table.rows}
    best = by_name["banded Toeplitz, 8 bands"]
    with jax.enable_x64(True):
        coef = toeplitz.optimize_banded_toeplitz(32, 8, A=A)
        least = math.sqrt(toeplitz.loss(coef, 32, A=A) * 4) / TARGET["batch_size"]
    np.testing.assert_allclose(best.rmse, best.noise_multiplier * least, rtol=2e-6)


@pytest.mark.slow
def test_balls_in_bins_by_monte_carlo():
    """With a large delta, for which few samples are enough."""
    pld = pytest.importorskip("dp_accounting.pld")
    target = TARGET | {"steps": 16, "delta": 0.05, "epsilon": 1.0}
    table = planning.plan(**target, sampling="bins", accountant="monte_carlo", seed=3)
    assert [row.sampling for row in table.rows] == ["bins"] * 3
    for row in table.rows:
        assert (row.epsilon, row.delta) == (1.0, 0.05)
        assert row.guarantee.startswith("The run is (1, 0.05)-DP if one example is replaced")
        noising = np.asarray(row.noising_matrix().materialize(16), np.float64)
        c = np.linalg.inv(noising)[:, 0]
        np.testing.assert_allclose(row.sensitivity, np.linalg.norm(c), rtol=1e-6)
        bound = monte_carlo.delta(
            monte_carlo.BallsInBins(iterations=16, cycle_length=8),
            np.maximum(c, 0),
            noise_multiplier=row.stddev,
            epsilon=1.0,
            num_samples=20_000,
            seed=4,
        )
        assert bound.delta <= 0.05
        accountant = pld.PLDAccountant()
        assert not accountant.supports(row.event)
        # Less noise than without sampling at random.
        fixed = _amplification.Target(16, 80, 10, 1.0, 0.05).unamplified()[0]
        assert row.noise_multiplier < fixed * math.sqrt(2)
    again = planning.plan(**target, sampling="bins", accountant="monte_carlo", seed=3)
    assert [row.stddev for row in again.rows] == [row.stddev for row in table.rows]


@pytest.mark.parametrize("bands", [1, 5])
def test_no_more_is_spent_than_the_target(bands):
    """Of tiny deltas too, for which rounding counts."""
    target = _amplification.Target(64, 6000, 60, 2.0, 1e-12)
    multiplier, epsilon = target.amplified(bands)
    assert 2 * 0.999 < epsilon <= 2
    assert multiplier == pytest.approx({1: 1.11, 5: 1.5027}[bands], rel=1e-4)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
def test_tiny_targets_take_few_steps(monkeypatch, epsilon):
    """Where epsilon is 0 for a little more noise than enough: four steps that all take part in."""
    target = _amplification.Target(32, 80, 10, epsilon, 1e-3)
    tried = []
    excess = target._excess
    monkeypatch.setattr(target, "_excess", lambda *x: tried.append(x) or excess(*x))
    multiplier, spent = target.amplified(8)
    assert spent <= epsilon
    assert len(tried) <= 10

    def delta(s):  # of the Gaussian mechanism, https://arxiv.org/abs/1805.06530, Theorem 8
        return stats.norm.cdf(s / 2 - epsilon / s) - np.exp(epsilon) * stats.norm.cdf(
            -s / 2 - epsilon / s
        )

    assert delta(2 / multiplier) <= 1e-3
    assert delta(2 / multiplier * (1 + 4e-4)) > 1e-3


@pytest.mark.parametrize(
    ("size", "bands"),
    [
        (80, [1, 2, 4, 8]),
        (83, [1, 2, 4, 8]),  # a prime
        (85, [1, 2, 4, 5]),  # five of 85 are too many to leave out for 8 parts
        (60_000, [1, 2, 4, 8, 16, 32]),
        (1_281_167, [1, 2, 4, 8, 16, 32]),  # ImageNet, a prime as well
    ],
)
def test_parts_of_data_that_cannot_be_divided(size, bands):
    target = _amplification.Target(32, size, 10, 2.0, 1e-3)
    problem = _plan_rows.Problem(32, 8, 4, None, None, None, math.inf)
    poisson = _plan_privacy.Poisson(target, problem)
    assert sorted({poisson._near(2**i) for i in range(8)}) == bands
    if size == 83:
        few = _plan_privacy.Poisson(target, dataclasses.replace(problem, slots=2))
        assert sorted({few._near(2**i) for i in range(8)}) == [1, 2]
        row = poisson._private(4)
        assert "the data but 3 of them are cut into 4 equal parts" in row.guarantee
        assert row.event.event.sampling_probability == 10 / 20


def test_epochs_are_participations():
    assert planning._participation(32, 80, 10, 4, None) == (8, 4)
    # 33 steps of 8 or more between participations have room for five.
    assert planning._participation(33, 80, 10, 4, None) == (8, 5)
    assert planning._participation(4, 80, 10, None, None) == (4, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "expected steps >= 1"),
        ({"batch_size": 100}, "expected batch_size <= dataset_size=80, found batch_size=100"),
        ({"epsilon": 0.0}, "0 < epsilon < inf"),
        ({"epsilon": 1e-9, "delta": 1e-9}, r"delta=1e-09, which is 0\.0125 and more"),
        ({"delta": 1.0}, "0 < delta < 1"),
        ({"min_sep": 9}, "at most dataset_size // batch_size = 8 steps"),
        ({"epochs": 2}, "epochs=2 of 32 steps take 16 steps each"),
        ({"epochs": 33}, "epochs <= steps=32"),
        ({"epochs": 4, "min_sep": 8}, "found both"),
        ({"sampling": "random"}, "sampling to be one of"),
        ({"memory_budget": 10}, "expected parameters with memory_budget"),
        ({"memory_budget": -1, "parameters": 10}, "memory_budget to be at least 0"),
        ({"parameters": 0}, "parameters >= 1"),
        ({"workload": [1.0, np.inf]}, "workload to be finite"),
        ({"workload": np.ones((3, 3))}, "found shape"),
        ({"workload": np.ones(31)}, r"workload of shape \(32,\), found \(31,\)"),
        ({"workload": np.ones(33)}, r"workload of shape \(32,\), found \(33,\)"),
        ({"accountant": "gdp"}, "accountant to be one of"),
        ({"sampling": "bins"}, "expected accountant='monte_carlo' with sampling='bins'"),
        ({"seed": -1}, "expected seed >= 0, found seed=-1"),
        ({"seed": 2**64}, "expected seed < 2"),
        ({"epsilon": math.nan}, "0 < epsilon < inf, found epsilon=nan"),
        ({"memory_budget": math.nan, "parameters": 10}, "memory_budget to be at least 0"),
    ],
)
def test_bad_input_is_told(changed, message):
    with pytest.raises(ValueError, match=message):
        planning.plan(**(TARGET | changed))


@pytest.mark.parametrize("value", [True, "3", None, [1], 1j])
@pytest.mark.parametrize("name", ["steps", "dataset_size", "batch_size", "epsilon", "delta"])
def test_bad_types_are_told(name, value):
    with pytest.raises(TypeError, match=f"expected {name} to be"):
        planning.plan(**(TARGET | {name: value}))
    with pytest.raises(TypeError, match="expected seed to be an integer"):
        planning.plan(**TARGET, seed="3")
    with pytest.raises(TypeError, match="expected progress to be True, False or None"):
        planning.plan(**TARGET, progress=3)


ODD = [
    *(0, -1, 1.5, 10**30, 10**400, 2**63, math.nan, math.inf, -math.inf, 1e-320, 1j, True),
    *("3", "x", b"1", {}, [], [1], object(), np.bool_(True), np.float32("nan"), None),
    *(np.array([1, 2]), np.ones((1, 1)), np.array(["a"]), np.full(32, 1e300), jnp.ones(())),
]


@pytest.mark.parametrize("name", inspect.signature(planning.plan).parameters)
def test_odd_arguments_are_type_errors_or_value_errors(monkeypatch, name):
    """Before any work: there are no mechanisms, which is a ValueError as well."""

    class NoJobs:
        def __init__(self, *_):
            pass

        def jobs(self):
            return []

    for sampling in ("FixedOrder", "Poisson", "BallsInBins"):
        monkeypatch.setattr(planning, sampling, NoJobs)
    for value in ODD:
        with pytest.raises((TypeError, ValueError)):
            planning.plan(**(TARGET | {"parameters": 10, "accountant": "monte_carlo", name: value}))


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(1e30, 1e-3), (1e4, 1e-3), (1e-320, 0.3), (2.0, 1e-30), (2.0, 1e-320)]
)
def test_extreme_targets_are_reached(epsilon, delta):
    """Where the numbers of accountants overflow, vanish, or are less than what they leave out."""
    target = _amplification.Target(8, 80, 10, epsilon, delta)
    multiplier, spent = target.unamplified()
    assert spent <= epsilon
    wide = min(epsilon, 1e4)
    # Of the Gaussian mechanism, https://arxiv.org/abs/1805.06530, Theorem 8.
    s = 1 / multiplier
    log_second = wide + stats.norm.logcdf(-s / 2 - wide / s)
    exact = stats.norm.cdf(s / 2 - wide / s) - np.exp(min(log_second, 0))
    assert epsilon > wide or exact <= delta * (1 + 1e-6) + 1e-16
    amplified, spent = target.amplified(2)
    assert spent <= epsilon
    assert 0 < amplified < math.inf


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TARGET.items()]
    main(["plan", *options, "--sampling=poisson", "--json", "--steps=3.2e1"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["target"]["steps"] == 32
    assert all(row["sampling"] == "poisson" for row in shown["rows"])
    for wrong, said in (
        ("--epsilon=0", "plan: error: expected 0 < epsilon < inf"),
        ("--epochs=1.5", "expected a whole number from 1 on, found '1.5'"),
        ("--min-sep=nan", "expected a number, found 'nan'"),
        ("--steps=1e14", "found n=100000000000000"),
        ("--plot=missing/x.png", "expected a file that can be written"),  # before any work
        ("--plot=x.txt", "expected a picture, whose name ends in one of"),
        ("--plot=-", "expected a picture, whose name ends in one of"),
        ("--parameters=nan", "argument --parameters: expected a number, found 'nan'"),
        ("--steps=0", "argument --steps: expected a whole number from 1 on, found '0'"),
        ("--batch-size=1.5", "argument --batch-size: expected a whole number"),
        ("--memory-budget=1e9", "expected parameters with memory_budget"),
        ("--momentum=1", "expected momentum to be in [0, 1)"),
        ("--decay=0", "expected decay to be in (0, 1]"),
        (f"--dataset-size={10**30}", "expected dataset_size <= 10000000000000"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["plan", *options, wrong])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.subprocess
def test_python_m():
    command = [sys.executable, "-m", "jax_privacy_kernels", "plan", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--memory-budget" in result.stdout
    assert _plan_command.__doc__ is not None
