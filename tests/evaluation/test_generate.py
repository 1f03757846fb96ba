import pytest
import torch
from torch import nn

from loratune.errors import EvaluationError
from loratune.evaluation.generate import check_room, generate_answers
from loratune.models.load import Base, set_gradient_checkpointing
from loratune.records import Answer
from tiny_models import EOS_ID, tiny_model, tiny_tokenizer

TEXTS = (
    "What is 2 + 3?",
    "A",
    "Two trains leave a station, one of them late. How late?",
    "xyz",
    "How many apples does Ann have after she eats 3 of 7?",
    "What is 2 + 3?",
)


def tiny_base(family, *, seed=0):
    model = tiny_model(family, seed=seed).requires_grad_(False)
    return Base(model, tiny_tokenizer(), "tiny", "tiny", torch.device("cpu"))


def encoded(base, texts=TEXTS):
    return [base.tokenizer(text).input_ids for text in texts]


def without_end(base):
    """The same model with no token that ends an answer, so that texts run to the limit."""
    base.model.generation_config.eos_token_id = None
    base.model.config.eos_token_id = None
    base.tokenizer.eos_token = None
    return base


def greedy_by_hand(base, ids, *, max_new_tokens, end_ids):
    """Argmax of the last logits of a full forward pass, no cache, no padding."""
    ids, made = list(ids), []
    with torch.no_grad():
        while len(made) < max_new_tokens and not (made and made[-1] in end_ids):
            made.append(int(base.model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    finished = bool(made) and made[-1] in end_ids
    text = base.tokenizer.decode([one for one in made if one not in end_ids])
    for special in base.tokenizer.all_special_tokens:
        text = text.replace(special, "")
    return Answer(text=text, num_tokens=len(made), finished=finished)


FAMILIES = ("llama", "qwen3", "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_an_argmax_loop_without_cache_or_padding(family):
    base = tiny_base(family)
    prompts = encoded(base)
    # Random models almost never write EOS, so frequent tokens end the answers here.
    plain = [greedy_by_hand(base, ids, max_new_tokens=24, end_ids=(EOS_ID,)) for ids in prompts]
    expected_end = base.tokenizer(plain[0].text[-8]).input_ids[-1]
    end_ids = (EOS_ID, expected_end)
    expected = [greedy_by_hand(base, ids, max_new_tokens=24, end_ids=end_ids) for ids in prompts]
    found = generate_answers(
        base, prompts, max_new_tokens=24, end_ids=(expected_end,), rows_per_batch=4
    )
    assert found == expected
    assert any(answer.finished for answer in found)
    assert len({answer.text for answer in found}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_does_not_depend_on_its_batch(family):
    base = tiny_base(family)
    prompts = encoded(base)
    alone = generate_answers(base, prompts, max_new_tokens=20, rows_per_batch=1)
    for rows_per_batch in (2, 4, 100):
        together = generate_answers(base, prompts, max_new_tokens=20, rows_per_batch=rows_per_batch)
        assert together == alone
    assert generate_answers(base, prompts[::-1], max_new_tokens=20, rows_per_batch=3) == alone[::-1]


def test_the_token_limit_leaves_an_answer_unfinished():
    base = without_end(tiny_base("llama"))
    answers = generate_answers(base, encoded(base), max_new_tokens=7)
    assert [(answer.num_tokens, answer.finished) for answer in answers] == [(7, False)] * len(TEXTS)


def test_an_answer_ends_before_the_first_stop_text_and_its_neighbours_go_on():
    base = without_end(tiny_base("llama"))
    prompts = encoded(base)
    long = generate_answers(base, prompts, max_new_tokens=24)
    # Two characters that stand in the middle of one answer; which others hold them is seen below.
    stop = long[0].text[9:11]
    assert len(stop) == 2
    cut = generate_answers(base, prompts, max_new_tokens=24, stop=(stop, "no such text"))
    for whole, part in zip(long, cut, strict=True):
        if stop in whole.text:
            assert part.text == whole.text.split(stop)[0]
            assert part.finished
            assert part.num_tokens < whole.num_tokens or whole.text.endswith(stop)
        else:
            assert part == whole
    assert {answer.finished for answer in cut} == {True, False}


def test_a_stop_text_that_comes_with_the_last_token_still_finishes_the_answer():
    base = without_end(tiny_base("llama"))
    prompts = encoded(base, TEXTS[:1])
    (whole,) = generate_answers(base, prompts, max_new_tokens=10)
    stop = whole.text[-1]
    first = whole.text.index(stop)
    (cut,) = generate_answers(base, prompts, max_new_tokens=first + 1, stop=(stop,))
    assert (cut.text, cut.finished) == (whole.text[:first], True)


def test_shipped_sampling_settings_and_penalties_play_no_part_and_come_back():
    base = tiny_base("llama")
    prompts = encoded(base)
    plain = generate_answers(base, prompts, max_new_tokens=16)
    shipped = base.model.generation_config
    shipped.do_sample = True
    shipped.temperature = 3.0
    shipped.repetition_penalty = 5.0
    shipped.no_repeat_ngram_size = 1
    shipped.suppress_tokens = list(range(10, 60))
    shipped.min_new_tokens = 15
    shipped.max_new_tokens = 2
    assert generate_answers(base, prompts, max_new_tokens=16) == plain
    assert base.model.generation_config is shipped


def test_each_of_the_models_own_end_tokens_ends_an_answer():
    base = tiny_base("llama")
    prompts = encoded(base, TEXTS[:1])
    (whole,) = generate_answers(base, prompts, max_new_tokens=12)
    end = base.tokenizer(whole.text[4]).input_ids[-1]
    base.model.generation_config.eos_token_id = [EOS_ID, end]
    (cut,) = generate_answers(base, prompts, max_new_tokens=12)
    assert cut.finished
    assert cut.text == whole.text.split(whole.text[4])[0]


def test_a_model_in_training_mode_answers_without_dropout_and_stays_in_training_mode():
    base = tiny_base("llama")
    base.model.lm_head = nn.Sequential(nn.Dropout(0.5), base.model.lm_head)
    base.model.eval()
    prompts = encoded(base)
    expected = generate_answers(base, prompts, max_new_tokens=8)
    base.model.train()
    base.model.model.eval()
    assert generate_answers(base, prompts, max_new_tokens=8) == expected
    assert base.model.training
    assert base.model.lm_head[0].training
    assert not base.model.model.training


def test_a_gradient_checkpointed_base_without_cache_gives_the_same_answers():
    base = tiny_base("llama")
    prompts = encoded(base)
    expected = generate_answers(base, prompts, max_new_tokens=8)
    base.model.config.use_cache = False
    set_gradient_checkpointing(base.model, enabled=True)
    base.model.train()
    assert generate_answers(base, prompts, max_new_tokens=8) == expected


def test_no_prompts_have_no_answers():
    assert generate_answers(tiny_base("llama"), [], max_new_tokens=4) == []


def test_a_prompt_and_answer_longer_than_the_model_are_refused_with_what_would_fit():
    base = tiny_base("llama")
    with pytest.raises(EvaluationError, match=r"max_new_tokens=500 .* 20 tokens .* most 492"):
        check_room(base.model, [[5] * 20, [5]], max_new_tokens=500)
    check_room(base.model, [[5] * 20, [5]], max_new_tokens=492)
    with pytest.raises(EvaluationError, match=r"1515 tokens .* 512 positions; shorten the prompt"):
        check_room(base.model, [[5] * 1515], max_new_tokens=4)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(EvaluationError, match="prompt 1 has no token"):
        generate_answers(tiny_base("llama"), [[5], []], max_new_tokens=4)


def test_a_limit_of_no_tokens_is_refused():
    with pytest.raises(EvaluationError, match="max_new_tokens=0; give at least 1"):
        generate_answers(tiny_base("llama"), [[5]], max_new_tokens=0)
