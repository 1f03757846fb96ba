import numpy as np
import pytest

from loratune.analyse.noise import measured_noise
from simulated import result, score, verdicts

RATES = (1e-3, 1e-2)


def losses(*, methods=("lora", "pissa"), sd=0.02, num_seeds=40):
    draw = np.random.default_rng(1)
    return [
        result(
            1.0 + (rate == RATES[1]) + sd * draw.normal(),
            method=method, seed=seed, learning_rate=rate,
        )
        for method in methods
        for seed in range(num_seeds)
        for rate in RATES
    ]  # fmt: skip


def test_the_noise_of_a_loss_is_the_variance_of_its_paired_differences():
    noise = measured_noise(losses())["validation_loss"]
    # Two seeds' variances; 40 of them place it to sqrt(2 / 39), of which three are allowed.
    assert noise.seed_variance == pytest.approx(2 * 0.02**2, rel=3 * (2 / 39) ** 0.5)
    assert (noise.question_variance, noise.residual_variance) == (0.0, 0.0)
    assert noise.source == "measured on 1 pair of methods"


def test_one_method_alone_counts_twice():
    noise = measured_noise(losses(methods=("lora",)))["validation_loss"]
    assert noise.seed_variance == pytest.approx(2 * 0.02**2, rel=3 * (2 / 39) ** 0.5)
    assert "one method's seeds, twice" in noise.source


def answered(methods, *, num_seeds=12, num_questions=3000):
    """Right answers with known components: 30% of questions are the method's, the rest luck."""
    draw = np.random.default_rng(2)
    results, given = [], []
    for method in methods:
        own = draw.random(num_questions) < 0.3
        fixed = draw.random(num_questions) < 0.5
        for seed in range(num_seeds):
            row = np.where(own, fixed, draw.random(num_questions) < 0.5).astype(int)
            one = result(
                1.0, method=method, seed=seed,
                scores=[score("gsm8k", int(row.sum()), num_questions)],
            )  # fmt: skip
            results.append(one)
            given.append(verdicts(one, row.tolist()))
    return results, given


def test_the_noise_of_an_accuracy_has_the_components_that_made_it():
    results, given = answered(("lora", "pissa"))
    noise = measured_noise(results, given)["gsm8k_accuracy"]
    # A method's own answers: variance 1/4 on 30% of the questions; luck: 1/4 on 70%. Twice each.
    assert noise.question_variance == pytest.approx(2 * 0.3 / 4, rel=0.15)
    assert noise.residual_variance == pytest.approx(2 * 0.7 / 4, rel=0.05)
    assert noise.seed_variance < 1e-4
    assert "gsm8k_accuracy" not in measured_noise(results), "without the answers"


def test_questions_of_one_source_tell_less_and_the_plan_knows_it():
    # 600 sources of 5 questions that are answered alike but for luck.
    draw = np.random.default_rng(4)
    of = np.repeat(np.arange(600), 5)
    results, given = [], []
    for method in ("lora", "pissa"):
        own = draw.random(600)[of] < 0.3
        fixed = draw.random(600)[of] < 0.5
        for seed in range(8):
            row = np.where(own, fixed, draw.random(3000) < 0.5).astype(int)
            one = result(
                1.0, method=method, seed=seed, scores=[score("gsm8k", int(row.sum()), 3000)]
            )
            results.append(one)
            given.append(verdicts(one, row.tolist()))
    where = {(results[0].trial.data_fingerprint, "gsm8k"): of.tolist()}
    noise = measured_noise(results, given, sources=where)["gsm8k_accuracy"]
    # Five questions with one answer in common vary like one: five times the variance of the mean.
    assert noise.question_variance == pytest.approx(5 * 2 * 0.3 / 4, rel=0.3)
    assert noise.residual_variance == pytest.approx(2 * 0.7 / 4, rel=0.1)
    naive = measured_noise(results, given)["gsm8k_accuracy"]
    assert naive.question_variance == pytest.approx(2 * 0.3 / 4, rel=0.3)


def test_the_questions_part_of_one_method_alone_is_what_is_assumed():
    results, given = answered(("lora",))
    noise = measured_noise(results, given)["gsm8k_accuracy"]
    assert noise.residual_variance == pytest.approx(2 * 0.7 / 4, rel=0.05)
    assert noise.question_variance == 0.0, "0.35 of answers differ by luck, more than assumed"
    assert "assumed: 20% of answers differ" in noise.source


def test_nothing_is_measured_where_nothing_was_run():
    assert measured_noise([result(status="planned")]) == {}
