"""The long simulations and searches behind docs/decisions.md, as tables.

    python benchmarks/decisions.py null-test
    python benchmarks/decisions.py coverage
    python benchmarks/decisions.py power

Each part is a function here that prints, and a file of its own that computes. The same seed gives
the same table.
"""

import argparse
from collections.abc import Sequence

from loratune.planning.power import DifferenceNoise
from null_test import (
    COVERAGE_CASES,
    NUM_FEW,
    NUM_MANY,
    NUM_TEST,
    Procedure,
    coverage,
    null_test,
    realised_power,
)

NUM_SIMULATIONS = 4000
POWER_CASES = (
    ("questions alone", DifferenceNoise(0.0, 0.10, 0.10, "")),
    ("as assumed by plan", DifferenceNoise(5e-5, 0.20, 0.0, "")),
    ("seeds and questions", DifferenceNoise(1e-4, 0.06, 0.08, "")),
    ("seeds above questions", DifferenceNoise(2e-3, 0.06, 0.08, "")),
)


def null_test_part(num_simulations: int) -> None:
    """One method, tuned over 40 configurations, against itself, tuned over 5."""
    print(
        f"{NUM_MANY} configurations against {NUM_FEW} of the same method, {NUM_TEST:,} questions, "
        f"{num_simulations:,} simulations each"
    )
    print("| chosen on | scored with | ahead, % | bias, points | found different, % | called, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows: tuple[tuple[Procedure, int, str, str], ...] = (
        ("test", 1, "the test", "1 seed, the same"),
        ("held-out", 5, "held-out rows", "5 seeds, the same"),
        ("fresh", 3, "held-out rows", "3 fresh seeds"),
        ("fresh", 5, "held-out rows", "5 fresh seeds"),
        ("fresh", 10, "held-out rows", "10 fresh seeds"),
    )
    for seed, (procedure, num_seeds, chosen, scored) in enumerate(rows):
        found = null_test(
            procedure, num_simulations=num_simulations, seed=seed, num_seeds=num_seeds
        )
        print(
            f"| {chosen} | {scored} | {100 * found.ahead:.1f} | {100 * found.bias:+.3f} +- "
            f"{196 * found.bias_error:.3f} | {_percent(found.rejected)} | "
            f"{_percent(found.called)} |",
            flush=True,
        )


def coverage_part(num_simulations: int) -> None:
    """How often the 95% interval of a difference covers the true one."""
    print(f"coverage of 95% intervals in %, {num_simulations:,} simulations each, 100 questions")
    sizes = (3, 5, 9, 10, 20)
    print(f"| what dominates | {' | '.join(f'{size} seeds' for size in sizes)} |")
    print("| --- |" + " --- |" * len(sizes))
    for seed, case in enumerate(COVERAGE_CASES):
        covered = [
            coverage(
                case, num_seeds=size, num_questions=100, num_simulations=num_simulations, seed=seed
            )
            for size in sizes
        ]
        print(f"| {case} | {' | '.join(map(_percent, covered))} |", flush=True)


def power_part(num_simulations: int) -> None:
    """How often a difference that is said to be found with 80% power was."""
    print(f"realised power in %, {num_simulations:,} simulations each, 500 questions")
    print("| noise | seeds | detectable, points | found, % | called from, points | called, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, noise in POWER_CASES:
        for num_seeds in (3, 5, 9):
            found = realised_power(
                noise,
                num_seeds=num_seeds,
                num_questions=500,
                num_simulations=num_simulations,
                seed=num_seeds,
            )
            print(
                f"| {name} | {num_seeds} | {100 * found.effect:.2f} | {_percent(found.found)} | "
                f"{100 * found.called_effect:.2f} | {_percent(found.called)} |",
                flush=True,
            )


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"


PARTS = {"null-test": null_test_part, "coverage": coverage_part, "power": power_part}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="part", required=True)
    for name, part in PARTS.items():
        command = commands.add_parser(name, help=(part.__doc__ or "").partition("\n")[0])
        command.add_argument("--simulations", type=int, default=NUM_SIMULATIONS)
    given = parser.parse_args(arguments)
    PARTS[given.part](given.simulations)


if __name__ == "__main__":
    main()
