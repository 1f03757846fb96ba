"""One method against itself (benchmarks/null_test.py): what our procedure finds, and what not."""

import math

import pytest

from decisions import main
from null_test import answer_coverage, null_test
from ranges import CASES


def test_choosing_and_scoring_on_the_test_is_ahead_89_times_in_100_by_a_point():
    n = 400
    found = null_test("test", num_simulations=n, seed=1)
    # Published figures to their last digit, and three standard errors of n simulations. Nothing
    # says how equal scores were counted, so half of them count as ahead.
    assert found.ahead + found.level / 2 == pytest.approx(
        0.89, abs=0.005 + 3 * math.sqrt(0.89 * 0.11 / n)
    )
    assert 100 * found.bias == pytest.approx(0.97, abs=0.005 + 300 * found.bias_error)


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_a_method_chosen_on_held_out_rows_does_not_beat_itself_on_fresh_seeds(num_seeds):
    n = 400
    found = null_test("fresh", num_simulations=n, seed=2, num_seeds=num_seeds)
    assert found.rejected is not None
    assert found.called is not None
    assert found.rejected == pytest.approx(0.05, abs=0.01 + 3 * math.sqrt(0.05 * 0.95 / n))
    assert abs(100 * found.bias) <= 0.1 + 300 * found.bias_error
    assert found.called <= found.rejected


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_for_right_and_wrong_answers_too(paired):
    n = 300
    found = answer_coverage(
        "in between", paired=paired, num_seeds=3, num_questions=100, num_simulations=n, seed=1
    )
    assert found == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / n))


def test_its_help_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "How often the 95% interval of a difference" in " ".join(capsys.readouterr().out.split())


def test_the_same_seed_gives_the_same_bytes(capsys):
    main(["null-test", "--simulations", "2"])
    first = capsys.readouterr().out
    main(["null-test", "--simulations", "2"])
    assert capsys.readouterr().out == first
    assert len(first.splitlines()) == 3 + 5


@pytest.mark.parametrize(
    ("part", "num_lines", "row"),
    [
        ("range", 3 + len(CASES) + 4 + 10, "| equal, with a best one |"),
        ("laws", 3 + 3 + 3 + 3 + 12, "| 0.33 | 0.1 |"),
        ("optima", 3 + 5 + 5, "| another | 0.2 | 5 |"),
        ("lemma", 3 + 3, "| 8 |"),
    ],
)
def test_the_other_parts_print_a_row_for_every_case_and_the_same_again(
    part, num_lines, row, capsys
):
    main([part, "--simulations", "1"])
    first = capsys.readouterr().out
    assert len(first.splitlines()) == num_lines
    assert row in first
    main([part, "--simulations", "1"])
    assert capsys.readouterr().out == first


@pytest.mark.slow
def test_choosing_and_scoring_on_the_test_at_full_size():
    found = null_test("test", num_simulations=20_000, seed=3)
    # 89% lies between ahead and not behind; the standard error of either is 0.2 points.
    assert found.ahead < 0.89 < found.ahead + found.level
    assert found.level < 0.03
    assert 100 * found.bias == pytest.approx(0.97, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_our_procedure_is_wrong_4_to_6_times_in_100_and_unbiased_at_full_size(num_seeds):
    # 20,000 simulations have a standard error of 0.15 points (rate) and 0.006 (bias); 10 seeds mean
    # a bootstrap each.
    n = 20_000 if num_seeds < 10 else 4_000
    found = null_test("fresh", num_simulations=n, seed=4, num_seeds=num_seeds)
    assert found.rejected is not None
    assert 0.04 <= found.rejected <= 0.06
    assert abs(100 * found.bias) <= 0.1
