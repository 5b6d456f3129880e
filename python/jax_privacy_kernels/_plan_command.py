"""Compares the mechanisms that fit a run, at one privacy target.

Every row is a mechanism with its noise, its error, its state and its time per step, and every
epsilon is one that an accountant computes; see `jax_privacy_kernels.planning.plan`.
"""

from __future__ import annotations

import argparse
import json

from jax_privacy_kernels import _arguments, planning
from jax_privacy_kernels.matrix_factorization import toeplitz

__all__ = ["EXAMPLES", "add_arguments", "main"]

EXAMPLES = """
  plan --steps 2000 --epochs 20 \\
      --dataset-size 60000 --batch-size 600 --epsilon 4 --delta 1e-6
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to its parser."""
    required = parser.add_argument_group("the run")
    required.add_argument("--steps", type=_arguments.count, required=True)
    required.add_argument("--dataset-size", type=_arguments.count, required=True, help="examples")
    required.add_argument(
        "--batch-size", type=_arguments.count, required=True, help="examples in a step"
    )
    required.add_argument("--epsilon", type=float, required=True)
    required.add_argument("--delta", type=float, required=True)
    parser.add_argument("--epochs", type=_arguments.count, help="how often an example takes part")
    parser.add_argument(
        "--min-sep", type=_arguments.count, help="the fewest steps between its participations"
    )
    parser.add_argument("--momentum", type=float, default=0.0, help="of SGD")
    parser.add_argument(
        "--decay", type=float, default=1.0, help="1 - learning rate * weight decay, e.g. 0.9999"
    )
    parser.add_argument("--parameters", type=float, help="the size of the model, e.g. 1e8")
    parser.add_argument("--memory-budget", type=float, help="the most bytes of state, e.g. 4e9")
    parser.add_argument("--sampling", choices=("any", "fixed", "poisson", "bins"), default="any")
    parser.add_argument(
        "--accountant",
        choices=("pld", "monte_carlo"),
        default="pld",
        help="monte_carlo, which takes minutes, for balls in bins too",
    )
    parser.add_argument("--seed", type=int, help="of Monte Carlo, chosen beforehand")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument(
        "--plot",
        type=_arguments.picture,
        metavar="FILE",
        help="draw error against memory, e.g. plan.png",
    )
    parser.set_defaults(fail=parser.error)


def main(args: argparse.Namespace) -> None:
    """Prints the table, and draws it if asked to; ends the program if an argument is wrong."""
    try:
        workload = None
        if args.momentum or args.decay != 1:
            workload = toeplitz.momentum_sgd_coefs(
                args.steps, momentum=args.momentum, decay=args.decay
            )
        table = planning.plan(
            steps=args.steps,
            dataset_size=args.dataset_size,
            batch_size=args.batch_size,
            epochs=args.epochs,
            min_sep=args.min_sep,
            epsilon=args.epsilon,
            delta=args.delta,
            workload=workload,
            parameters=args.parameters,
            memory_budget=args.memory_budget,
            sampling=args.sampling,
            accountant=args.accountant,
            seed=args.seed,
        )
        if args.plot:
            table.plot(args.plot)
    except (ImportError, OSError, TypeError, ValueError) as error:
        args.fail(str(error))
    if args.json:
        print(json.dumps(table.to_dict(), indent=2))
    else:
        print(table.to_markdown() if args.markdown else table)
