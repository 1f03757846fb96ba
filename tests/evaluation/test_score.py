from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratune.errors import EvaluationError, ModelError
from loratune.evaluation.code_answers import CodeReference
from loratune.evaluation.generate import generate_answers
from loratune.evaluation.questions import TaskQuestions
from loratune.evaluation.sandbox import choosing
from loratune.evaluation.score import grade, score_task
from loratune.methods.adapter_files import AdapterFiles
from loratune.models.load import Base
from loratune.records import Answer
from tiny_models import tiny_model, tiny_tokenizer

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.5,
    "target_modules": ["q_proj", "v_proj"],
    "init_lora_weights": True,
    "inference_mode": True,
}
TEXTS = ("What is 2 + 3?", "A", "Two trains leave a station, one of them late.")


def tiny_base():
    model = tiny_model("llama").requires_grad_(False)
    return Base(model, tiny_tokenizer(), "tiny", "tiny", torch.device("cpu"))


def random_adapter(base, *, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in base.model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = scale * torch.randn(
                4, module.in_features, generator=generator
            )
            tensors[f"{key}.lora_B.weight"] = scale * torch.randn(
                module.out_features, 4, generator=generator
            )
    return AdapterFiles(config=CONFIG, tensors=tensors)


def tiny_questions(**changes):
    tokenizer = tiny_tokenizer()
    plain = TaskQuestions(
        task="gsm8k",
        version="1",
        split="test",
        grader="strict",
        prompts=TEXTS,
        prompt_ids=tuple(tuple(tokenizer(text).input_ids) for text in TEXTS),
        references=("5", None, "7"),
        max_new_tokens=12,
        stop=(),
    )
    return replace(plain, **changes)


def weights(base):
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def test_the_account_counts_each_verdict_and_names_how_it_came_about():
    answers = [
        Answer("#### 5", 3, True),
        Answer("#### 6", 3, True),
        Answer("#### 5", 12, False),
        Answer("and so", 12, False),
        Answer("no idea", 4, True),
        Answer("#### 5", 4, True),
    ]
    questions = tiny_questions(
        prompts=("a", "b", "c", "d", "e", "f"),
        prompt_ids=((1,),) * 6,
        references=("5", "5", "5", "5", "5", None),
    )
    score, predictions = grade(answers, questions)
    assert (score.correct, score.wrong, score.truncated, score.errors) == (2, 2, 1, 1)
    assert score.total == 6
    assert (score.task, score.task_version, score.grader) == ("gsm8k", "1", "strict")
    assert (score.split, score.decoding) == ("test", questions.decoding)
    assert [one.question_index for one in predictions] == list(range(6))
    assert [one.text for one in predictions] == [answer.text for answer in answers]
    assert [one.num_tokens for one in predictions] == [3, 3, 12, 12, 4, 4]
    assert [one.verdict for one in predictions] == [
        "correct",
        "wrong",
        "correct",
        "truncated",
        "wrong",
        "error",
    ]


ANSWERS = st.builds(
    Answer,
    text=st.sampled_from(["#### 5", "#### 6", "The answer is: 5", "The answer is: 17.6", "", "x"]),
    num_tokens=st.integers(1, 20),
    finished=st.booleans(),
)


@given(
    st.lists(st.tuples(ANSWERS, st.sampled_from(["5", "6", "18", None])), min_size=1),
    st.sampled_from(["strict", "pissa"]),
)
def test_every_question_is_in_exactly_one_count(pairs, grader):
    questions = tiny_questions(
        grader=grader,
        prompts=("q",) * len(pairs),
        prompt_ids=((1,),) * len(pairs),
        references=tuple(reference for _, reference in pairs),
    )
    score, predictions = grade([answer for answer, _ in pairs], questions)
    assert score.total == len(pairs) == len(predictions)
    assert score.errors == sum(reference is None for _, reference in pairs)


def test_answers_that_are_programs_are_judged_by_running_them():
    reference = CodeReference(
        prefix="def add(a, b):\n", tests="assert add(1, 2) == 3", names=("add",), setup=""
    ).to_text()
    answers = [
        Answer("    return a + b", 5, True),
        Answer("    return a - b", 5, True),
        Answer("    return a +", 12, False),
        Answer("    return a + b", 5, True),
    ]
    questions = tiny_questions(
        task="humaneval",
        grader="tests",
        prompts=("q",) * 4,
        prompt_ids=((1,),) * 4,
        references=(reference, reference, reference, None),
    )
    score, predictions = grade(answers, questions, unsafe_exec=True)
    assert (score.correct, score.wrong, score.truncated, score.errors) == (1, 1, 1, 1)
    assert [one.text for one in predictions] == [answer.text for answer in answers]
    assert [one.reason is None for one in predictions] == [True, False, False, False]
    assert predictions[1].reason is not None
    assert "AssertionError" in predictions[1].reason


def test_programs_are_not_run_where_they_cannot_be_isolated(monkeypatch):
    monkeypatch.setattr(choosing, "trials", lambda: ())
    with pytest.raises(EvaluationError, match="--unsafe-exec"):
        grade([Answer("", 0, True)], tiny_questions(grader="tests", references=("{}",)))


def test_the_plain_base_is_scored_on_what_it_generates():
    base = tiny_base()
    questions = tiny_questions()
    answers = generate_answers(base, questions.prompt_ids, max_new_tokens=12)
    score, predictions = score_task(base, None, questions)
    assert [one.text for one in predictions] == [answer.text for answer in answers]
    assert (score.total, score.errors) == (3, 1)


def test_an_adapter_answers_in_its_own_way_and_leaves_the_base_as_it_was():
    base = tiny_base()
    questions = tiny_questions()
    before = weights(base)
    _, plain = score_task(base, None, questions)
    torch.manual_seed(1)
    random_state = torch.random.get_rng_state()
    _, first = score_task(base, random_adapter(base, seed=1), questions)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    _, second = score_task(base, random_adapter(base, seed=2), questions)
    _, again = score_task(base, random_adapter(base, seed=1), questions)
    assert first == again
    assert len({plain, first, second}) == 3
    assert score_task(base, None, questions)[1] == plain
    after = weights(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_an_adapter_answers_as_a_base_with_its_product_merged_into_the_weights():
    base, merged = tiny_base(), tiny_base()
    adapter = random_adapter(base, scale=0.3)
    for name, module in merged.model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            key = f"base_model.model.{name}"
            product = (
                adapter.tensors[f"{key}.lora_B.weight"] @ adapter.tensors[f"{key}.lora_A.weight"]
            )
            module.weight.data += CONFIG["lora_alpha"] / CONFIG["r"] * product
    questions = tiny_questions()
    _, found = score_task(base, adapter, questions)
    assert found == score_task(merged, None, questions)[1]
    assert found != score_task(base, None, questions)[1]


def test_an_adapter_in_a_folder_answers_like_the_one_in_memory(tmp_path):
    base = tiny_base()
    adapter = random_adapter(base)
    adapter.save(tmp_path / "adapter")
    questions = tiny_questions()
    assert score_task(base, tmp_path / "adapter", questions) == score_task(base, adapter, questions)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        score_task(tiny_base(), tmp_path, tiny_questions())


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "target"])
def test_an_adapter_of_another_model_is_refused_and_the_base_left_as_it_was(change):
    base = tiny_base()
    questions = tiny_questions()
    _, plain = score_task(base, None, questions)
    adapter = random_adapter(base)
    config, tensors = dict(adapter.config), dict(adapter.tensors)
    key = next(iter(tensors))
    if change == "missing":
        del tensors[key]
    elif change == "extra":
        tensors[key.replace("q_proj", "k_proj")] = tensors[key]
    elif change == "shape":
        tensors[key] = tensors[key][:, :-1]
    else:
        config["target_modules"] = ["c_attn"]
    with pytest.raises(ModelError, match="does not fit this base"):
        score_task(base, AdapterFiles(config=config, tensors=tensors), questions)
    assert score_task(base, None, questions)[1] == plain


def test_a_failure_while_answering_leaves_the_base_without_adapter():
    base = tiny_base()
    questions = tiny_questions()
    _, plain = score_task(base, None, questions)
    with pytest.raises(EvaluationError, match="exceed the model's 512 positions"):
        score_task(base, random_adapter(base), replace(questions, max_new_tokens=600))
    assert score_task(base, None, questions)[1] == plain


def test_a_task_without_questions_has_no_score():
    empty = tiny_questions(prompts=(), prompt_ids=(), references=())
    with pytest.raises(EvaluationError, match="task gsm8k has no questions"):
        score_task(tiny_base(), None, empty)
