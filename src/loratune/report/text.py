"""What the terminal shows: the curves as a small table, and the answer in a few sentences.

Plain ASCII strings, so that they can be piped and tested; the same sentences stand on the page.
"""

from collections.abc import Sequence

from loratune.analyse.compare import Comparison
from loratune.analyse.curves import Curve, Point
from loratune.analyse.scores import Metric
from loratune.recommendation.grid import Recommendation


def curves_text(curves: Sequence[Curve]) -> str:
    """Three rows for each curve, a column for each batch size: score, half its interval, best LR.

    There is no row of intervals with one seed. The best score of each curve is in brackets. A
    last line says what the marks mean. Accuracies are in percent.
    """
    if not curves:
        return "no trials"
    sizes = sorted({point.batch_size for curve in curves for point in curve.points})
    rows = [["batch size", *map(str, sizes)]]
    for curve in curves:
        points = {point.batch_size: point for point in curve.points}
        found = [points.get(size) for size in sizes]
        rows.append(
            [curve.label]
            + ["" if p is None else _score(p, curve.metric, best=p is curve.best) for p in found]
        )
        if any(point.high is not None for point in curve.points):
            rows.append(
                ["  +-"] + ["" if p is None else _half_width(p, curve.metric) for p in found]
            )
        rows.append(["  best LR"] + ["" if point is None else _rate(point) for point in found])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([_heading(curves), "", *lines, "", *_legend(curves)])


def recommendation_sentences(found: Recommendation) -> tuple[str, ...]:
    """The answer, or why there is none, then what belongs beside it. Plain words, no markup."""
    if found.undecided:
        reasons = "; ".join(found.undecided)
        notes = (_sentence(note) for note in found.evidence.notes)
        return (f"Undecided: {reasons}.", *_by_proxy(found), *notes)
    sentences = [
        f"Use batch size {found.batch_size} and learning rate {found.learning_rate:g} "
        f"for {found.method} (rank {found.rank}, {found.num_train_rows:,} training rows)."
    ]
    sentences += _as_good(found)
    if found.rows_per_microbatch is not None:
        steps = found.gradient_accumulation_steps
        accumulation = (
            "no gradient accumulation" if steps == 1 else f"{steps} gradient accumulation steps"
        )
        rows = "1 row" if found.rows_per_microbatch == 1 else f"{found.rows_per_microbatch} rows"
        sentences.append(f"On the device that trained it: {rows} per microbatch, {accumulation}.")
    return (*sentences, *_by_proxy(found), *(_sentence(note) for note in found.evidence.notes))


def _as_good(found: Recommendation) -> list[str]:
    """Which batch sizes may be the best, and which are as good; and of which model that is said."""
    low, high = found.batch_size_low, found.batch_size_high
    if low is None or high is None:
        return []
    margin = f"{100 * found.margin:g}%"
    if found.proxy is not None:
        sizes = f"{low} alone" if low == high else f"those tried from {low} to {high}"
        said = [
            f"Batch sizes that {found.proxy} does not exclude as the best (95% confidence) and "
            f"{found.model} does not contradict: {sizes}."
        ]
    elif low == high:
        said = [f"Of the batch sizes tried, {found.batch_size} is the best with 95% confidence."]
    else:
        said = [
            "Not excluded as the best (95% confidence): the batch sizes tried from "
            f"{low} to {high}."
        ]
    on = "" if found.proxy is None else f" on {found.proxy}"
    but = "" if found.proxy is None else f", and not contradicted by {found.model}"
    if found.acceptable_batch_sizes == (found.batch_size,):
        said.append(f"No other one is shown{on} to be within {margin} of it{but}.")
    elif found.acceptable_batch_sizes:
        listed = ", ".join(map(str, found.acceptable_batch_sizes))
        said.append(f"Within {margin} of the best{on} with 95% confidence{but}: {listed}.")
        if found.fastest_acceptable_batch_size is not None:
            said.append(
                f"The fastest of these, as measured: {found.fastest_acceptable_batch_size}."
            )
    return said


def _by_proxy(found: Recommendation) -> list[str]:
    """What was measured on the target, and what the answer was extrapolated over."""
    if not found.extrapolated_over:
        return []
    measured = ", ".join(
        f"{one.learning_rate:g} at {one.batch_size}: "
        + (one.verdict if one.score is None else f"{one.score:.4g} ({_seeds(one.num_seeds)})")
        for one in found.confirmed
    )
    said = [f"Extrapolated over {'; '.join(found.extrapolated_over)}."]
    if measured:
        said.append(f"Measured on {found.model}, by learning rate and batch size: {measured}.")
    if found.cost_fraction is not None:
        said.append(
            f"It cost {100 * found.cost_fraction:.2g}% of the FLOPs of a fixed sweep on the target"
            " (batch sizes 1 to 512, the paper's learning rates, 3 seeds)."
        )
    return said


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def recommendation_text(found: Recommendation) -> str:
    """`recommendation_sentences`, one a line."""
    return "\n".join(recommendation_sentences(found))


