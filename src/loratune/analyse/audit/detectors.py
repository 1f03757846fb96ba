"""One function for each kind of finding, over the rows of one file.

Methods are compared within one model. Each returns its findings (none: the check was made and found
nothing), or `NotChecked` where the file does not say what is needed. None of them accuses: a
finding is a fact about the file with the numbers it stands on, and what would settle it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from statistics import fmean, variance

from loratune.analyse.audit.choosing import (
    Chooser,
    TriedConfiguration,
    best_of,
    chooser_of,
    configurations_of,
)
from loratune.analyse.audit.effects import (
    CORRELATION,
    DISCORDANCE,
    detectable_paired,
    detectable_unpaired,
)
from loratune.analyse.audit.findings import Answer, Finding, Kind, NotChecked, Number, finding
from loratune.analyse.audit.rows import AuditRow, methods_of
from loratune.analyse.intervals import welch_t
from loratune.analyse.selection_bias import expected_maximum, selection_bias
from loratune.planning.power import detectable_effect

# An LR counts as tuned where the best of at least this many lies inside of them.
_FEWEST_RATES = 3
# An accuracy is one of n + 1 numbers: that two seeds share it happens; that all of these do, not.
_FEWEST_EQUAL_ACCURACIES = 3


def unequal_budgets(rows: Sequence[AuditRow]) -> Answer:
    """Methods that were given unlike numbers of configurations to choose from."""
    kind: Kind = "unequal_budgets"
    tried = [row for row in rows if row.tried]
    if len(methods_of(tried)) < 2:
        return NotChecked(kind, "it takes two methods that were tried")
    found = list[Finding]()
    for model, of_model in _by_model(tried):
        counts = {
            method: len({row.configuration for row in of_method})
            for method, of_method in _by_method(of_model)
        }
        most, least = max(counts.values()), min(counts.values())
        if most == least:
            continue
        numbers: dict[str, Number] = {
            f"configurations of {method}": count for method, count in counts.items()
        }
        why = (
            f"The best of {most} equally good configurations stands higher than the best of "
            f"{least}, by luck alone"
        )
        questions = _questions(of_model)
        if questions is not None:
            accuracy, total = questions
            gain = _luck(most, accuracy, total) - _luck(least, accuracy, total)
            numbers |= {
                "num_questions": total,
                "gain_by_luck": gain,
                "formula": "(E[max K] - E[max k]) sqrt(p (1 - p) (1 - 0.5) / n)",
            }
            why += f": {100 * gain:.2f} points, if they were chosen on {total:,} test questions"
        smallest = ", ".join(method for method, count in counts.items() if count == least)
        found.append(
            finding(
                kind,
                f"{_at(model)}methods chose from {least} to {most} configurations",
                [row for row in of_model if counts[row.method] == least],
                numbers,
                why=f"{why}.",
                run=f"The same number of configurations for every method; fewest has {smallest}.",
            )
        )
    return tuple(found)


def learning_rate_edge(rows: Sequence[AuditRow]) -> Answer:
    """Cells whose best LR is the lowest or the highest of those tried, by method."""
    kind: Kind = "learning_rate_edge"
    if rows and all(row.is_searched for row in rows):
        return NotChecked(kind, "a search chose the learning rates of all batch sizes together")
    rows = [row for row in rows if not row.is_searched]
    chooser = chooser_of(rows)
    if chooser is None:
        return NotChecked(kind, "no score that every run has")
    cells = [
        cell for cell in _cells(rows, chooser) if all(one.learning_rate is not None for one in cell)
    ]
    several = [cell for cell in cells if len({one.learning_rate for one in cell}) > 1]
    if not several:
        return NotChecked(kind, "no cell was tried at two learning rates")
    found = list[Finding]()
    for method in dict.fromkeys(cell[0].rows[0].method for cell in several):
        own = [cell for cell in several if cell[0].rows[0].method == method]
        edges = [(cell, best) for cell in own if (best := _edge(cell, chooser)) is not None]
        if not edges:
            continue
        numbers: dict[str, Number] = {
            "num_cells": len(own),
            "num_at_edge": len(edges),
            "chosen_by": chooser.name,
        }
        for cell, best in edges[:20]:
            rates = sorted({one.learning_rate or 0.0 for one in cell})
            end = "lowest" if best.learning_rate == rates[0] else "highest"
            numbers[_cell_text(best.rows[0])] = (
                f"{best.learning_rate:g} is the {end} of {', '.join(f'{one:g}' for one in rates)}"
            )
        found.append(
            finding(
                kind,
                f"{method}: the best learning rate is at the edge of those tried in {len(edges)} "
                f"of {len(own)} cells",
                [row for _, best in edges for row in best.rows],
                numbers,
                why="A better rate may lie beyond the edge, so the method may stand too low.",
                run="Further rates beyond the edge, until the best one lies inside.",
            )
        )
    return tuple(found)


def one_learning_rate(rows: Sequence[AuditRow]) -> Answer:
    """Methods that were tried at one LR only in every cell."""
    kind: Kind = "one_learning_rate"
    known = [row for row in rows if row.tried and row.learning_rate is not None]
    if not known:
        return NotChecked(kind, "no learning rate stands in the file")
    # Not within cells: a file may name every configuration's rate in a cell of its own.
    single = [
        (method, of_method)
        for method, of_method in _by_method(known)
        if len({row.learning_rate for row in of_method}) == 1
    ]
    if not single:
        return ()
    rates = [of_method[0].learning_rate or 0.0 for _, of_method in single]
    return (
        finding(
            kind,
            f"{len(single)} of {len(methods_of(known))} methods were tried at one learning rate",
            [row for _, of_method in single for row in of_method],
            {
                "num_methods": len(single),
                "num_methods_in_all": len(methods_of(known)),
                "lowest_rate": min(rates),
                "highest_rate": max(rates),
            },
            why="The best rate differs between methods and batch sizes, often by a factor of ten; "
            "at one rate a difference between methods may be one between their rates.",
            run="Three rates or more for each, with the best one inside.",
        ),
    )


def one_batch_size(rows: Sequence[AuditRow]) -> Answer:
    """Methods that were tried at a single batch size."""
    kind: Kind = "one_batch_size"
    known = [row for row in rows if row.tried and row.batch_size is not None]
    if not known:
        return NotChecked(kind, "no batch size stands in the file")
    single = [
        (method, of_method)
        for method, of_method in _by_method(known)
        if len({row.batch_size for row in of_method}) == 1
    ]
    if not single:
        return ()
    sizes = sorted({of_method[0].batch_size or 0 for _, of_method in single})
    spoken = f"batch size {sizes[0]}" if len(sizes) == 1 else "a batch size of their own"
    return (
        finding(
            kind,
            f"{len(single)} of {len(methods_of(known))} methods were tried at one batch size only "
            f"({spoken})",
            [row for _, of_method in single for row in of_method],
            {
                "num_methods": len(single),
                "num_methods_in_all": len(methods_of(known)),
                "batch_sizes": ", ".join(map(str, sizes)),
            },
            why="The batch size alone can move accuracy by more than methods differ, and methods "
            "can change places along it; one batch size shows one of those places.",
            run="Several batch sizes by doubling, each with its own best learning rate.",
        ),
    )


def one_seed(rows: Sequence[AuditRow]) -> Answer:
    """Methods none of whose configurations has a second seed."""
    kind: Kind = "one_seed"
    tried = [row for row in rows if row.tried]
    if not tried or any(row.seed is None for row in tried):
        return NotChecked(kind, "the seed of every run is not in the file")
    single = [
        (method, of_method)
        for method, of_method in _by_method(tried)
        # A second seed that was stopped early has no score to stand beside the first one's.
        if max(map(len, _seeds([row for row in of_method if not row.stopped]).values()), default=0)
        == 1
    ]
    if not single:
        return ()
    return (
        finding(
            kind,
            f"{len(single)} of {len(methods_of(tried))} methods have one seed",
            [row for _, of_method in single for row in of_method],
            {
                "num_methods": len(single),
                "num_methods_in_all": len(methods_of(tried)),
                "num_seeds": 1,
                "seeds": ", ".join(sorted({str(row.seed) for _, o in single for row in o})),
            },
            why="How much of a difference is luck of the initialisation and the order of the rows "
            "cannot be told from one seed.",
            run="Three seeds at least for each method's chosen configuration; five to conclude.",
        ),
    )


def seeds_change_nothing(rows: Sequence[AuditRow]) -> Answer:
    """Configurations in which runs with different seeds end in exactly the same numbers.

    Two runs are enough where the numbers hold a loss. Accuracies alone are counts of right answers,
    which agree by chance: there all seeds of a configuration must, and three runs in the file.
    """
    kind: Kind = "seeds_change_nothing"
    grouped = dict[tuple[object, ...], list[AuditRow]]()
    for row in rows:
        if row.ended and row.seed is not None:
            grouped.setdefault(row.configuration, []).append(row)
    several = [of_one for of_one in grouped.values() if _num_seeds(of_one) > 1]
    if not several:
        return NotChecked(kind, "no configuration has two seeds")
    by_loss, by_accuracy = list[list[AuditRow]](), list[list[AuditRow]]()
    for of_one in several:
        alike = dict[tuple[float, ...], list[AuditRow]]()
        for row in of_one:
            alike.setdefault(row.scores, []).append(row)
        has_loss = all(
            row.train_loss is not None or row.validation_loss is not None for row in of_one
        )
        if has_loss and (same := [r for g in alike.values() if _num_seeds(g) > 1 for r in g]):
            by_loss.append(same)
        elif not has_loss and len(alike) == 1:
            by_accuracy.append(of_one)
    num_equal_accuracies = sum(len(of_one) - 1 for of_one in by_accuracy)
    if not by_loss and num_equal_accuracies < _FEWEST_EQUAL_ACCURACIES - 1:
        return ()
    equal = [*by_loss, *by_accuracy]
    same = [row for of_one in equal for row in of_one]
    return (
        finding(
            kind,
            f"in {len(equal)} of {len(several)} configurations runs with different seeds end in "
            "exactly the same numbers",
            same,
            {
                "num_configurations": len(equal),
                "num_configurations_with_seeds": len(several),
                "num_runs": len(same),
            },
            why="Unless the numbers were rounded far, runs that differ in the seed and end in "
            "equal ones are one run: the seed reaches neither the initialisation nor the order of "
            "the rows, or one run was written down twice. An interval over them is too narrow.",
            run="Check that the seed shuffles the rows and draws the initialisation; run again.",
        ),
    )


def unequal_scale(rows: Sequence[AuditRow]) -> Answer:
    """Methods with another multiplier of BA (alpha / r) at the same LR.

    Not where each of them has its best LR inside of three or more: then each has its own.
    """
    kind: Kind = "unequal_scale"
    known = [
        row for row in rows if row.tried and row.scale is not None and row.learning_rate is not None
    ]
    if len({(row.method, row.rank, row.alpha) for row in known}) < 2:
        return NotChecked(
            kind, "fewer than two methods or ranks with alpha, rank and learning rate"
        )
    chooser = chooser_of(rows)
    tuned = set[tuple[object, ...]]()
    for cell in _cells(known, chooser) if chooser is not None else ():
        rates = {one.learning_rate for one in cell}
        if chooser is not None and len(rates) >= _FEWEST_RATES and _edge(cell, chooser) is None:
            tuned.add(cell[0].rows[0].cell)
    found = list[Finding]()
    for model, of_model in _by_model(known):
        at_rates = dict[float, list[AuditRow]]()
        for row in of_model:
            at_rates.setdefault(row.learning_rate or 0.0, []).append(row)
        mixed = {
            rate: at_rate
            for rate, at_rate in sorted(at_rates.items())
            if len({_rounded(row.scale) for row in at_rate}) > 1
            and any(row.cell not in tuned for row in at_rate)
        }
        unlike = [row for at_rate in mixed.values() for row in at_rate]
        if not unlike:
            continue
        scales = sorted({_rounded(row.scale) for row in unlike})
        numbers: dict[str, Number] = {
            f"{row.method}, rank {row.rank}, alpha {row.alpha:g}": _rounded(row.scale)
            for row in unlike
            if row.alpha is not None
        }
        numbers |= {
            "learning_rates": ", ".join(f"{one:g}" for one in mixed),
            "largest_over_smallest": scales[-1] / scales[0],
        }
        found.append(
            finding(
                kind,
                f"{_at(model)}at the same learning rate the update is multiplied by "
                f"{scales[0]:g} to {scales[-1]:g} (alpha / r)",
                unlike,
                numbers,
                why="With Adam a larger alpha / r acts as a larger learning rate and a larger "
                "start: a difference between methods may be one between their scales.",
                run="Equal alpha / r, or each method's learning rate tuned to inside its grid.",
            )
        )
    return tuple(found)


def selected_on_test(rows: Sequence[AuditRow]) -> Answer:
    """Choices made on the test set: stated, or the only ones that the file's scores show."""
    kind: Kind = "selected_on_test"
    tried = [row for row in rows if row.tried]
    tested = [row for row in tried if row.tests]
    stated = [row for row in tried if row.select_on == "test"]
    if not tested and not stated:
        return NotChecked(kind, "no test score stands in the file")
    suspect = stated
    what = f"{len(stated)} runs were selected by their score on the test set"
    if not stated:
        held_out = any(
            row.validation_loss is not None or row.validation_accuracy is not None for row in tried
        )
        unsaid = all(row.select_on is None for row in tried)
        suspect = [
            row
            for _, of_model in _by_model(tested)
            for _, of_method in _by_method(of_model)
            if len({one.configuration for one in of_method}) > 1
            for row in of_method
        ]
        if held_out or not unsaid or not suspect:
            return ()
        what = (
            "several configurations of a method have a test score and none a held-out one: nothing "
            "in the file shows another choice among them than one made on the test set"
        )
    counts = {
        method: len({row.configuration for row in of_method})
        for method, of_method in _by_method(suspect)
    }
    numbers: dict[str, Number] = {f"configurations of {m}": count for m, count in counts.items()}
    questions = _questions(suspect)
    why = "The best of several scores on the test set is too good, more so the more were tried"
    if questions is not None:
        accuracy, total = questions
        bias = _luck(max(counts.values()), accuracy, total)
        numbers |= {
            "num_questions": total,
            "expected_maximum": expected_maximum(max(counts.values())),
            "bias": bias,
            "formula": "E[max K] sqrt(p (1 - p) (1 - 0.5) / n)",
        }
        why += (
            f": up to {100 * bias:.2f} points with {max(counts.values())} equally good ones on "
            f"{total:,} questions"
        )
    return (
        finding(
            kind,
            what,
            suspect,
            numbers,
            why=f"{why}.",
            run="Choose on rows held out of the training data, and score the chosen one on the "
            "test set once.",
        ),
    )


