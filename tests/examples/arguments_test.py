"""All examples check their arguments before any work: one line on stderr, exit status 2."""

from __future__ import annotations

import importlib
import pathlib
import re

import arguments
import pytest

for _module in ("sklearn", "matplotlib", "tqdm", "optax", "jax_privacy", "orbax.checkpoint"):
    pytest.importorskip(_module, reason=f"{_module} is missing; install the test extra")

EVERYONE = {
    "--output=/nowhere/at/all.png": "be written, found /nowhere/at/all.png: No such",
    "--output=.": "file that can be written, found .: Is a directory",
    "--output=table.txt": "expected a name that ends in one of ",
    "--what": "unrecognized arguments: --what",
}
BAD = {
    "attack": {
        "--coordinates=0": "expected a whole number from 1 on, found 0",
        "--coordinates=nan": "expected a whole number from 1 on, found nan",
    },
    "train_exact": {
        "--delta=0": "expected a number from 1e-12 to below 1, found 0",
        "--delta=nan": "found nan",
        "--epsilon=0": "expected a number from 0.01 to below 100, found 0",
        "--epochs=0": "expected a whole number from 1 on, found 0",
        "--seeds=-1": "found -1",
        "--batch-size=1441": "--batch-size must be between 1 and 1440, got 1441",
    },
    "train_digits": {
        "--delta=0": "expected a number from 1e-12 to below 1, found 0",
        "--delta=1": "expected a number from 1e-12 to below 1, found 1",
        "--delta=nan": "found nan",
        "--epsilon=0": "expected a number from 0.01 to below 100, found 0",
        "--epsilon=inf": "found inf",
        "--epsilon=-1": "found -1",
        "--epochs=0": "expected a whole number from 1 on, found 0",
        "--epochs=ten": "found ten",
        "--seeds=-1": "found -1",
        "--batch-size=1441": "--batch-size must be between 1 and 1440, got 1441",
        "--bands=37": "--bands must be between 1 and 36",
        "--lr-bandmf=nan": "expected a number above 0, found nan",
    },
    "swap_in": {
        "--bands=0": "expected a whole number from 1 on, found 0",
        "--bands=65": "between 1 and 64, got 65",
        "--hidden=0": "expected a whole number from 1 on, found 0",
        "--noise-multiplier=0": "expected a number above 0, found 0",
        "--noise-multiplier=nan": "found nan",
    },
    "optimize_strategy": {
        "--n=0": "expected a whole number from 1 on, found 0",
        "--n=10 --epochs=11": "1 <= epochs <= n=10, found epochs=11",
        "--n=10 --epochs=1 --min-sep=11": "min_sep <= n=10, found min_sep=11",
        "--n=10 --epochs=2 --min-sep=0": "expected a whole number from 1 on, found 0",
        "--n=10 --epochs=5 --min-sep=3": "found room for 4 ",
        "--n=10 --epochs=2 --bands 11": "bands <= n=10, found bands=[11]",
        "--n=10 --epochs=2 --bands 0 3": "expected a whole number from 1 on, found 0",
    },
    "amplified_accounting": {
        "--examples=0": "expected a whole number from 1 on, found 0",
        "--batch=0": "expected a whole number from 1 on, found 0",
        "--batch=60001": "expected --batch <= 60000, found 60001",
        "--batch=ten": "expected a whole number from 1 on, found ten",
        "--epochs=0": "expected a whole number from 1 on, found 0",
        "--epsilon 1 0": "expected a number from 0.01 to below 100, found 0",
        "--epsilon=nan": "found nan",
        "--delta=0": "expected a number from 1e-12 to below 1, found 0",
        "--delta=1": "expected a number from 1e-12 to below 1, found 1",
        "--delta=nan": "found nan",
        "--bands 0": "expected a whole number from 1 on, found 0",
        "--bands 121": "expected --bands <= 120 steps an epoch, found 121",
        "--seed=-1": "expected a whole number from 0 to below 2^63, found -1",
        "--seed=one": "found one",
    },
    "train_transformer": {
        "--delta=0": "expected a number from 1e-12 to below 1, found 0",
        "--epsilon=nan": "found nan",
        "--steps=0": "expected a whole number from 1 on, found 0",
        "--bands=0": "expected a whole number from 1 on, found 0",
        "--batch-size=10 --micro-batch=3": "--batch-size to be a multiple of --micro-batch",
        "--batch-size=100000": "expected --batch-size to be at most",
        "--lr=-1": "expected a number above 0, found -1",
        "--noise-seed=9223372036854775808": "expected a whole number from 0 to below 2^63",
        "--checkpoints=/proc/no": "expected a folder that can be written, found /proc/no",
    },
}
CASES = [
    (name, line, said) for name, of in BAD.items() for line, said in {**of, **EVERYONE}.items()
]


def test_every_example_is_among_them():
    programs = {p.stem for p in pathlib.Path(arguments.__file__).parent.glob("*.py")}
    assert programs == {"arguments", *BAD}


@pytest.mark.parametrize(("name", "line", "said"), CASES, ids=[f"{n} {a}" for n, a, _ in CASES])
def test_bad_arguments_are_one_line(capsys, name, line, said):
    example = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        example.main(line.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert re.fullmatch(r"[^\n]+: error: [^\n]+\n", captured.err)


def test_output_is_left_as_it_was_when_arguments_are_checked(tmp_path):
    path = tmp_path / "plot.png"
    assert arguments.output(str(path)) == str(path)
    assert not path.exists()
    path.write_bytes(b"old")
    arguments.output(str(path))
    assert path.read_bytes() == b"old"


def test_a_link_to_what_is_not_there_yet_stays(tmp_path):
    target, link = tmp_path / "target.png", tmp_path / "plot.png"
    link.symlink_to(target)
    assert arguments.output(str(link)) == str(link)
    assert link.is_symlink()
    assert not target.exists()
