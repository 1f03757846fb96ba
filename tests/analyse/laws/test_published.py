import pytest

from loratune.analyse.laws.published import lora_learning_rate, prior_batch_tokens, prior_ratio
from loratune.errors import AnalysisError


@pytest.mark.parametrize(
    ("hidden_size", "family", "rate"),
    [(4096, "llama", 2.856e-4), (2048, "llama", 4.908e-4), (4096, "qwen", 4.730e-4)],
)
def test_lora_without_regret_gives_its_rates(hidden_size, family, rate):
    # The fixtures have four digits.
    assert lora_learning_rate(hidden_size, family=family) == pytest.approx(rate, rel=2e-4)


def test_priors_in_tokens_are_the_published_powers():
    assert prior_batch_tokens(1e9, prior="step_law") == pytest.approx(0.58 * 1e9**0.571)
    assert prior_batch_tokens(1e9, prior="schaipp") == pytest.approx(0.667 * 1e9**0.566)
    assert prior_ratio(8e9, from_tokens=1e9, prior="power_lines") == pytest.approx(8**0.383)


def test_what_is_not_known_is_refused():
    with pytest.raises(AnalysisError, match="only its exponent"):
        prior_batch_tokens(1e9, prior="power_lines")
    with pytest.raises(AnalysisError, match="known are"):
        prior_ratio(1e9, from_tokens=1e8, prior="mine")  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="positive"):
        prior_batch_tokens(0, prior="schaipp")
    with pytest.raises(AnalysisError, match="known are"):
        lora_learning_rate(4096, family="mamba")  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="above 0"):
        lora_learning_rate(0, family="llama")
