"""The figures of a study: computed as plain numbers first, drawn afterwards.

Which figures there are follows from what varies in the study, not from its name: scores over batch
size (one line per method, rank, data set, model, schedule ...; the paper's Fig. 1, 3, 4, 6, 7), the
same shifted to one top where something other than the method varies (Fig. 2), test accuracies where
a test was scored, best LR over batch size (Fig. 5), and score over LR at every batch size.
Drawing is deterministic: the same numbers give the same bytes on the same matplotlib.
"""

# matplotlib is only partly typed: what its methods return is unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from loratune.analyse.cells import Cell
from loratune.analyse.curves import (
    Curve,
    make_curves,
    normalised,
    tested_tasks,
    varied_axes,
)
from loratune.analyse.scores import Metric

FigureFormat = Literal["png", "svg", "pdf"]
FORMATS: tuple[FigureFormat, ...] = ("png", "svg", "pdf")

# Okabe and Ito's colours, which stay apart under every common colour blindness; yellow left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PANEL_COLUMNS = 3
# The paper's default setting, to which its Fig. 2 shifts; without it a study's first curve is.
_PAPER_DEFAULTS = {"rank": "128", "rows": "100000"}

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "path.simplify": False,
}


@dataclass(frozen=True, slots=True)
class Dot:
    """One point of a line. `y` is None where there is no score; `x` is a batch size or an LR.

    `flag`: "edge" (the best LR is at the edge of those tried), "diverged" or "missing" (no score).
    """

    x: float
    y: float | None
    low: float | None
    high: float | None
    num_seeds: int
    flag: Literal["", "edge", "diverged", "missing"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line with its place in the legend; `order` picks the colour."""

    label: str
    order: int
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; the title is empty where there is one panel."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class FigureData:
    """A figure before it is drawn. `percent`: y is a fraction, shown in percent."""

    name: str
    title: str
    caption: str
    note: str
    x_label: str
    y_label: str
    x_kind: Literal["batch_size", "learning_rate"]
    y_log: bool
    percent: bool
    higher_is_better: bool | None
    panels: tuple[Panel, ...]


def study_figures(cells: Sequence[Cell]) -> tuple[FigureData, ...]:
    """Every figure that the cells give; none where no trial has a score."""
    curves = make_curves(cells)
    if not any(point.score is not None for curve in curves for point in curve.points):
        return ()
    figures = [_scores(curves, name="scores", title=_score_title(curves[0].metric))]
    if shifted := _shifted(curves):
        figures.append(shifted)
    for task in tested_tasks(cells):
        if curves[0].metric.task != task:
            tested = make_curves(cells, task=task)
            title = f"{task} accuracy (test) over batch size"
            figures.append(_scores(tested, name=f"test_{_file_name(task)}", title=title))
            if also := _shifted(tested):
                figures.append(also)
    figures.append(_learning_rates(curves))
    if any(len(cell.rates) > 1 for cell in cells):
        figures.append(_sensitivity(curves))
    return tuple(figures)


def _scores(curves: Sequence[Curve], *, name: str, title: str, shift: str = "") -> FigureData:
    metric = curves[0].metric
    best = "highest" if metric.higher_is_better else "lowest"
    unequal = f"{text} " if (text := _unequal_text(curves)) else ""
    caption = (
        f"{_spoken(metric).capitalize()} at each cell's chosen learning rate ({best} is best). "
        f"{_seed_text(curves)} {_selection_text(curves)} {shift}{unequal}"
        "Hollow marks: the chosen learning rate is at the edge of those tried. "
        "Crosses: no learning rate has a score with every seed."
    )
    return FigureData(
        name=name,
        title=title,
        caption=caption,
        note=_note(curves),
        x_label="batch size (sequences per update)",
        y_label=_axis_label(metric) + (", shifted" if shift else ""),
        x_kind="batch_size",
        y_log=False,
        percent=metric.higher_is_better,
        higher_is_better=metric.higher_is_better,
        panels=_panels(curves, [_score_dots(curve) for curve in curves]),
    )


def _score_dots(curve: Curve) -> tuple[Dot, ...]:
    return tuple(
        Dot(
            x=point.batch_size,
            y=point.score,
            low=point.low,
            high=point.high,
            num_seeds=point.num_seeds,
            flag="missing" if point.score is None else "edge" if point.lr_at_edge else "",
        )
        for point in curve.points
    )


def _shifted(curves: Sequence[Curve]) -> FigureData | None:
    """Fig. 2's way of drawing: where exactly one axis varies, and it is one of the setting."""
    axes = varied_axes(curves)
    if len(axes) != 1 or axes[0] not in ("rank", "rows", "model"):
        return None
    axis = axes[0]
    usual = [one for one in curves if one.setting.value(axis) == _PAPER_DEFAULTS.get(axis)]
    default = (usual or [one for one in curves if one.best is not None] or list(curves))[0]
    if default.best is None:
        return None
    shifted = normalised(curves, default=default)
    metric = curves[0].metric
    shifts = ", ".join(f"{one.label} {one.shift:+.4g}" for one in shifted)
    return _scores(
        shifted,
        name="shifted" if metric.task is None else f"shifted_{_file_name(metric.task)}",
        title=f"{_score_title(metric)}, every curve's best at {default.label}'s",
        shift=f"Every curve is shifted so that its best equals that of {default.label}: {shifts}. ",
    )


def _learning_rates(curves: Sequence[Curve]) -> FigureData:
    dots = [
        tuple(
            Dot(
                x=point.batch_size,
                y=point.learning_rate,
                low=None,
                high=None,
                num_seeds=point.num_seeds,
                flag="missing"
                if point.learning_rate is None
                else "edge"
                if point.lr_at_edge
                else "",
            )
            for point in curve.points
        )
        for curve in curves
    ]
    return FigureData(
        name="best_learning_rate",
        title="Best learning rate over batch size",
        caption=(
            f"{_selection_text(curves)} "
            "Lines are drawn a hair apart where they coincide. "
            "Hollow marks: the best one is at the edge of those tried. "
            "Crosses: no learning rate has a score with every seed."
        ),
        note=" ".join(filter(None, (_selection_text(curves), _edge_text(curves)))),
        x_label="batch size (sequences per update)",
        y_label="best learning rate",
        x_kind="batch_size",
        y_log=True,
        percent=False,
        higher_is_better=None,
        panels=_panels(curves, dots),
    )


def _sensitivity(curves: Sequence[Curve]) -> FigureData:
    metric = curves[0].metric
    sizes = sorted({cell.trial.batch_size for curve in curves for cell in curve.cells})
    panels = tuple(
        Panel(
            title=curve.label if len(curves) > 1 else "",
            lines=tuple(
                Line(
                    label=f"batch {cell.trial.batch_size}",
                    order=sizes.index(cell.trial.batch_size),
                    dots=tuple(_rate_dot(cell, index) for index in range(len(cell.rates))),
                )
                for cell in curve.cells
            ),
        )
        for curve in curves
    )
    values = [
        dot.y for panel in panels for line in panel.lines for dot in line.dots if dot.y is not None
    ]
    return FigureData(
        name="learning_rate_sensitivity",
        title=f"{_spoken(metric).capitalize()} over learning rate",
        caption=(
            f"{_spoken(metric).capitalize()} at every learning rate tried, one line for each batch "
            f"size. {_seed_text(curves, bands=False)} Crosses: a seed diverged there, so that the "
            "rate is not eligible; plus signs: some seed has no score yet."
        ),
        note=_note(curves, every_rate=True),
        x_label="learning rate",
        y_label=_axis_label(metric),
        x_kind="learning_rate",
        y_log=metric.task is None and 0 < 2 * min(values, default=1.0) < max(values, default=0.0),
        percent=metric.higher_is_better,
        higher_is_better=metric.higher_is_better,
        panels=panels,
    )


def _rate_dot(cell: Cell, index: int) -> Dot:
    rate = cell.rates[index]
    scores = [one for one in rate.seed_scores if one is not None and math.isfinite(one)]
    scored = rate.verdict in ("eligible", "screened")
    return Dot(
        x=rate.learning_rate,
        y=rate.mean if scored else None,
        low=None,
        high=None,
        num_seeds=len(scores),
        flag="" if scored else "diverged" if rate.verdict == "diverged" else "missing",
    )


def _panels(curves: Sequence[Curve], dots: Sequence[tuple[Dot, ...]]) -> tuple[Panel, ...]:
    """Colour by the first axis that varies, a panel for each combination of the others."""
    axes = varied_axes(curves)
    if len(axes) < 2:
        lines = [
            Line(curve.label, order, of_curve)
            for order, (curve, of_curve) in enumerate(zip(curves, dots, strict=True))
        ]
        return (Panel("", tuple(lines)),)
    orders = list(dict.fromkeys(curve.setting.value(axes[0]) for curve in curves))
    panels = dict[str, list[Line]]()
    for curve, of_curve in zip(curves, dots, strict=True):
        # labels are made of the spoken values of the varied axes, in their order
        first, *others = curve.label.split(", ", maxsplit=1)
        order = orders.index(curve.setting.value(axes[0]))
        panels.setdefault("".join(others), []).append(Line(first, order, of_curve))
    return tuple(Panel(title, tuple(lines)) for title, lines in panels.items())


def _spoken(metric: Metric) -> str:
    return metric.name.replace("_", " ")


def _score_title(metric: Metric) -> str:
    return f"{_spoken(metric).capitalize()} over batch size"


def _axis_label(metric: Metric) -> str:
    unit = "%" if metric.higher_is_better else "nats per token"
    return f"{_spoken(metric)} ({unit})"


def _seed_text(curves: Sequence[Curve], *, bands: bool = True) -> str:
    seeds = sorted({seed for curve in curves for cell in curve.cells for seed in cell.seeds})
    if len(seeds) == 1:
        return f"One seed ({seeds[0]}): no interval."
    listed = ", ".join(map(str, seeds)) if len(seeds) <= 10 else f"{seeds[0]} to {seeds[-1]}"
    if not bands:
        return f"Means over {len(seeds)} seeds ({listed}){_fewer(curves)}."
    return (
        f"Means over {len(seeds)} seeds ({listed}); bands are 95% t intervals over seeds "
        "(cut at the frame); rows and questions are the same throughout."
    )


def _note(curves: Sequence[Curve], *, every_rate: bool = False) -> str:
    """What must stand on the picture itself, wherever it goes. `every_rate`: nothing was chosen."""
    num = _num_seeds(curves)
    seeds = "One seed, no interval." if num == 1 else f"Means over {num} seeds."
    if every_rate:
        seeds = seeds if num == 1 else f"Means over {num} seeds{_fewer(curves)}."
        on_test = curves[0].cells[0].select_on == "test"
        parts = [seeds, _selection_text(curves) if on_test else "", _absent_text(curves)]
        return " ".join(part for part in parts if part)
    if num > 1:
        seeds = f"Means over {num} seeds, bands: 95% t interval over seeds."
    absent = any(cell.best is None for curve in curves for cell in curve.cells)
    first = f"{seeds} {_selection_text(curves)}{' x: no score.' if absent else ''}"
    parts = [first, _edge_text(curves), _unequal_text(curves)]
    return "\n".join(part for part in parts if part)


def _fewer(curves: Sequence[Curve]) -> str:
    """Where further seeds went to some LRs alone."""
    verdicts = {rate.verdict for curve in curves for cell in curve.cells for rate in cell.rates}
    return ", fewer at rates away from the best" if "screened" in verdicts else ""


def _absent_text(curves: Sequence[Curve]) -> str:
    """What `_draw_absent` draws for LRs without a score."""
    rates = [rate for curve in curves for cell in curve.cells for rate in cell.rates]
    verdicts = {rate.verdict for rate in rates if rate.verdict in ("diverged", "incomplete")}
    stopped = any(one.status == "stopped" for rate in rates for one in rate.trials)
    said = {"diverged": "x: diverged", "incomplete": "+: stopped" if stopped else "+: no score"}
    return "".join(f"{said[one]}. " for one in sorted(verdicts)).strip()


def _edge_text(curves: Sequence[Curve]) -> str:
    hollow = any(point.lr_at_edge for curve in curves for point in curve.points)
    return "Hollow marks: the best learning rate is at the edge of those tried." if hollow else ""


def _unequal_text(curves: Sequence[Curve]) -> str:
    """Ranks and alpha/r, where lines that differ in the method by name differ in these too."""
    if varied_axes(curves) != ("method",):
        return ""
    trials = [curve.cells[0].trial for curve in curves]
    shapes = [f"rank {one.rank}, alpha/r {one.alpha / one.rank:g}" for one in trials]
    if len(set(shapes)) == 1:
        return ""
    listed = "; ".join(
        f"{curve.label} {shape}" for curve, shape in zip(curves, shapes, strict=True)
    )
    return f"NOT ALIKE: {listed}."


def _selection_text(curves: Sequence[Curve]) -> str:
    if curves[0].cells[0].select_on == "test":
        return "LEARNING RATES SELECTED ON THE TEST SET: scores are too good."
    selected_by = _spoken(curves[0].cells[0].metric)
    over = "" if _num_seeds(curves) == 1 else " in the mean over seeds"
    return f"Learning rates chosen by {selected_by}{over}."


def _num_seeds(curves: Sequence[Curve]) -> int:
    return len({seed for curve in curves for cell in curve.cells for seed in cell.seeds})


def _file_name(task: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in task)


def figure_table(data: FigureData) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The numbers of a figure as (header, rows) of text."""
    x = "batch size" if data.x_kind == "batch_size" else "learning rate"
    with_panel = len(data.panels) > 1
    header = (*(("panel",) if with_panel else ()), "line", x, data.y_label)
    header = (*header, "95% low", "95% high", "seeds", "note")
    notes = {"edge": "LR at edge", "diverged": "diverged", "missing": "no score", "": ""}
    scale = 100.0 if data.percent else 1.0
    rows = [
        (
            *((panel.title,) if with_panel else ()),
            line.label,
            f"{dot.x:g}",
            *(("" if v is None else f"{scale * v:.6g}") for v in (dot.y, dot.low, dot.high)),
            str(dot.num_seeds),
            notes[dot.flag],
        )
        for panel in data.panels
        for line in panel.lines
        for dot in line.dots
    ]
    return header, tuple(rows)


def render(data: FigureData) -> dict[FigureFormat, bytes]:
    """The figure as PNG, SVG and PDF; no dates, no random ids."""
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": data.name}
    metadata: dict[FigureFormat, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    rendered = dict[FigureFormat, bytes]()
    with matplotlib.rc_context(style):
        for format in FORMATS:
            buffer = io.BytesIO()
            # drawn anew for each: saving one format must not move anything in the next
            draw(data).savefig(buffer, format=format, dpi=150, metadata=metadata[format])
            rendered[format] = buffer.getvalue()
    return rendered


def draw(data: FigureData) -> Figure:
    """The figure on an Agg canvas, without pyplot."""
    columns = 2 if len(data.panels) == 4 else min(_PANEL_COLUMNS, len(data.panels))
    rows = math.ceil(len(data.panels) / columns)
    width = 8.0 if columns == 1 else 4.0 * columns + 0.8
    figure = Figure(figsize=(width, 4.3 * rows if rows == 1 else 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=False, sharey=True)
    limits = _y_limits(data)
    for index, axes in enumerate(grid.flat):
        if index >= len(data.panels):
            axes.set_axis_off()
            continue
        _draw_panel(axes, data, data.panels[index], limits)
        if index % columns == 0:
            axes.set_ylabel(data.y_label)
        axes.set_xlabel(data.x_label)
    figure.suptitle(data.title, fontsize=11.5, fontweight="bold")
    handles = dict[str, Any]()
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside right center")
    loud = "TEST SET" in data.note
    figure.supxlabel(
        data.note, fontsize=8, color="#b00020" if loud else "#555555", x=0.01, ha="left"
    )
    return figure


def _draw_panel(axes: Any, data: FigureData, panel: Panel, limits: tuple[float, float]) -> None:
    scale = 100.0 if data.percent else 1.0
    axes.set_xscale("log", base=2 if data.x_kind == "batch_size" else 10)
    if data.y_log:
        axes.set_yscale("log")
    axes.set_ylim(*limits)
    num_orders = 1 + max(line.order for line in panel.lines)
    for line in panel.lines:
        colour = _colour(data, line.order, num_orders)
        marker = _LINE_MARKERS[line.order % len(_LINE_MARKERS)]
        apart, up = _apart(data, line.order, num_orders)
        seen = [
            (replace(dot, x=dot.x * apart), dot.y * scale * up)
            for dot in line.dots
            if dot.y is not None
        ]
        banded = [
            (dot.x, dot.low * scale, dot.high * scale)
            for dot, _ in seen
            if dot.low is not None and dot.high is not None
        ]
        if len(banded) > 1:
            xs, lows, highs = zip(*banded, strict=True)
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
        for x, low, high in banded:
            axes.plot([x, x], [low, high], color=colour, linewidth=0.9, alpha=0.6)
        axes.plot(
            [dot.x for dot, _ in seen],
            [y for _, y in seen],
            color=colour,
            marker=marker,
            markersize=5.5,
            linewidth=1.7,
            label=line.label,
        )
        axes.plot(
            [dot.x for dot, _ in seen if dot.flag == "edge"],
            [y for dot, y in seen if dot.flag == "edge"],
            linestyle="none",
            marker=marker,
            markersize=5.5,
            markerfacecolor="white",
            markeredgecolor=colour,
            zorder=5,
        )
        _draw_absent(axes, data, line, colour, num_orders)
    _x_ticks(axes, data, panel)
    if data.x_kind == "learning_rate" or data.y_log:
        _plain_log_labels(axes, data, limits)
    if panel.title:
        axes.set_title(panel.title, fontsize=10)


def _draw_absent(axes: Any, data: FigureData, line: Line, colour: str, num_orders: int) -> None:
    """Crosses (and plus signs) inside the frame on its bad side, one row for each line."""
    depth = 0.03 + 0.045 * (line.order if num_orders <= 8 else line.order / num_orders * 8)
    apart, _ = _apart(data, line.order, num_orders)
    height = depth if data.higher_is_better else 1 - depth
    for flag, marker in (("diverged", "x"), ("missing", "+")):
        xs = [dot.x * apart for dot in line.dots if dot.flag == flag]
        cross = "x" if data.x_kind == "batch_size" else marker
        if xs:
            axes.plot(
                xs,
                [height] * len(xs),
                transform=axes.get_xaxis_transform(),
                linestyle="none",
                marker=cross,
                markersize=7,
                markeredgewidth=1.8,
                color=colour,
            )


def _apart(data: FigureData, order: int, num_orders: int) -> tuple[float, float]:
    """Factors on x and y that set lines a hair apart, so that none hides another."""
    if data.x_kind == "learning_rate":
        return 1.0, 1.0
    off = order - (num_orders - 1) / 2
    return 2.0 ** (0.05 * off), 1.02**off if data.y_log else 1.0


def _colour(data: FigureData, order: int, num_orders: int) -> str:
    """Batch sizes are ordered, and get a scale from light to dark; other lines distinct colours."""
    if data.x_kind == "learning_rate":
        position = 0.12 + 0.78 * (order / max(1, num_orders - 1))
        return str(to_hex(matplotlib.colormaps["viridis_r"](position)))
    return _COLOURS[order % len(_COLOURS)]


def _x_ticks(axes: Any, data: FigureData, panel: Panel) -> None:
    xs = sorted({dot.x for line in panel.lines for dot in line.dots})
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    room = (xs[-1] / xs[0]) ** 0.09 if len(xs) > 1 else 2.0
    axes.set_xlim(xs[0] / room, xs[-1] * room)
    span = math.log(xs[-1] / xs[0])
    closest = min((math.log(b / a) / span for a, b in pairwise(xs)), default=1.0)
    if closest < (0.1 if data.x_kind == "batch_size" else 0.18):  # their labels would touch
        axes.tick_params(axis="x", labelrotation=45, labelsize=8.5)


def _number(value: float, position: int | None) -> str:
    return f"{value:g}"


def _plain_log_labels(axes: Any, data: FigureData, limits: tuple[float, float]) -> None:
    """Numbers as they are said, at 1, 2, 5 times powers of ten, where the axis is logarithmic."""
    if not data.y_log:
        return
    low, high = limits
    if data.name == "best_learning_rate":
        rates = {dot.y for panel in data.panels for line in panel.lines for dot in line.dots}
        ticks = sorted(rate for rate in rates if rate is not None)
    else:
        steps = (1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 7)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_number))


def _y_limits(data: FigureData) -> tuple[float, float]:
    """From the means, with room for the intervals up to the means' own spread on either side.

    Never below 0 nor above 100%: an interval that reaches there is cut at the frame.
    """
    scale = 100.0 if data.percent else 1.0
    dots = [d for panel in data.panels for line in panel.lines for d in line.dots]
    means = [scale * dot.y for dot in dots if dot.y is not None]
    if not means:
        return (0.1, 1.0)
    if data.y_log:
        # one value alone: room enough that lines set a hair apart look no further apart than that
        room = max(1.15, (max(means) / min(means)) ** 0.12) if max(means) > min(means) else 2.0
        return min(means) / room, max(means) * room
    lows = [scale * dot.low for dot in dots if dot.low is not None]
    highs = [scale * dot.high for dot in dots if dot.high is not None]
    spread = (max(means) - min(means)) or max(abs(means[0]) * 0.1, 1e-9)
    low = max(min([*lows, *means]), min(means) - spread)
    high = min(max([*highs, *means]), max(means) + spread)
    pad = 0.07 * (high - low) if high > low else 0.1 * spread
    # a shifted curve is no longer a loss or an accuracy, and may lie where these cannot
    least = min(0.0, *means)
    greatest = max(100.0, *means) if data.percent else math.inf
    return max(least, low - pad), min(greatest, high + pad)
