from loratune.analyse.cells import make_cells
from loratune.analyse.compare import compare
from loratune.analyse.curves import make_curves
from loratune.recommendation.grid import recommend
from loratune.report.text import comparison_sentence, curves_text, recommendation_text
from simulated import result, sweep


def loss(size, rate, seed):
    return 1.0 + rate + 0.01 * seed + 0.001 * abs(size - 16)


def test_the_table_has_methods_as_rows_and_batch_sizes_as_columns():
    text = curves_text(make_curves(make_cells(sweep(loss) + sweep(loss, method="pissa"))))
    lines = text.splitlines()
    assert lines[0].startswith("validation loss (lower is better; +- 95% t interval over 3 seeds)")
    assert lines[2].split() == ["batch", "size", "4", "16", "64"]
    assert lines[3].split() == ["lora", "1.0221", "[1.0101]", "1.0581"]
    assert lines[4].split() == ["+-", "0.0248", "0.0248", "0.0248"]
    assert lines[5].split() == ["best", "LR", "0.0001!", "0.0001!", "0.0001!"]
    assert lines[6].startswith("pissa")
    assert text.isascii()


def test_a_batch_size_that_a_curve_lacks_is_blank_and_one_without_a_score_is_a_dash():
    results = [result(batch_size=4), result(batch_size=16, status="failed")]
    text = curves_text(make_curves(make_cells([*results, result(method="pissa", batch_size=64)])))
    assert text.splitlines()[3].split() == ["lora", "[1.0000]", "-"]
    assert "+-" not in text


def test_the_recommendation_is_told_in_sentences():
    text = recommendation_text(recommend(sweep(loss)))
    assert text.startswith("Use batch size 16 and learning rate 0.0001 for lora")
    assert "Within 0.50% of the best with 95% confidence: 16." in text
    assert "lowest tried" in text


def test_an_undecided_recommendation_begins_with_the_reason():
    assert recommendation_text(recommend([result()])).startswith("Undecided: only batch size 8")


def test_a_comparison_names_verdict_difference_and_seeds():
    (one,) = compare(sweep(loss) + sweep(lambda *a: loss(*a) - 0.1 - 1e-4 * a[2], method="pissa"))
    text = comparison_sentence(one)
    assert "pissa against lora" in text
    assert ": better. Difference -0.1001, 95% interval" in text
    assert "3 shared seeds" in text