def comparison_sentences(one: Comparison) -> tuple[str, ...]:
    """One comparison in words: verdict and reasons, both bests, difference, what is not alike."""
    where = f" at {one.setting}" if one.setting else ""
    name = one.metric.replace("_", " ")
    loud = " SELECTED ON THE TEST SET." if one.select_on == "test" else ""
    why = f": {'; '.join(one.undecided)}" if one.undecided else ""
    verdict = f"{one.method} against {one.baseline}{where}, {name}: {one.verdict}{why}.{loud}"
    if one.difference is None:
        return (verdict,)
    p = "" if one.p_holm is None or one.undecided else f", Holm p = {one.p_holm:.2g}"
    better = "higher" if one.higher_is_better else "lower"
    sentences = [
        verdict,
        f"The best tried of each: {one.method} {one.method_score:.4g} at batch size "
        f"{one.method_batch_size} and learning rate {one.method_learning_rate:g}, {one.baseline} "
        f"{one.baseline_score:.4g} at batch size {one.baseline_batch_size} and learning rate "
        f"{one.baseline_learning_rate:g}.",
        f"Difference {one.difference:+.4g} ({better} is better), 95% interval "
        f"{one.difference_low:+.4g} to {one.difference_high:+.4g}{p}, {_sample(one)}; "
        f"{one.detectable:.2g} is found with 80% power.",
        *_chosen(one),
    ]
    sentences += [
        f"The curves cross near batch size {_batch(crossing.batch_size)} (95% interval: "
        f"{_batch(crossing.low)} to {_batch(crossing.high)}): {crossing.better_below} is better "
        f"below, {crossing.better_above} above."
        for crossing in one.crossovers
        if crossing.shown and crossing.low is not None and crossing.high is not None
    ]
    sentences += _not_shown(one)
    if one.unequal:
        sentences.append(f"NOT ALIKE: {'; '.join(one.unequal)}.")
    if one.at_edge:
        sentences.append(f"Better may not have been tried: {'; '.join(one.at_edge)}.")
    return tuple(sentences)


def _sample(one: Comparison) -> str:
    """What the interval is over, and how it was had."""
    shared = "shared seeds" if one.paired else "seeds of each"
    asked = "" if one.num_questions is None else f" and {one.num_questions:,} questions"
    return f"{one.num_seeds} {shared}{asked} ({one.procedure})"


def _chosen(one: Comparison) -> list[str]:
    """Whether what is compared had a part in the choice, and what that adds."""
    sides = (
        (one.method, one.method_flattery, one.method_selection_gap),
        (one.baseline, one.baseline_flattery, one.baseline_selection_gap),
    )
    gaps = [f"{name} {gap:+.2g}" for name, _, gap in sides if gap is not None]
    said = list[str]()
    if gaps:
        said.append(
            "Selection gap (how much better a score looked where it was chosen than where it was "
            f"not): {', '.join(gaps)}."
        )
    if one.seeds == "fresh":
        said.append("These seeds had no part in choosing batch size and learning rate.")
        return said
    flattered = [f"{name} {most:.2g}" for name, most, _ in sides if most is not None]
    most = f" (at most {', '.join(flattered)})" if flattered else ""
    said.append(
        "The same seeds chose batch size and learning rate, so that each score looks a little "
        f"better than it is{most}; train what was chosen with further seeds to be rid of that."
    )
    return said


def comparison_sentence(one: Comparison) -> str:
    """One comparison in words: `comparison_sentences`, one a line."""
    return "\n".join(comparison_sentences(one))


def _not_shown(one: Comparison) -> list[str]:
    """The changes of sign that name no better method, in one sentence; none where there is none."""
    where = [_batch(crossing.batch_size) for crossing in one.crossovers if not crossing.shown]
    if not where:
        return []
    seeds = one.crossovers[0].num_seeds
    over = "no seed they share" if seeds == 0 else "1 seed" if seeds == 1 else f"{seeds} seeds"
    return [
        f"The sign of the difference changes near batch size {', '.join(where)}, which {over} "
        f"{'does' if seeds == 1 else 'do'} not tell from noise: no crossing is shown there."
    ]


def _batch(size: float) -> str:
    return f"{size:.0f}" if size >= 10 else f"{size:.2g}"


def _heading(curves: Sequence[Curve]) -> str:
    metric = curves[0].metric
    better = "higher" if metric.higher_is_better else "lower"
    seeds = {seed for curve in curves for cell in curve.cells for seed in cell.seeds}
    varied = (
        "one seed, no interval" if len(seeds) == 1 else f"+- 95% t interval over {len(seeds)} seeds"
    )
    unit = " in percent" if metric.higher_is_better else ""
    loud = " SELECTED ON THE TEST SET." if curves[0].cells[0].select_on == "test" else ""
    return (
        f"{metric.name.replace('_', ' ').capitalize()}{unit} ({better} is better; {varied}).{loud}"
    )


def _legend(curves: Sequence[Curve]) -> list[str]:
    """The marks that the table has, in words."""
    points = [point for curve in curves for point in curve.points]
    marks = ["[ ]: the best of the row"]
    if any(point.lr_at_edge for point in points):
        marks.append("!: at the edge of the learning rates tried")
    if any(point.score is None for point in points):
        marks.append("-: no learning rate has a score with every seed")
    return ["; ".join(marks)]


def _score(point: Point, metric: Metric, *, best: bool) -> str:
    if point.score is None:
        return "-"
    scale, digits = (100.0, 1) if metric.higher_is_better else (1.0, 4)
    text = f"{scale * point.score:.{digits}f}"
    return f"[{text}]" if best else text


def _half_width(point: Point, metric: Metric) -> str:
    if point.score is None or point.high is None:
        return ""
    scale, digits = (100.0, 1) if metric.higher_is_better else (1.0, 4)
    return f"{scale * (point.high - point.score):.{digits}f}"


def _rate(point: Point) -> str:
    if point.learning_rate is None:
        return "-"
    return f"{point.learning_rate:g}{'!' if point.lr_at_edge else ''}"


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."
