"""The long simulations and searches behind docs/decisions.md and other pages, as tables.

    python benchmarks/decisions.py null-test
    python benchmarks/decisions.py coverage
    python benchmarks/decisions.py answers
    python benchmarks/decisions.py power
    python benchmarks/decisions.py range
    python benchmarks/decisions.py laws
    python benchmarks/decisions.py optima
    python benchmarks/decisions.py lemma
    python benchmarks/decisions.py rules [--pairs 50] [--ratios 4 16 28 56]

Each part is a function here that prints, and a file of its own that computes. The same seed gives
the same table.
"""

import argparse
from collections.abc import Sequence
from itertools import product

from law_intervals import (
    LOSS_FORMS,
    RATE_FORMS,
    TWOFOLD,
    dependence,
    interval_coverage,
    lemma_coverage,
    rate_coverage,
    stated_optima,
)
from loratune.planning.power import DifferenceNoise
from null_test import (
    ANSWER_CASES,
    COVERAGE_CASES,
    NUM_FEW,
    NUM_MANY,
    NUM_TEST,
    Procedure,
    answer_coverage,
    coverage,
    null_test,
    realised_power,
)
from ranges import CASES, told
from rules import HEADER, RULES, TOLERATED, Case, families, rows_of, simulated_cases, table_line