def below_detectable(rows: Sequence[AuditRow]) -> Answer:
    """Methods, each at its own best, that differ by less than n questions or k seeds can show."""
    kind: Kind = "below_detectable"
    chooser = chooser_of(rows)
    if chooser is None:
        return NotChecked(kind, "no score that every run has")
    found = list[Finding]()
    reason = "it takes two methods with a score in one model"
    for model, of_model in _by_model([row for row in rows if row.tried]):
        bests = dict[str, TriedConfiguration]()
        for method, of_method in _by_method(of_model):
            best = best_of(configurations_of(of_method, chooser), chooser)
            if best is not None:
                bests[method] = best
        if len(bests) < 2:
            continue
        tasks = dict.fromkeys(
            score.task for one in bests.values() for row in one.rows for score in row.tests
        )
        answers = [_on_task(model, task, bests, chooser) for task in tasks]
        answers = answers or [_by_loss(model, bests, chooser)]
        for answer in answers:
            if isinstance(answer, str):
                reason = answer
            else:
                reason = ""
                found += answer
    return NotChecked(kind, reason) if reason and not found else tuple(found)


def batch_size_mismatch(rows: Sequence[AuditRow]) -> Answer:
    """Runs whose samples are not batch size x updates, or whose batch is not made of its parts."""
    kind: Kind = "batch_size_mismatch"
    checked = list[tuple[AuditRow, float | None]]()
    for row in rows:
        if row.batch_size is None or not row.ended:
            continue
        made = _made_batch(row)
        seen = _samples(row)
        if made is not None:
            checked.append((row, made if made != row.batch_size else None))
        if seen is not None and row.num_updates:
            # A last short batch in each epoch, kept or dropped, is no mismatch.
            allowed = row.batch_size * max(1.0, math.ceil(row.epochs or 1.0))
            off = abs(row.num_updates * row.batch_size - seen) >= allowed
            checked.append((row, seen / row.num_updates if off else None))
    if not checked:
        return NotChecked(
            kind, "no run states its batch size with updates and samples, or its parts"
        )
    wrong = [(row, real) for row, real in checked if real is not None]
    found = list[Finding]()
    for method in dict.fromkeys(row.method for row, _ in wrong):
        own = [(row, real) for row, real in wrong if row.method == method]
        row, real = own[0]
        numbers: dict[str, Number] = {
            "num_runs": len({one.where for one, _ in own}),
            "stated_batch_size": row.batch_size,
            "effective_batch_size": real,
            "num_updates": row.num_updates,
            "num_samples": _samples(row),
        }
        found.append(
            finding(
                kind,
                f"{method}: stated batch size {row.batch_size}, but {real:.4g} sequences an update "
                f"({row.where})",
                list({one.where: one for one, _ in own}.values()),
                numbers,
                why="A batch size that is not what its label says (gradient accumulation rounded, "
                "data that ended early, devices not counted) compares methods at unlike batches.",
                run="Look up accumulation steps, devices and the number of rows; run again.",
            )
        )
    return tuple(found)


