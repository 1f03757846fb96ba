"""One self-contained report.html and the figures beside it, from what the store holds.

The page asks for nothing over a network and has no clock: the same store gives the same bytes.
It computes nothing of its own; numbers come from `analyse` and `recommend`.
"""

# pandas comes without complete types: what it returns is unknown to pyright.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from loratune.analyse.cells import Cell, cells_table
from loratune.analyse.compare import compare, question_sources
from loratune.analyse.curves import SelectionGap, make_curves, selection_gaps
from loratune.analyse.scores import test_tasks
from loratune.analyse.tables import results_table
from loratune.errors import AnalysisError
from loratune.recommendation.adaptive import DEFAULT_MARGIN
from loratune.recommendation.grid import recommend_from_curve
from loratune.recommendation.searched import answered
from loratune.records import DataSummary, Provenance, StudyRecord, TrialResult, Verdicts
from loratune.report.figures import FigureData, figure_table, render, study_figures
from loratune.report.text import comparison_sentences, recommendation_sentences

_MOST_TRIALS = 2000
# Columns that identify or provenance needs but no reader of the page.
_HIDDEN = ("trial_id", "study", "targets", "data_fingerprint", "select_on", "higher_is_better")

# Columns that are named once above a table where they are the same in all of it.
_SHARED = (
    "model", "rank", "alpha", "protocol", "epochs", "num train rows", "schedule", "warmup steps",
    "beta2", "precision", "num updates", "engine", "score metric", "num seeds", "status",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """Where the report stands."""

    page: Path
    figures: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class _DrawnFigure:
    name: str
    svg: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_report(
    folder: Path,
    *,
    study: StudyRecord,
    results: Sequence[TrialResult],
    verdicts: Sequence[Verdicts] = (),
    summaries: Mapping[str, DataSummary] = MappingProxyType({}),
    provenances: Sequence[Provenance] = (),
    margin: float = DEFAULT_MARGIN,
) -> ReportPaths:
    """Write `report.html` and `figures/*.{png,svg,pdf}` under `folder`, replacing older ones.

    Figures of an earlier report that this one does not have are left where they are. `verdicts` and
    `summaries` (by data fingerprint) are what `analyse.compare` needs of the answers.

    Raises:
        AnalysisError: the folder or a file in it cannot be written.
    """
    written = list[Path]()
    drawn = list[_DrawnFigure]()
    page_file = folder / "report.html"
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for data in study_figures(answered(results)):
            rendered = render(data)
            for format, content in rendered.items():
                path = folder / "figures" / f"{data.name}.{format}"
                path.write_bytes(content)
                written.append(path)
            header, rows = figure_table(data)
            svg = _inline(rendered["svg"].decode(), data)
            drawn.append(_DrawnFigure(data.name, svg, data.caption, header, rows))
        page = _page(
            study=study,
            results=results,
            verdicts=verdicts,
            summaries=summaries,
            provenances=provenances,
            figures=drawn,
            margin=margin,
        )
        page_file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise AnalysisError(
            f"cannot write the report to {folder} ({error}); choose a writable folder"
        ) from error
    return ReportPaths(page_file, tuple(written))


def _page(
    *,
    study: StudyRecord,
    results: Sequence[TrialResult],
    verdicts: Sequence[Verdicts],
    summaries: Mapping[str, DataSummary],
    provenances: Sequence[Provenance],
    figures: Sequence[_DrawnFigure],
    margin: float,
) -> str:
    """The page's text."""
    cells = answered(results)
    curves = make_curves(cells)
    recommended = [recommend_from_curve(curve, margin=margin) for curve in curves]
    try:
        compared = compare(
            results, verdicts=verdicts, sources=question_sources(summaries), cells_of=answered
        )
        comparisons = [comparison_sentences(one) for one in compared]
    except AnalysisError:  # one method, or no lora: there is nothing to compare
        comparisons = []
    tasks = test_tasks(results)
    gaps = [gap for task in tasks for gap in selection_gaps(cells, task=task)]
    gap_header, gap_rows = _gap_table(gaps)
    cell_table = _shown(cells_table(cells), drop=("seconds", "tokens", "engine"))
    trial_table = _shown(results_table(results[:_MOST_TRIALS]), drop=())
    data_header, data_rows, data_notes = _data_account(tuple(summaries.values()))
    statuses = Counter(result.status for result in results)
    counts = ", ".join(f"{num} {status}" for status, num in sorted(statuses.items())) or "none"
    environment = Environment(
        loader=PackageLoader("loratune", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        study=study,
        status_line=_status_line(study, cells, results),
        answers=[(one.setting, recommendation_sentences(one)) for one in recommended],
        comparisons=comparisons,
        figures=figures,
        tasks=tasks,
        gaps=gap_rows,
        gap_header=gap_header,
        gap_text=_gap_text(gaps),
        cell_table=cell_table,
        counts=f"Trials by status: {counts}.",
        num_trials=len(results),
        trial_table=trial_table,
        data_header=data_header,
        data_rows=data_rows,
        data_notes=data_notes,
        how=_how(results, provenances),
    )


def _status_line(study: StudyRecord, cells: Sequence[Cell], results: Sequence[TrialResult]) -> str:
    finished = sum(result.outcome is not None for result in results)
    selected = study.select_on.replace("_", " ")
    begun = datetime.fromisoformat(study.created_at)
    return (
        f"{finished} of {len(results)} trials finished, {len(cells)} cells; "
        f"learning rates selected on {selected}; begun {begun:%Y-%m-%d %H:%M} UTC."
    )


def _inline(svg: str, data: FigureData) -> str:
    """The SVG element alone, its ids made the page's own, with a title for those who cannot see."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r'\bid="([^"]+)"', rf'id="{data.name}-\1"', element)
    element = re.sub(r'((?:xlink:)?href="|url\()#', rf"\g<1>#{data.name}-", element)
    opened = element.index(">") + 1
    label = f'<svg role="img" aria-label="{data.title}"'
    return element[:opened].replace("<svg", label, 1) + element[opened:]


@dataclass(frozen=True, slots=True)
class _Shown:
    """A table for reading. `shared` says in one sentence what is the same in every row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    shared: str


def _shown(frame: pd.DataFrame, *, drop: Sequence[str]) -> _Shown:
    """The table without the columns that are empty, hidden, or the same in every row."""
    columns = {
        str(name).replace("_", " "): [_text(value) for value in frame[name].tolist()]
        for name in frame.columns
        if name not in (*_HIDDEN, *drop)
    }
    same = {
        name: values[0]
        for name, values in columns.items()
        if len(set(values)) == 1 and name in _SHARED and len(values) > 1
    }
    kept = {name: values for name, values in columns.items() if name not in same and any(values)}
    listed = ", ".join(f"{name} {value}" for name, value in same.items() if value)
    return _Shown(
        header=tuple(kept),
        rows=tuple(zip(*kept.values(), strict=True)),
        shared=f"The same everywhere: {listed}." if listed else "",
    )


def _text(value: object) -> str:
    if value is None or value is pd.NA:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if len(text) <= 120 else text.strip().splitlines()[-1][:120]


def _gap_table(
    gaps: Sequence[SelectionGap],
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    header = (
        "curve", "task", "batch size", "chosen LR", "test's own best LR", "test at chosen, %",
        "test at its best, %", "gap, points", "learning rates", "seeds", "optimism, points",
        "chance alone, points",
    )  # fmt: skip
    rows = tuple(
        (
            gap.setting.label,
            gap.task,
            str(gap.batch_size),
            f"{gap.chosen_learning_rate:g}",
            f"{gap.best_learning_rate:g}",
            f"{100 * gap.test_at_chosen:.2f}",
            f"{100 * gap.test_at_best:.2f}",
            f"{100 * gap.gap:.2f}",
            str(gap.num_rates),
            str(gap.num_seeds),
            "" if gap.optimism is None else f"{100 * gap.optimism:.2f}",
            "" if gap.optimism_bound is None else f"{100 * gap.optimism_bound:.2f}",
        )
        for gap in gaps
    )
    return header, rows


def _gap_text(gaps: Sequence[SelectionGap]) -> str:
    if not gaps:
        return ""
    mean = 100 * sum(gap.gap for gap in gaps) / len(gaps)
    optimisms = [gap.optimism for gap in gaps if gap.optimism is not None]
    bounds = [gap.optimism_bound for gap in gaps if gap.optimism_bound is not None]
    if not bounds:
        return (
            "Choosing the learning rate on the test itself would have added "
            f"{mean:.2f} points on average over {len(gaps)} cells: that much of a published "
            "score selected on its test is not skill."
        )
    by_seeds = (
        f"{100 * sum(optimisms) / len(optimisms):.2f} points of a score are lost on average when "
        "each seed is scored at the learning rate which the other seeds chose. "
        if optimisms
        else ""
    )
    return (
        f"{by_seeds}Equally good learning rates would gain up to "
        f"{100 * max(bounds):.2f} points on these questions by chance alone "
        "(assuming a correlation of 0.5 between two learning rates' answers)."
    )


def _data_account(
    summaries: Sequence[DataSummary],
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The way of the rows, one column a source, and what a reader must be warned of."""
    names = {
        "source": "source",
        "num_source_rows": "rows in the source",
        "num_dropped_too_long": "dropped, too long",
        "num_truncated": "kept, cut to max_tokens",
        "num_validation_rows": "held out for validation",
        "num_validation_groups": "groups among them",
        "num_left_over": "left over (not among N)",
        "num_train_rows": "training rows",
        "num_duplicate_rows": "training rows whose question stood before",
    }
    unique = list(dict.fromkeys(summaries))
    rows = tuple(
        (spoken, *(_counted(getattr(summary, field)) for summary in unique))
        for field, spoken in names.items()
    )
    notes = tuple(
        f"{num:,} training rows of {summary.source} have the question of a {task} test question."
        for summary in unique
        for task, num in summary.num_in_test
        if num > 0
    )
    header = ("", *(f"data set {index + 1}" for index in range(len(unique))))
    return header, rows if unique else (), notes


def _counted(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _how(
    results: Sequence[TrialResult], provenances: Sequence[Provenance]
) -> tuple[tuple[str, str], ...]:
    engines = Counter(result.engine for result in results if result.engine is not None)
    seconds = sum(result.outcome.seconds for result in results if result.outcome is not None)
    tokens = sum(result.outcome.num_tokens for result in results if result.outcome is not None)
    rows = [
        ("engine", ", ".join(f"{name} ({num} trials)" for name, num in sorted(engines.items()))),
        ("time in training", f"{seconds:,.1f} s"),
        ("tokens trained on", f"{tokens:,}"),
    ]
    rows += [("device", device) for device in sorted({one.device for one in provenances})]
    rows += [("commit", c) for c in sorted({one.commit for one in provenances if one.commit})]
    rows += [
        (f"version of {name}", version)
        for name, version in sorted({pair for one in provenances for pair in one.versions})
    ]
    return tuple(rows)