NUM_SIMULATIONS = 4000
# Where one takes longer.
NUM_SIMULATIONS_OF = {"laws": 1000, "optima": 200, "lemma": 2000}
# Pairs of models of each family; seeds below FIRST_PAIR may have been seen in tuning the rule.
NUM_PAIRS, FIRST_PAIR = 50, 5000
# A trial of the target costs so many times one of the proxy.
COST_RATIOS = (4.0, 16.0, 28.0, 56.0)
FAR_RATIO = 28.0
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
    print(
        "| chosen on | scored with | ahead, % | equal, % | bias, points "
        "| found different, % | called, % |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
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
            f"| {chosen} | {scored} | {100 * found.ahead:.1f} | {100 * found.level:.1f} | "
            f"{100 * found.bias:+.3f} +- "
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


def answers_part(num_simulations: int) -> None:
    """How often that interval covers, for right and wrong answers, and for seeds of each method."""
    print(f"coverage in %, {num_simulations:,} simulations each")
    sizes = (3, 5, 20)
    print(f"| answers | questions | seeds | {' | '.join(f'{size} seeds' for size in sizes)} |")
    print("| --- | --- | --- |" + " --- |" * len(sizes))
    for number, (case, num_questions, paired) in enumerate(
        product(ANSWER_CASES, (100, 500), (True, False))
    ):
        covered = [
            answer_coverage(
                case,
                paired=paired,
                num_seeds=size,
                num_questions=num_questions,
                num_simulations=num_simulations,
                seed=number,
            )
            for size in sizes
        ]
        seeds = "shared" if paired else "not shared"
        print(
            f"| {case} | {num_questions} | {seeds} | {' | '.join(map(_percent, covered))} |",
            flush=True,
        )


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


def range_part(num_simulations: int) -> None:
    """How often the range of batch sizes or the acceptable ones are wrong."""
    columns = list(product((4, 9, 16), (2, 3, 6)))
    print(f"wrong answers in %, {num_simulations:,} simulations each; batch sizes, seeds")
    print(f"| noise of a seed | {' | '.join(f'{sizes}, {seeds}' for sizes, seeds in columns)} |")
    print("| --- |" + " --- |" * len(columns))
    for name, case in CASES.items():
        wrong = [
            told(
                case,
                num_sizes=num_sizes,
                num_seeds=num_seeds,
                num_simulations=num_simulations,
                seed=0,
            ).wrong
            for num_sizes, num_seeds in columns
        ]
        print(f"| {name} | {' | '.join(map(_percent, wrong))} |", flush=True)
    name, case = next(iter(CASES.items()))
    print(f"\nwhat is told, in %, noise {name}, {num_simulations:,} simulations each")
    print("| batch sizes | seeds | of all in the range | of those within the margin acceptable |")
    print("| --- | --- | --- | --- |")
    for num_sizes, num_seeds in product((4, 9), (2, 3, 4, 5, 6)):
        found = told(
            case,
            num_sizes=num_sizes,
            num_seeds=num_seeds,
            num_simulations=num_simulations,
            seed=1,
        )
        print(
            f"| {num_sizes} | {num_seeds} | {_percent(found.in_range)} "
            f"| {_percent(found.acceptable)} |",
            flush=True,
        )


def laws_part(num_simulations: int) -> None:
    """How often the intervals of `laws` cover, and how often a dependence is called none."""
    print(f"coverage of 95% intervals in %, {num_simulations:,} simulations each")
    print("| what | case | held |")
    print("| --- | --- | --- |")
    for form in RATE_FORMS:
        held = rate_coverage(form, num_simulations=num_simulations, seed=0)
        print(f"| shape of the best learning rate | {form} | {_percent(held)} |", flush=True)
    for noise in (0.0003, 0.003, 0.03):
        held = interval_coverage(noise, num_simulations=num_simulations, seed=0)
        print(f"| M* | noise {100 * noise:g}% | {_percent(held)} |", flush=True)
    print("\n| exponent of the best batch size | noise, doublings | held | does not depend |")
    print("| --- | --- | --- | --- |")
    for number, (noise, exponent) in enumerate(product((0.1, 0.2, 0.3, 0.5), (0, TWOFOLD, 0.5))):
        found = dependence(exponent, noise, num_simulations=num_simulations, seed=number)
        print(
            f"| {exponent:.2f} | {noise:g} | {_percent(found.held)} "
            f"| {_percent(found.called_equal)} |",
            flush=True,
        )


def optima_part(num_simulations: int) -> None:
    """Of how many sweeps `laws` states a best batch size, and of how many wrongly."""
    print(f"of {num_simulations:,} sweeps each")
    print("| form | noise, % | seeds | three terms chosen | M* stated | held by its interval |")
    print("| --- | --- | --- | --- | --- | --- |")
    noises = {
        "the three terms": ((0.0003, 3), (0.001, 3), (0.003, 3), (0.01, 3), (0.001, 2)),
        "another": ((0.001, 3), (0.002, 3), (0.003, 3), (0.002, 2), (0.002, 5)),
    }
    for name, form in LOSS_FORMS.items():
        for noise, num_seeds in noises[name]:
            found = stated_optima(
                form, noise, num_seeds=num_seeds, num_simulations=num_simulations, seed=0
            )
            print(
                f"| {name} | {100 * noise:g} | {num_seeds} | {found.chosen} | {found.stated} "
                f"| {found.held} |",
                flush=True,
            )


def lemma_part(num_simulations: int) -> None:
    """How often the interval of `lemma`'s mean covers r N / (r - 2), at ranks 5 to 8."""
    print(f"coverage of 95% intervals in %, {num_simulations:,} simulations each")
    print("| rank | held |")
    print("| --- | --- |")
    for rank in (5, 6, 8):
        held = lemma_coverage(rank, num_simulations=num_simulations, seed=0)
        print(f"| {rank} | {_percent(held)} |", flush=True)


def rules_part(num_pairs: int, cost_ratios: Sequence[float]) -> None:
    """Rules for choosing batch size and LR: regret against cost on simulated pairs of models."""
    for held_out in (False, True):
        kind = "held out" if held_out else "not held out"
        names = families(held_out=held_out)
        for ratio in cost_ratios:
            print(f"\nfamilies {kind}, {num_pairs} pairs each, cost ratio {ratio:g}\n")
            _print_rules([_pairs(name, num_pairs, ratio) for name in names])
    names = families(held_out=False)
    print(f"\nshifts three times as large, {num_pairs} pairs each, cost ratio {FAR_RATIO:g}\n")
    _print_rules([_pairs(name, num_pairs, FAR_RATIO, far=True) for name in names])


def _pairs(name: str, num_pairs: int, ratio: float, *, far: bool = False) -> list[Case]:
    return simulated_cases(
        name, num_pairs=num_pairs, cost_ratio=ratio, first_seed=FIRST_PAIR, far=far
    )


def _print_rules(by_family: Sequence[Sequence[Case]]) -> None:
    print(HEADER)
    for row in rows_of([case for cases in by_family for case in cases]):
        print(table_line(row))
    shipped = tuple(RULES)[-1]
    shares = [f"{cases[0].family} {_percent(_share_good(cases, shipped))}" for cases in by_family]
    print(f"\n{shipped}, regret <= 0.5% by family, %: {', '.join(shares)}", flush=True)


def _share_good(cases: Sequence[Case], rule: str) -> float:
    regrets = [one.regret for one in cases if one.rule == rule]
    return sum(one is not None and one <= TOLERATED for one in regrets) / len(regrets)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"


PARTS = {
    "null-test": null_test_part,
    "coverage": coverage_part,
    "answers": answers_part,
    "power": power_part,
    "range": range_part,
    "laws": laws_part,
    "optima": optima_part,
    "lemma": lemma_part,
}


def _first_line(docstring: str | None) -> str:
    """Of a docstring, as argparse takes it: it formats every help with %."""
    return (docstring or "").partition("\n")[0].replace("%", "%%")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="part", required=True)
    for name, part in PARTS.items():
        command = commands.add_parser(name, help=_first_line(part.__doc__))
        number = NUM_SIMULATIONS_OF.get(name, NUM_SIMULATIONS)
        command.add_argument("--simulations", type=int, default=number)
    command = commands.add_parser("rules", help=_first_line(rules_part.__doc__))
    command.add_argument("--pairs", type=int, default=NUM_PAIRS)
    command.add_argument("--ratios", type=float, nargs="+", default=COST_RATIOS)
    given = parser.parse_args(arguments)
    if given.part == "rules":
        rules_part(given.pairs, given.ratios)
    else:
        PARTS[given.part](given.simulations)


if __name__ == "__main__":
    main()