DETECTORS: tuple[Callable[[Sequence[AuditRow]], Answer], ...] = (
    unequal_budgets,
    learning_rate_edge,
    one_learning_rate,
    one_batch_size,
    one_seed,
    seeds_change_nothing,
    unequal_scale,
    selected_on_test,
    below_detectable,
    batch_size_mismatch,
)


# What several detectors need ----------------------------------------------------------------------


def _luck(num: int, accuracy: float, num_questions: int) -> float:
    """What the best of `num` equal configurations gains by luck; no noise from seeds is assumed."""
    return selection_bias(
        num, accuracy=accuracy, num_questions=num_questions, correlation=CORRELATION
    )


def _by_model(rows: Iterable[AuditRow]) -> list[tuple[str | None, list[AuditRow]]]:
    grouped = dict[str | None, list[AuditRow]]()
    for row in rows:
        grouped.setdefault(row.model, []).append(row)
    return list(grouped.items())


def _by_method(rows: Iterable[AuditRow]) -> list[tuple[str, list[AuditRow]]]:
    grouped = dict[str, list[AuditRow]]()
    for row in rows:
        grouped.setdefault(row.method, []).append(row)
    return list(grouped.items())


def _cells(rows: Sequence[AuditRow], chooser: Chooser) -> list[tuple[TriedConfiguration, ...]]:
    """The configurations that were tried, grouped into cells: they differ in the LR alone."""
    grouped = dict[tuple[object, ...], list[TriedConfiguration]]()
    for one in configurations_of(rows, chooser):
        grouped.setdefault(one.rows[0].cell, []).append(one)
    return [tuple(cell) for cell in grouped.values()]


