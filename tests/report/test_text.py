import numpy as np

from loratune.analyse.cells import make_cells
from loratune.analyse.compare import compare
from loratune.analyse.curves import make_curves
from loratune.recommendation.grid import recommendations
from loratune.report.text import comparison_sentence, curves_text, recommendation_text
from simulated import result, score, sweep


def loss(size, rate, seed):
    return 1.0 + rate + 0.01 * seed + 0.001 * abs(size - 16)


def test_the_table_has_methods_as_rows_and_batch_sizes_as_columns():
    text = curves_text(make_curves(make_cells(sweep(loss) + sweep(loss, method="pissa"))))
    lines = text.splitlines()
    assert lines[0].startswith("Validation loss (lower is better; +- 95% t interval over 3 seeds)")
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


def told(results):
    (answer,) = recommendations(results)
    return recommendation_text(answer)


def test_the_table_explains_the_marks_it_has_and_no_others():
    marked = curves_text(make_curves(make_cells(sweep(loss)))).splitlines()[-1]
    assert marked == "[ ]: the best of the row; !: at the edge of the learning rates tried"
    missing = curves_text(
        make_curves(make_cells([result(), result(batch_size=4, status="failed")]))
    )
    assert missing.splitlines()[-1].endswith("-: no learning rate has a score with every seed")


def test_the_recommendation_is_told_in_sentences():
    text = told(sweep(loss))
    assert text.startswith("Use batch size 16 and learning rate 0.0001 for lora (rank 8, 512 tra")
    assert "Of the batch sizes tried, 16 is the best with 95% confidence." in text
    assert "No other one is shown to be within 0.5% of it." in text
    assert "16 rows per microbatch, no gradient accumulation." in text
    assert "lowest tried" in text


def test_several_acceptable_sizes_are_listed_with_the_fastest_of_them():
    flat = [
        result(1.0 + 1e-6 * size + 0.01 * seed + rate, batch_size=size, learning_rate=rate,
               seed=seed, seconds=100 / size)
        for size in (4, 16) for rate in (1e-4, 1e-3) for seed in (0, 1, 2)
    ]  # fmt: skip
    text = told(flat)
    assert "Within 0.5% of the best with 95% confidence: 4, 16." in text
    assert "The fastest of these, as measured: 16." in text


def test_the_answer_ends_with_what_to_run_next():
    text = told(sweep(lambda size, rate, seed: size + 1 / rate + 0.01 * seed))
    assert text.splitlines()[-1].startswith(
        "What to run next: add batch size 2 and learning rate 0.1 to the study file"
    )


def test_an_undecided_recommendation_begins_with_the_reason():
    assert told([result()]).startswith("Undecided: only batch size 8")


def test_a_comparison_names_verdict_difference_and_seeds():
    def inside(size, rate, seed):
        return loss(size, rate, seed) + 3 * abs(rate - 1e-3)

    (one,) = compare(
        sweep(inside) + sweep(lambda *a: inside(*a) - 0.1 - 1e-4 * a[2], method="pissa")
    )
    text = comparison_sentence(one)
    assert text.startswith("pissa against lora, validation loss: better.")
    assert "Difference -0.1001 (lower is better), 95% interval" in text
    assert "3 shared seeds" in text
    (edged,) = compare(sweep(loss) + sweep(lambda *a: loss(*a) - 0.1 - 1e-4 * a[2], method="pissa"))
    text = comparison_sentence(edged)
    assert "undecided: lora's own best is not known" in text
    assert "pissa's learning rate 0.0001 is the lowest of those tried" in text
    # What was tried is no method's own best there, and not called so.
    assert "The best tried of each: pissa 0.9" in text


def test_two_seeds_are_said_not_to_be_enough():
    (one,) = compare(
        [
            result(
                1.0 + offset + seed * (0.5 - offset) + rate + (size == 16),
                method=method,
                seed=seed,
                batch_size=size,
                learning_rate=rate,
            )
            for method, offset in (("lora", 0.1), ("pissa", 0.2))
            for size in (8, 16)
            for rate in (1e-4, 1e-3)
            for seed in (0, 1)
        ],
        margin=1e-6,
    )
    assert "undecided: 2 seeds cannot tell, run at least 5" in comparison_sentence(one)


def test_a_change_of_sign_that_is_noise_names_nobody_as_better():
    draw = np.random.default_rng(1)

    def told(noise):
        rates = (1e-4, 1e-3)
        lora = sweep(lambda _, rate, seed: 1.0 + rate + noise * draw.normal(), learning_rates=rates)
        other = sweep(
            lambda size, rate, seed: (
                1.0 + rate + {4: 0.2, 16: -0.2, 64: -0.25}[size] + noise * draw.normal()
            ),
            method="pissa",
            learning_rates=rates,
        )
        return comparison_sentence(compare(lora + other)[0])

    assert "lora is better below, pissa above" in told(0.001)
    noisy = told(0.2)
    assert "is better below" not in noisy
    assert "which 3 seeds do not tell from noise: no crossing is shown there." in noisy


def test_seeds_that_chose_are_told_from_seeds_that_did_not():
    grid = sweep(loss) + sweep(lambda *a: loss(*a) - 0.1 - 1e-4 * a[2], method="pissa")
    (shared,) = compare(grid)
    assert "3 shared seeds (paired t over seeds)" in comparison_sentence(shared)
    assert "The same seeds chose batch size and learning rate" in comparison_sentence(shared)
    fresh = [
        result(1.5 + seed / 100 + (method == "lora") * (0.1 + 1e-5 * seed), method=method,
               seed=seed, batch_size=16, learning_rate=1e-4, purpose="confirm")
        for method in ("lora", "pissa") for seed in (7, 8, 9)
    ]  # fmt: skip
    text = comparison_sentence(compare(grid + fresh)[0])
    assert "These seeds had no part in choosing" in text
    # Chosen at 1.0101 and 0.91, 1.68 and 1.58 on fresh seeds.
    assert "pissa +0.67, lora +0.67" in text


def test_no_number_stands_where_nothing_can_be_concluded():
    (one,) = compare([result(method=name, batch_size=4) for name in ("lora", "pissa")])
    (sentence,) = comparison_sentence(one).splitlines()
    assert sentence.startswith("pissa against lora, validation loss: undecided: pissa's own best")


def test_a_choice_by_the_test_set_is_loud():
    (one, *_) = compare(
        [
            result(
                method=name, seed=seed, learning_rate=rate, select_on="test",
                scores=[score("gsm8k", 50 + seed, 100)],
            )
            for name in ("lora", "pissa") for seed in (0, 1, 2) for rate in (1e-4, 1e-3)
        ]
    )  # fmt: skip
    assert "SELECTED ON THE TEST SET" in comparison_sentence(one)
