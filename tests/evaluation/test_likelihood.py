"""Log-likelihoods against transformers, one row at a time without padding."""

from typing import Any

import pytest
import torch

from loratune.errors import EvaluationError
from loratune.evaluation.likelihood import Continuation, log_likelihoods
from loratune.models.load import Base
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer


def base_of(family: str) -> Base:
    model = tiny_model(family).requires_grad_(False)
    return Base(model, tiny_tokenizer(), "tiny", "tiny", torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_batch_gives_what_each_row_gives_alone(family):
    base = base_of(family)
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, VOCAB_SIZE, (count,), generator=draw).tolist())

    asked = [Continuation(ids(3 + 5 * n), ids(1 + n % 4)) for n in range(9)]
    found = log_likelihoods(base, asked, rows_per_batch=4)
    for one, got in zip(asked, found, strict=True):
        whole = torch.tensor([one.context_ids + one.continuation_ids])
        scores = base.model(whole).logits[0].double().log_softmax(dim=-1)
        places = range(len(one.context_ids) - 1, whole.shape[1] - 1)
        alone = sum(float(scores[t, whole[0, t + 1]]) for t in places)
        # float32 logits; a padded batch rounds otherwise.
        assert got.value == pytest.approx(alone, abs=1e-5 * got.num_tokens + 1e-5)
        assert got.num_tokens == len(one.continuation_ids)
        assert got.is_greedy == all(int(scores[t].argmax()) == whole[0, t + 1] for t in places)
    generate: Any = base.model.generate
    greedy = generate(
        torch.tensor([asked[0].context_ids]), max_new_tokens=3, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )[0, len(asked[0].context_ids) :]  # fmt: skip
    (again,) = log_likelihoods(base, [Continuation(asked[0].context_ids, tuple(greedy.tolist()))])
    assert again.is_greedy


def test_what_does_not_fit_or_has_no_token_is_refused():
    base = base_of("llama")
    with pytest.raises(EvaluationError, match="positions"):
        log_likelihoods(base, [Continuation(tuple([5] * 510), (5, 6, 7, 8))])
    # The last token takes no position: nothing is asked after it.
    log_likelihoods(base, [Continuation(tuple([5] * 510), (5, 6, 7))])
    with pytest.raises(EvaluationError, match="no token"):
        log_likelihoods(base, [Continuation((), (5,))])