def _edge(cell: Sequence[TriedConfiguration], chooser: Chooser) -> TriedConfiguration | None:
    """The cell's best configuration if its LR is the lowest or highest tried, else None."""
    best = best_of(cell, chooser)
    rates = [one.learning_rate for one in cell if one.learning_rate is not None]
    if best is None or best.learning_rate is None:
        return None
    return best if best.learning_rate in (min(rates), max(rates)) else None


def _num_seeds(rows: Sequence[AuditRow]) -> int:
    return len({row.seed for row in rows})


def _seeds(rows: Sequence[AuditRow]) -> dict[tuple[object, ...], set[int | None]]:
    found = dict[tuple[object, ...], set[int | None]]()
    for row in rows:
        found.setdefault(row.configuration, set()).add(row.seed)
    return found


def _questions(rows: Sequence[AuditRow]) -> tuple[float, int] | None:
    """The mean accuracy and the fewest questions of the rows' first tests; None if unknown."""
    first = [row.tests[0] for row in rows if row.tests]
    totals = [one.total for one in first if one.total is not None]
    if not first or len(totals) < len(first):
        return None
    return fmean(one.accuracy for one in first), min(totals)


def _at(model: str | None) -> str:
    return "" if model is None else f"{model}: "


def _cell_text(row: AuditRow) -> str:
    rank = "" if row.rank is None else f", rank {row.rank}"
    size = "" if row.batch_size is None else f", batch size {row.batch_size}"
    return f"{row.method}{rank}{size} ({row.where})"


