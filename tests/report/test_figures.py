import math

import pytest

from loratune.analyse.cells import make_cells
from loratune.report.figures import draw, figure_table, render, study_figures
from simulated import faked_results, result, score, sweep


def figures(results):
    return {one.name: one for one in study_figures(make_cells(results))}


def flat(size, rate, seed):
    return 1.0 + abs(math.log10(rate / 1e-3)) + 0.01 * seed + 0.001 * size


def test_a_study_of_methods_gives_scores_best_rates_and_sensitivity():
    found = figures(sweep(flat) + sweep(flat, method="pissa"))
    assert list(found) == ["scores", "best_learning_rate", "learning_rate_sensitivity"]
    (panel,) = found["scores"].panels
    assert [line.label for line in panel.lines] == ["lora", "pissa"]
    assert [dot.x for dot in panel.lines[0].dots] == [4, 16, 64]
    assert [dot.y for dot in panel.lines[0].dots] == pytest.approx([1.014, 1.026, 1.074])
    assert [dot.y for dot in found["best_learning_rate"].panels[0].lines[0].dots] == [1e-3] * 3
    assert [panel.title for panel in found["learning_rate_sensitivity"].panels] == ["lora", "pissa"]


def test_a_study_of_ranks_is_also_drawn_shifted_and_one_of_methods_is_not():
    found = figures(sweep(flat, rank=8) + sweep(lambda *a: flat(*a) - 0.5, rank=128))
    assert "shifted" in found
    first, second = found["shifted"].panels[0].lines
    assert min(d.y for d in first.dots if d.y) == pytest.approx(
        min(d.y for d in second.dots if d.y)
    )
    assert second.dots[0].y == found["scores"].panels[0].lines[1].dots[0].y, "128 is the default"
    assert "rank 8 -0.5" in found["shifted"].caption


def test_two_varied_axes_are_panels_of_lines():
    results = [
        r for rank in (8, 32) for m in ("lora", "pissa") for r in sweep(flat, rank=rank, method=m)
    ]
    panels = figures(results)["scores"].panels
    assert [panel.title for panel in panels] == ["rank 8", "rank 32"]
    assert [[line.label for line in panel.lines] for panel in panels] == [["lora", "pissa"]] * 2


def test_test_accuracies_have_a_figure_of_their_own():
    results = [result(1.0, batch_size=size, scores=[score("gsm8k", size, 100)]) for size in (4, 16)]
    found = figures(results)
    assert [dot.y for dot in found["test_gsm8k"].panels[0].lines[0].dots] == [0.04, 0.16]
    assert "learning_rate_sensitivity" not in found, "one rate has no sensitivity"


def test_edges_and_divergence_are_flagged_and_stand_in_the_table():
    def loss(size, rate, seed):
        return math.nan if size == 64 or rate > 5e-3 else 1.0 + rate

    found = figures(sweep(loss))
    dots = found["scores"].panels[0].lines[0].dots
    assert [dot.flag for dot in dots] == ["edge", "edge", "missing"]
    sensitivity = found["learning_rate_sensitivity"].panels[0].lines[0].dots
    assert [dot.flag for dot in sensitivity] == ["", "", "diverged"]
    header, rows = figure_table(found["scores"])
    assert header[-1] == "note"
    assert [row[-1] for row in rows] == ["LR at edge", "LR at edge", "no score"]


def test_the_same_numbers_give_the_same_bytes_in_every_format_and_no_date():
    data = figures(sweep(flat))["scores"]
    first, second = render(data), render(data)
    assert first == second
    assert first["png"].startswith(b"\x89PNG")
    assert first["pdf"].startswith(b"%PDF")
    assert b"<svg" in first["svg"]
    assert b"Date" not in first["pdf"]
    assert b"<dc:date>" not in first["svg"]


def test_nothing_is_drawn_without_a_score_and_everything_with_odd_ones():
    assert figures([result(status="planned")]) == {}
    assert figures(sweep(lambda *_: math.nan)) == {}
    odd = figures([result(1.0, batch_size=8)])
    assert all(render(data)["png"] for data in odd.values())


def test_selection_on_the_test_stands_on_the_picture():
    data = figures([result(select_on="test", scores=[score("gsm8k", 1, 2)])])["scores"]
    assert "SELECTED ON THE TEST SET" in data.note


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("published-milora", "lora rank 64, alpha/r 2; pissa rank 64, alpha/r 1"),
        ("published-peft", "lora rank 32, alpha/r 2; rslora rank 64, alpha/r 1; dora rank 32"),
    ],
)
def test_methods_with_a_shape_of_their_own_share_a_panel_and_it_is_said(preset, said):
    data = figures(faked_results(preset))["scores"]
    (panel,) = data.panels
    assert len(panel.lines) == 3
    assert f"NOT ALIKE: {said}" in data.note
    assert f"NOT ALIKE: {said}" in data.caption
    assert "NOT ALIKE" not in figures(faked_results("published-pissa"))["scores"].note


def test_no_axis_goes_where_no_loss_or_accuracy_can_be():
    wide = [
        result(loss, batch_size=size, seed=seed)
        for size, losses in {4: (0.2, 2.2), 16: (3.0, 3.1)}.items()
        for seed, loss in enumerate(losses)
    ]
    bottom, _ = draw(figures(wide)["scores"]).axes[0].get_ylim()
    assert bottom == 0.0
    near = [
        result(1.0, batch_size=size, seed=seed, scores=[score("gsm8k", correct, 100)])
        for size, right in {4: (99, 79), 16: (60, 61)}.items()
        for seed, correct in enumerate(right)
    ]
    _, top = draw(figures(near)["test_gsm8k"]).axes[0].get_ylim()
    assert top == 100.0