def _rounded(scale: float | None) -> float:
    return float(f"{scale or 0.0:.9g}")


def _made_batch(row: AuditRow) -> int | None:
    """Rows per microbatch x accumulation steps x devices; None where the first two are unknown."""
    if row.rows_per_microbatch is None or row.gradient_accumulation_steps is None:
        return None
    return row.rows_per_microbatch * row.gradient_accumulation_steps * (row.num_devices or 1)


def _samples(row: AuditRow) -> float | None:
    """Samples the run saw: as stated, else epochs x training rows."""
    if row.num_samples is not None:
        return float(row.num_samples)
    if row.epochs is None or row.num_train_rows is None:
        return None
    return row.epochs * row.num_train_rows


def _on_task(
    model: str | None, task: str, bests: dict[str, TriedConfiguration], chooser: Chooser
) -> list[Finding] | str:
    """Pairs of methods whose accuracies on one task are closer than its questions can tell."""
    scores = dict[str, list[float]]()
    totals = list[int]()
    for method, best in bests.items():
        own = [score for row in best.rows for score in row.tests if score.task == task]
        if len(own) == len(best.rows):
            scores[method] = [one.accuracy for one in own]
            totals += [one.total for one in own if one.total is not None]
    if len(scores) < 2:
        return "it takes two methods with a score in one model"
    if not totals:
        return f"how many questions {task} has is not in the file (map <task>_total)"
    total = min(totals)
    pairs = list[tuple[str, str, float, float]]()
    for one, two in combinations(scores, 2):
        seeds = [
            (variance(own) / len(own), len(own) - 1.0)
            for own in (scores[one], scores[two])
            if len(own) > 1
        ]
        gap = abs(fmean(scores[one]) - fmean(scores[two]))
        pairs.append((one, two, gap, detectable_paired(total, seeds=seeds)))
    leader = max(scores, key=lambda method: fmean(scores[method]))
    top = fmean(scores[leader])
    return _close(
        model,
        f"{task} accuracy",
        bests,
        pairs,
        leader,
        {
            "chosen_by": chooser.name,
            "num_questions": total,
            "detectable_paired": detectable_paired(total),
            "detectable_unpaired": detectable_unpaired(top, total),
            "discordance_assumed": DISCORDANCE,
            "fewest_seeds": min(map(len, scores.values())),
            "formula": "found by a t test with 80% power at standard error sqrt(d / n + v), v the "
            "variance over seeds, if any",
        },
        points=True,
    )


def _by_loss(
    model: str | None, bests: dict[str, TriedConfiguration], chooser: Chooser
) -> list[Finding] | str:
    """The same from the held-out losses of two seeds or more."""
    losses = {
        method: [row.validation_loss for row in best.rows if row.validation_loss is not None]
        for method, best in bests.items()
    }
    usable = {method: found for method, found in losses.items() if len(found) > 1}
    if len(usable) < 2:
        return "neither test accuracies nor held-out losses of two seeds for two methods"
    pairs = list[tuple[str, str, float, float]]()
    for one, two in combinations(usable, 2):
        estimate = welch_t(usable[one], usable[two])
        limit = detectable_effect(estimate.standard_error, df=estimate.df)
        pairs.append((one, two, abs(estimate.value), limit))
    leader = min(usable, key=lambda method: fmean(usable[method]))
    return _close(
        model,
        "validation loss",
        bests,
        pairs,
        leader,
        {
            "chosen_by": chooser.name,
            "fewest_seeds": min(map(len, usable.values())),
            "formula": "found by Welch's t test over seeds with 80% power",
        },
        points=False,
    )


def _close(
    model: str | None,
    metric: str,
    bests: dict[str, TriedConfiguration],
    pairs: Sequence[tuple[str, str, float, float]],
    leader: str,
    numbers: dict[str, Number],
    *,
    points: bool,
) -> list[Finding]:
    """One finding for a model and a metric, if any pair is closer than its limit."""
    close = [pair for pair in pairs if pair[2] < pair[3]]
    if not close:
        return []
    with_leader = sorted((pair for pair in close if leader in pair[:2]), key=lambda pair: pair[2])
    rivals = [one if two == leader else two for one, two, _, _ in with_leader]
    numbers = {
        "num_pairs": len(pairs),
        "num_pairs_below": len(close),
        "leader": leader,
        "num_not_told_from_leader": len(rivals),
        **numbers,
    }
    if with_leader:
        _, _, gap, limit = with_leader[0]
        numbers |= {"closest": rivals[0], "difference": gap, "detectable": limit}
    scale, unit = (100.0, " points") if points else (1.0, "")
    example = with_leader[0] if with_leader else min(close, key=lambda pair: pair[2])
    methods = list(dict.fromkeys([leader, *rivals, *(m for pair in close for m in pair[:2])]))
    return [
        finding(
            "below_detectable",
            f"{_at(model)}{metric}: {len(close)} of {len(pairs)} differences between methods are "
            f"below what can be detected; {example[0]} and {example[1]} differ by "
            f"{scale * example[2]:.3g}{unit}, detectable are {scale * example[3]:.3g}{unit}",
            [row for method in methods for row in bests[method].rows],
            numbers,
            why="A true difference of this size would be missed more than one time in five, so "
            "that an observed one ranks nothing by itself.",
            run="More seeds and more test questions, answers compared question by question; or "
            "call the methods undecided.",
        )
    ]
