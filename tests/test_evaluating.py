"""`evaluate` and `score` on a tiny model: parity with lm-evaluation-harness, resume, re-grading."""

import importlib
import json
import random
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loratune import api, cli
from loratune.engine.decoding import Decoder
from loratune.errors import EvaluationError, LoratuneError, ModelError
from loratune.evaluating import _attached
from loratune.evaluation import answering
from loratune.evaluation.code_answers import CodeReference
from loratune.evaluation.tasks import task
from loratune.methods.adapter_files import AdapterFiles, read_adapter
from loratune.models.load import load_base
from loratune.records import NotScored, Prediction, QuestionSet, Score, Scored
from loratune.store.database import open_store
from tiny_models import save_tiny
from tiny_studies import study_by_heart

GSM8K = [
    {"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"}
    for n in range(1, 13)
]
WORDS = ("a", "to", "red", "wood", "apple", "seven", "train", "station", "because", "mornings")
DRAW = random.Random(3)
PIQA = [
    {
        "goal": f"Which {n}?",
        "sol1": " ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 5))),
        "sol2": " ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 5))),
        "label": n % 2,
    }
    for n in range(24)
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """A results folder with two adapters, each scored on GSM8K's format."""
    folder = tmp_path_factory.mktemp("trained")
    questions = write(folder / "test.jsonl", GSM8K)
    # Answers learned by heart, some of which will be right.
    rows = write(
        folder / "train.jsonl",
        [{"q": row["question"], "a": row["answer"].partition("\n")[2]} for row in GSM8K],
    )
    tasks = f"[{{name: gsm8k, data: {questions}, max_new_tokens: 8}}]"
    study_by_heart(
        folder,
        model=model,
        rows=rows,
        rates="[1e-2, 2e-2]",
        seeds=1,
        more=f"evaluate: {{tasks: {tasks}, when: all}}",
    )
    api.run(api.load_study(folder / "study.yaml"), out=folder / "out", device="cpu", quiet=True)
    shutil.copytree(folder / "out", folder / "copy")
    return folder / "out"


def adapters(trained: Path) -> list[Path]:
    return sorted((trained / "adapters").iterdir())


def test_an_adapters_own_base_is_used_and_the_account_is_whole(tmp_path, trained, model):
    questions = write(tmp_path / "test.jsonl", GSM8K)
    (one,) = api.evaluate(
        adapters(trained)[0], tasks=["gsm8k"], data=questions, max_new_tokens=6, device="cpu"
    )
    assert one.model == model
    assert one.adapter == str(adapters(trained)[0])
    assert one.score.total == len(GSM8K)
    assert 0 <= one.low <= one.score.accuracy <= one.high <= 1
    (bare,) = api.evaluate(
        model, tasks=["gsm8k"], data=questions, max_new_tokens=6, device="cpu", questions=5
    )
    assert (bare.adapter, bare.score.total) == (None, 5)


def test_an_adapter_on_the_hub_is_scored_as_its_folder_is(tmp_path, trained, monkeypatch):
    folder = adapters(trained)[0]

    def from_cache(repo_id: str, **_: Any) -> str:
        assert repo_id == "someone/adapter"
        return str(folder)

    asked: dict[str, Any] = {
        "tasks": ["gsm8k"],
        "data": write(tmp_path / "test.jsonl", GSM8K),
        "max_new_tokens": 4,
        "device": "cpu",
    }
    (local,) = api.evaluate(folder, **asked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", from_cache)
    (one,) = api.evaluate("someone/adapter", **asked)
    assert (one.model, one.adapter, one.score) == (local.model, "someone/adapter", local.score)


def test_kept_answers_are_gone_on_with_and_another_adapter_has_its_own(
    tmp_path, trained, monkeypatch
):
    questions = write(tmp_path / "test.jsonl", GSM8K)
    file = tmp_path / "answers.jsonl"
    asked: dict[str, Any] = {
        "tasks": ["gsm8k"],
        "data": questions,
        "max_new_tokens": 6,
        "device": "cpu",
        "answers": file,
    }
    first = api.evaluate(adapters(trained)[0], **asked)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == len(GSM8K)
    # Killed while it wrote: half a line, and the last questions missing.
    file.write_text("".join(lines[:7]) + lines[7][:20])
    counted = list[int]()
    real = Decoder.answers

    def counting(decoder: Decoder, requests: Any) -> Any:
        counted.append(len(requests))
        return real(decoder, requests)

    monkeypatch.setattr(Decoder, "answers", counting)
    assert api.evaluate(adapters(trained)[0], **asked) == first
    assert counted == [len(GSM8K) - 7]
    assert sorted(file.read_text().splitlines()) == sorted(line.strip() for line in lines)
    counted.clear()
    api.evaluate(adapters(trained)[0], **asked, grader="pissa")  # No model is asked.
    assert counted == []
    api.evaluate(adapters(trained)[1], **asked)
    assert counted == [len(GSM8K)]


@pytest.mark.parametrize("changed", ["lora_alpha", "base", "precision"])
def test_kept_answers_of_the_same_weights_in_another_setting_are_not_taken(
    tmp_path, trained, model, changed
):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(adapters(trained)[0], adapter)
    shutil.copytree(model, base)
    asked: dict[str, Any] = {
        "tasks": ["gsm8k"],
        "data": write(tmp_path / "test.jsonl", GSM8K),
        "max_new_tokens": 2,
        "device": "cpu",
        "model": str(base),
        "answers": tmp_path / "answers.jsonl",
        "engine": "reference",
    }
    api.evaluate(adapter, **asked)
    kept = (tmp_path / "answers.jsonl").read_text()
    api.evaluate(adapter, **asked)
    assert (tmp_path / "answers.jsonl").read_text() == kept
    if changed == "lora_alpha":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 80}))
    elif changed == "base":  # Trained on in the same folder.
        tensors = load_file(base / "model.safetensors")
        changed_tensors = {name: tensor * 1.5 for name, tensor in tensors.items()}
        save_file(changed_tensors, base / "model.safetensors", metadata={"format": "pt"})
    else:
        asked["precision"] = "bfloat16"
    api.evaluate(adapter, **asked)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2 * len(GSM8K)


def test_what_is_no_adapter_model_or_file_of_answers_is_refused(tmp_path, trained, model):
    with pytest.raises(EvaluationError, match="are its study's"):
        api.evaluate(trained, tasks=["gsm8k"], prompt="{prompt}", device="cpu")
    with pytest.raises(EvaluationError, match="is a results folder"):
        api.evaluate_by_harness(trained, tasks=["gsm8k"], device="cpu")
    with pytest.raises(EvaluationError, match="no task is named"):
        api.evaluate(model, tasks=[], device="cpu")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base; give --model"):
        api.evaluate(tmp_path, tasks=["demo"], device="cpu")
    other = tmp_path / "notes.jsonl"
    other.write_text("hello\n")
    with pytest.raises(EvaluationError, match="line 1: no answer of"):
        api.evaluate(
            model, tasks=["demo"], questions=2, max_new_tokens=4, device="cpu", answers=other
        )


def test_kept_answers_are_graded_anew_without_a_model_and_old_scores_stay(
    tmp_path, trained, monkeypatch, capsys
):
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("loratune.models.load.load_base", no_model)
    with open_store(trained / "loratune.db", create=False) as store:
        before = store.all_scores("by_heart")
    made = api.score(trained, grader="pissa")
    assert len(made) == 2
    assert all(one.after.total == len(GSM8K) for one in made)
    assert {one.after.grader for one in made} == {"pissa"}
    assert all(one.after.decoding == one.before.decoding for one in made)
    with open_store(trained / "loratune.db", create=False) as store:
        assert store.all_scores("by_heart")[: len(before)] == before
        assert len(store.all_scores("by_heart")) == len(before) + 2
    assert api.score(trained, grader="pissa") == ()  # They stand.
    # The study's own choice is shown as before.
    assert set(api.results(trained)["gsm8k_total"]) == {len(GSM8K)}
    monkeypatch.setattr("sys.argv", ["loratune", "score", str(trained), "--grader", "pissa"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert "0 scores added" in capsys.readouterr().err


def test_a_study_with_another_grader_is_scored_by_the_answers_of_adapters_that_were_not_kept(
    tmp_path, model, monkeypatch
):
    questions = write(tmp_path / "test.jsonl", GSM8K[:6])
    rows = write(tmp_path / "train.jsonl", [{"q": one, "a": one} for one in WORDS])
    task = f"{{name: gsm8k, data: {questions}, max_new_tokens: 4}}"
    file = study_by_heart(
        tmp_path,
        model=model,
        rows=rows,
        rates="[1e-2]",
        seeds=2,
        more=f"evaluate: {{tasks: [{task}], when: all}}",
    )
    text = file.read_text().replace("keep_adapters: all", "keep_adapters: none")
    text = text.replace("epochs: 60", "epochs: 1")
    file.write_text(text)
    first = api.run(api.load_study(file), out=tmp_path / "out", device="cpu", quiet=True)
    assert not [*(tmp_path / "out" / "adapters").iterdir()]
    file.write_text(text.replace("name: gsm8k", "name: gsm8k, grader: pissa"))
    for name in ("answer_questions", "Decoder"):
        monkeypatch.setattr(answering, name, no_one)
    again = api.run(api.load_study(file), out=tmp_path / "out", device="cpu", quiet=True)
    assert (first.num_not_scored, again.num_not_scored) == (0, 0)
    for result in again.results:
        assert [(one.grader, one.total) for one in result.scores] == [("pissa", 6)]
    assert set(api.results(tmp_path / "out")["gsm8k_total"]) == {6}
    # Other answers are not had from these.
    file.write_text(text.replace("max_new_tokens: 4", "max_new_tokens: 5"))
    other = api.run(api.load_study(file), out=tmp_path / "out", device="cpu", quiet=True)
    assert other.num_not_scored == 2


def no_one(*_: object, **__: object) -> None:
    raise AssertionError("an adapter was asked")


@pytest.fixture
def six_asked(tmp_path: Path, trained: Path) -> tuple[Path, dict[str, Any]]:
    """A results folder of one's own, and six questions for `api.evaluate`."""
    folder = tmp_path / "copy"
    shutil.copytree(trained.parent / "copy", folder)
    return folder, {
        "tasks": ["gsm8k"],
        "data": write(tmp_path / "six.jsonl", GSM8K[:6]),
        "max_new_tokens": 8,
        "device": "cpu",
    }


def test_a_results_folders_adapters_are_scored_into_its_store_once(six_asked):
    folder, asked = six_asked
    found = api.evaluate(folder, **asked)
    assert [one.score.total for one in found] == [6, 6]
    with open_store(folder / "loratune.db", create=False) as store:
        count = len(store.all_scores("by_heart"))
        (record, *_) = [one for one in store.all_scores("by_heart") if one.score.total == 6]
        assert len(store.predictions(record.score_id)) == 6
    assert api.evaluate(folder, **asked) == found
    with open_store(folder / "loratune.db", create=False) as store:
        assert len(store.all_scores("by_heart")) == count


def test_another_grader_judges_the_answers_that_a_score_keeps_and_asks_nothing(
    six_asked, monkeypatch
):
    folder, asked = six_asked
    found = api.evaluate(folder, **asked)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was asked")

    monkeypatch.setattr("loratune.evaluation.answering.Decoder", never)
    monkeypatch.setattr("loratune.evaluation.answering.answer_questions", never)
    anew = api.evaluate(folder, **asked, grader="pissa")
    assert [one.score.total for one in anew] == [6, 6]
    assert [one.score.decoding for one in anew] == [one.score.decoding for one in found]
    texts = dict[tuple[str, str], list[str]]()
    with open_store(folder / "loratune.db", create=False) as store:
        for one in store.all_scores("by_heart"):
            if one.score.total == 6:
                said = [answer.text for answer in store.predictions(one.score_id)]
                texts[one.trial_id, one.score.grader] = said
    assert len(texts) == 4
    assert all(said == texts[trial, "strict"] for (trial, _), said in texts.items())
    with pytest.raises(AssertionError, match="a model was asked"):
        api.evaluate(folder, **{**asked, "max_new_tokens": 7}, grader="pissa")


def test_grading_anew_needs_neither_the_questions_data_nor_a_model(tmp_path, trained):
    folder = tmp_path / "copy"
    shutil.copytree(trained.parent / "copy", folder)
    questions = trained.parent / "test.jsonl"
    hidden = questions.rename(questions.with_suffix(".hidden"))
    try:
        made = api.score(folder, grader="pissa")
    finally:
        hidden.rename(questions)
    assert [one.after.total for one in made] == [len(GSM8K)] * 2
    # The same answers judged by the same numbers: `pissa` finds no marker in any of them.
    assert [one.after.correct for one in made] == [0, 0]
    assert all(one.before.total == one.after.total for one in made)


def test_a_task_of_ones_own_is_graded_anew_from_the_store_alone(tmp_path, trained):
    folder, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    shutil.copytree(trained.parent / "copy", folder)
    elsewhere.mkdir()
    write(elsewhere / "sums.jsonl", [{"q": f"{n} + {n}", "a": 2 * n} for n in range(4)])
    file = elsewhere / "sums.yaml"
    file.write_text(
        "task: sums\ndata: sums.jsonl\nprompt: q\nreference: a\ngrader: strict\n"
        "max_new_tokens: 4\n",
        encoding="utf-8",
    )
    asked = api.evaluate(folder, tasks=[str(file)], device="cpu")
    shutil.rmtree(elsewhere)
    made = api.score(folder, grader="pissa", tasks=["sums"])
    assert [one.after.total for one in made] == [4, 4]
    assert {one.after.task_version for one in made} == {one.score.task_version for one in asked}
    assert api.score(folder, grader="pissa", tasks=["sums"]) == ()


def test_what_an_older_grader_or_a_broken_sandbox_judged_is_judged_anew(tmp_path, trained):
    folder = tmp_path / "copy"
    shutil.copytree(trained.parent / "copy", folder)
    with closing(sqlite3.connect(folder / "loratune.db")) as connection, connection:
        for table in ("scores", "question_sets"):
            connection.execute(f"UPDATE {table} SET task_version = '0'")
    made = api.score(folder, grader="strict")
    assert [(one.before.task_version, one.after.task_version) for one in made] == [
        ("0", task("gsm8k").version)
    ] * 2
    assert [one.after.correct for one in made] == [one.before.correct for one in made]

    reference = CodeReference(prefix="", tests="assert f() == 1", names=("f",), setup="").to_text()
    with open_store(folder / "loratune.db", create=False) as store:
        (first, *_) = store.all_scores("by_heart")
        definition = task("mbpp")
        asked = QuestionSet("mbpp", definition.version, "greedy", "test", references=(reference,))
        failed = Prediction(0, "```python\ndef f(): return 1\n```", 9, "error", True, "no space")
        score = Score("mbpp", definition.version, "tests", "greedy", "test", 0, 0, 0, 1)
        store.add_score(first.trial_id, score, [failed], questions=asked)
    (one,) = api.score(folder, grader="tests", unsafe_exec=True)
    assert (one.before.errors, one.after.errors, one.after.correct) == (1, 0, 1)
    assert api.score(folder, grader="tests", unsafe_exec=True) == ()


def test_scores_without_their_questions_are_graded_by_the_tasks_data_where_it_is_the_same(
    tmp_path, trained
):
    """As older versions left them."""
    folder = tmp_path / "copy"
    shutil.copytree(trained.parent / "copy", folder)
    with closing(sqlite3.connect(folder / "loratune.db")) as connection, connection:
        connection.execute("DELETE FROM question_sets")
    other = write(
        tmp_path / "other.jsonl", [*GSM8K[:-1], {"question": "Another?", "answer": "#### 1"}]
    )
    with pytest.raises(EvaluationError, match="not those that were asked"):
        api.score(folder, grader="pissa", data={"gsm8k": other})
    assert len(api.score(folder, grader="pissa")) == 2


def test_an_account_counts_answers_by_verdict_and_reason(tmp_path, trained, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(trained.parent / "copy", folder)
    with open_store(folder / "loratune.db", create=False) as store:
        (first, *_) = store.all_scores("by_heart")
        said = [
            Prediction(0, "x", 1, "wrong", True, "NameError: name 'x' is not defined"),
            Prediction(1, "y", 1, "wrong", True, "NameError: name 'y' is not defined"),
            Prediction(2, "z", 1, "error", True, "the sandbox did not start: no space"),
            Prediction(3, "4", 1, "correct", True),
        ]
        score = Score("humaneval", "1", "tests", "greedy", "test", 1, 2, 0, 1)
        store.add_score(first.trial_id, score, said)
    account = api.accounts(folder)[-1]
    assert account.score == score
    assert account.reasons == (("wrong", "NameError", 2), ("error", "the sandbox did not start", 1))
    monkeypatch.setattr("sys.argv", ["loratune", "score", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "humaneval: 1 right, 2 wrong, 0 truncated, 1 errors of 4; grader tests" in printed
    assert "  2 wrong: NameError\n  1 error: the sandbox did not start\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grader": "strict", "tasks": ["svamp"]}, "none of the study's test tasks"),
        ({"grader": "plain", "tasks": ["gsm8k"]}, "grader plain judges none of the answers to gsm"),
        ({"grader": "tests"}, "judges none of the answers to gsm8k; choose strict or pissa for gs"),
        ({"grader": "pissa", "data": {"zzz": "c.jsonl"}}, "task 'zzz' is none of the study's"),
        ({"grader": "pissa", "data": {"gsm8k": ""}}, "data of task gsm8k is ''; give a file"),
    ],
)
def test_what_cannot_be_graded_anew_is_refused(trained, options, message):
    with pytest.raises(EvaluationError, match=message):
        api.score(trained.parent / "copy", **options)


# What PEFT, datasets and the harness warn of is theirs.
@pytest.mark.filterwarnings("default")
def test_lm_evaluation_harness_gives_the_same_scores(tmp_path, trained, model):
    """Its own Hugging Face model, the same prompts: greedy answers, and acc and acc_norm."""
    harness: Any = importlib.import_module("lm_eval")
    models: Any = importlib.import_module("lm_eval.models.huggingface")
    manager: Any = importlib.import_module("lm_eval.tasks").TaskManager

    questions, choices = write(tmp_path / "g.jsonl", GSM8K), write(tmp_path / "p.jsonl", PIQA)
    for name, file, body in (
        (
            "ours_gsm8k",
            questions,
            """\
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer.split('#### ')[-1]}}"
generation_kwargs: {until: ["\\n\\n"], do_sample: false, max_gen_toks: 8}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "#### (\\\\-?[0-9]+)"}, {function: take_first}]
metric_list: [{metric: exact_match}]
""",
        ),
        (
            "ours_piqa",
            choices,
            """\
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
        ),
    ):
        (tmp_path / f"{name}.yaml").write_text(
            f"""\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
num_fewshot: 0
{body}""",
            encoding="utf-8",
        )
    seen = set[float]()
    for adapter in adapters(trained):
        theirs: Any = harness.simple_evaluate(
            model=models.HFLM(
                pretrained=model, peft=str(adapter), device="cpu", dtype="float32", batch_size=4
            ),
            tasks=["ours_gsm8k", "ours_piqa"],
            task_manager=manager(include_path=str(tmp_path), include_defaults=False),
        )
        found = theirs["results"]
        ours: dict[str, float] = {}
        (gsm8k,) = api.evaluate(
            adapter, tasks=["gsm8k"], data=questions, max_new_tokens=8, device="cpu"
        )
        ours["gsm8k"] = gsm8k.score.accuracy
        for grader in ("plain", "normalised"):
            (piqa,) = api.evaluate(
                adapter,
                tasks=["piqa"],
                data=choices,
                grader=grader,  # type: ignore[arg-type]
                device="cpu",
            )
            ours[grader] = piqa.score.accuracy
        assert ours == pytest.approx(
            {
                "gsm8k": found["ours_gsm8k"]["exact_match,strict"],
                "plain": found["ours_piqa"]["acc,none"],
                "normalised": found["ours_piqa"]["acc_norm,none"],
            }
        )
        # The bridge: its tasks, asked of our base and adapter.
        bridged = api.evaluate_by_harness(
            adapter, tasks=["ours_gsm8k", "ours_piqa"], include_path=tmp_path, device="cpu"
        )
        for name, metrics in bridged.items():
            assert metrics == found[name]  # with the standard errors
            errors = [value for metric, value in metrics.items() if "_stderr," in metric]
            assert errors
            assert all(isinstance(value, float) and value > 0 for value in errors)
        assert ours["plain"] != ours["normalised"]
        seen |= set(ours.values())
    # Neither all right nor all wrong, so that equal scores say something.
    assert not seen & {0.0, 1.0}


@pytest.fixture(scope="module")
def both_models(model: str) -> tuple[Any, Any, Any]:
    """The harness's own Hugging Face model, ours, and what makes a request of its kind."""
    models: Any = importlib.import_module("lm_eval.models.huggingface")
    instance: Any = importlib.import_module("lm_eval.api.instance").Instance
    ours: Any = importlib.import_module("loratune.evaluation.harness").HarnessModel
    theirs = models.HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=2)
    return theirs, ours(load_base(model, precision="float32", device="cpu")), instance


def texts(*lengths: int) -> list[str]:
    draw = random.Random(5)
    return [" ".join(draw.choices(WORDS, k=n))[:n] for n in lengths]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("begin", ["", "<s>"])
def test_whole_texts_are_as_likely_as_to_the_harness_own_model(both_models, begin):
    """The tokenizer adds a BOS; a token a character, 512 positions, so that windows roll."""
    theirs, ours, instance = both_models
    assert theirs.max_length == ours.max_length == 512
    asked = [
        instance("loglikelihood_rolling", {}, (begin + text,), index)
        for index, text in enumerate(texts(3, 510, 511, 512, 513, 1300))
    ]
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    found = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)  # float32, batches of other sizes


@pytest.mark.filterwarnings("default")
def test_what_is_too_long_loses_its_first_tokens_as_in_the_harness_own_model(both_models, caplog):
    theirs, ours, instance = both_models
    contexts = texts(20, 505, 507, 508, 900)
    asked = [
        instance("loglikelihood", {}, (text, " seven"), index)
        for index, text in enumerate(contexts)
    ]
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([one for one, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert "of 5 texts are longer than the 513 tokens" in caplog.text
    options = {"until": ["\n"], "do_sample": False, "max_gen_toks": 9}
    asked = [
        instance("generate_until", {}, (text, options), index)
        for index, text in enumerate(contexts)
    ]
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, disable_tqdm=True) == expected
    assert "of 5 texts are longer than the 503 tokens" in caplog.text


@pytest.mark.filterwarnings("default")
def test_what_cannot_be_cut_to_fit_is_refused_without_a_number_below_one(both_models):
    _, ours, instance = both_models
    options = {"until": ["\n"], "max_gen_toks": 512}
    task = {"metadata": ("long", 0, 1)}
    asked = [instance("generate_until", {}, ("a", options), 0, **task)]
    with pytest.raises(EvaluationError, match=r"task long .* up to 512 .* no room") as raised:
        ours.generate_until(asked)
    assert "-" not in str(raised.value).replace("lm-", "")
    asked = [instance("loglikelihood", {}, ("a", texts(600)[0]), 0)]
    with pytest.raises(EvaluationError, match="continuation of 600 tokens exceeds the model's 512"):
        ours.loglikelihood(asked)


@pytest.mark.filterwarnings("default")
def test_the_limit_of_an_answer_has_the_names_that_the_harness_own_model_knows(both_models):
    theirs, ours, instance = both_models
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    for number, name in enumerate(names, start=3):
        # With a temperature that counts for nothing, and settings at which nothing changes.
        options = {"until": "\n\n", "do_sample": False, "temperature": 0.5, name: number}
        neutral = {"top_p": 0.9, "num_beams": 1, "length_penalty": 2.0, "repetition_penalty": 1.0}
        asked = [
            instance("generate_until", {}, (text, options | neutral), index)
            for index, text in enumerate(texts(20, 45))
        ]
        expected = theirs.generate_until(asked, disable_tqdm=True)
        assert ours.generate_until(asked) == expected
        assert max(map(len, expected)) == number  # a token a character, a first space left out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"temperature": 0.7}, "task odd samples"),
        ({"do_sample": True}, "task odd samples"),
        ({"num_beams": 4}, "task odd asks for num_beams"),
        ({"repetition_penalty": 1.2, "max_length": 9}, "for repetition_penalty, max_length in"),
        ({"max_gen_toks": "many"}, "task odd: generation_kwargs .* cannot be read"),
        ({"temperature": None}, "task odd: generation_kwargs .* cannot be read"),
    ],
)
def test_a_task_that_greedy_decoding_does_not_answer_is_refused(both_models, given, told):
    _, ours, instance = both_models
    options = {"until": ["\n"], **given}
    asked = [instance("generate_until", {}, ("a", options), 0, metadata=("odd", 0, 1))]
    with pytest.raises(EvaluationError, match=told):
        ours.generate_until(asked)


@pytest.fixture
def not_finite(tmp_path: Path, trained: Path) -> Path:
    """An adapter with one weight that is NaN."""
    files = read_adapter(adapters(trained)[0])
    tensors = {name: one.clone() for name, one in files.tensors.items()}
    next(iter(tensors.values()))[0, 0] = float("nan")
    AdapterFiles(files.config, tensors).save(tmp_path / "broken")
    return tmp_path / "broken"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["generate_until", "multiple_choice"])
def test_the_harness_gives_an_adapter_that_is_not_finite_no_score(tmp_path, not_finite, kind):
    rows = write(tmp_path / "p.jsonl", PIQA)
    body = {
        "generate_until": "doc_to_target: sol1\n"
        "generation_kwargs: {until: ['x'], max_gen_toks: 2}\n"
        "metric_list: [{metric: exact_match}]\n",
        "multiple_choice": 'doc_to_target: label\ndoc_to_choice: "{{[sol1, sol2]}}"\n'
        "metric_list: [{metric: acc}]\n",
    }[kind]
    (tmp_path / "odd.yaml").write_text(
        "task: odd\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        f"output_type: {kind}\ndoc_to_text: goal\n{body}",
        encoding="utf-8",
    )
    with pytest.raises(EvaluationError, match=f"{not_finite} has no score .* not finite"):
        api.evaluate_by_harness(not_finite, tasks=["odd"], include_path=tmp_path, device="cpu")


@pytest.mark.filterwarnings("default")
def test_gsm8k_as_the_harness_defines_it_is_answered_the_same(tmp_path, trained, model):
    """Its own prompt, worked examples, stop strings, filters and metrics, on questions of ours."""
    harness: Any = importlib.import_module("lm_eval")
    models: Any = importlib.import_module("lm_eval.models.huggingface")
    manager: Any = importlib.import_module("lm_eval.tasks").TaskManager
    ours: Any = importlib.import_module("loratune.evaluation.harness").HarnessModel
    definition = Path(harness.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    rows = write(tmp_path / "rows.jsonl", GSM8K)
    (tmp_path / "gsm8k_here.yaml").write_text(
        f"include: {definition}\ntask: gsm8k_here\ntag: null\n"
        "dataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{train: {rows}, test: {rows}}}}}\n",
        encoding="utf-8",
    )
    adapter = str(adapters(trained)[0])
    found = list[Any]()
    with _attached(model, Path(adapter), "float32", "cpu", False) as base:
        for one in (
            models.HFLM(
                pretrained=model, peft=adapter, device="cpu", dtype="float32", batch_size=4
            ),
            ours(base),
        ):
            results = harness.simple_evaluate(
                model=one,
                tasks=["gsm8k_here"],
                task_manager=manager(include_path=str(tmp_path), include_defaults=False),
            )
            found.append(results)
    for part in ("results", "configs"):
        theirs, bridged = (one[part]["gsm8k_here"] for one in found)
        assert theirs == bridged
    theirs, bridged = (one["samples"]["gsm8k_here"] for one in found)
    assert len(theirs) == 2 * len(GSM8K)  # two filters
    assert [one["resps"] for one in theirs] == [one["resps"] for one in bridged]
    assert len({str(one["resps"]) for one in theirs}) > 1


def test_the_harness_has_no_such_task_and_a_task_that_samples_is_refused(tmp_path, model):
    with pytest.raises(EvaluationError, match="is none of lm-evaluation-harness's"):
        api.evaluate_by_harness(model, tasks=["no_such_task"], device="cpu")
    (tmp_path / "sampled.yaml").write_text(
        f"""\
task: sampled
dataset_path: json
dataset_kwargs: {{data_files: {{test: {write(tmp_path / "g.jsonl", GSM8K)}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], do_sample: true, temperature: 0.7}}
metric_list: [{{metric: exact_match}}]
""",
        encoding="utf-8",
    )
    with pytest.raises(EvaluationError, match="task sampled samples"):
        api.evaluate_by_harness(model, tasks=["sampled"], include_path=tmp_path, device="cpu")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", ","], "no task is named"),
        (["--tasks", "gone", "--include-path", "{tmp}/none"], "none is no folder"),
        (["--tasks", "gone", "--include-path", "{tmp}"], "cannot load task gone: .*gone.jsonl"),
        (["--tasks", "bare", "--include-path", "{tmp}", "--chat"], "cannot run bare: .*template"),
    ],
)
def test_what_the_harness_cannot_do_is_said_in_a_line(
    tmp_path, model, monkeypatch, capsys, arguments, message
):
    there = write(tmp_path / "there.jsonl", GSM8K)
    for name, data in (("gone", tmp_path / "gone.jsonl"), ("bare", there)):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
            "generation_kwargs: {until: ['x'], max_gen_toks: 2}\n"
            "metric_list: [{metric: exact_match}]\n",
            encoding="utf-8",
        )
    given = [one.replace("{tmp}", str(tmp_path)) for one in arguments]
    asked = ["evaluate", str(model), "--harness", "lm-eval", "--device", "cpu", *given]
    monkeypatch.setattr("sys.argv", ["loratune", *asked])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(message, told)
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "no field"], "prompt 'no field': expected a text with {prompt}"),
        (["--prompt", "{prompt"], "prompt '{prompt': expected a text with {prompt}"),
        (["--data", ""], "data='': "),
        (["--answers", "{tmp}/none/a.jsonl"], "answers cannot be kept in .*No such file"),
        (["--answers", "{tmp}"], "answers cannot be kept in .*Is a directory"),
        (["--answers", "{tmp}/latin.jsonl"], "line 1: no answer of `loratune evaluate`"),
        (["--answers", "{tmp}/notes.txt"], "line 1: no answer of `loratune evaluate`"),
    ],
)
def test_what_evaluate_cannot_do_is_said_in_a_line(
    tmp_path, model, monkeypatch, capsys, arguments, message
):
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\n")
    (tmp_path / "notes.txt").write_text("precious, and without a new line")
    given = [one.replace("{tmp}", str(tmp_path)) for one in arguments]
    asked = ["evaluate", str(model), "--task", "gsm8k", "--device", "cpu"]
    if "--data" not in given:
        asked += ["--data", str(write(tmp_path / "g.jsonl", GSM8K))]
    monkeypatch.setattr("sys.argv", ["loratune", *asked, *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert "Traceback" not in told
    assert (tmp_path / "notes.txt").read_text() == "precious, and without a new line"


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"questions": 0}, {"grader": "x"}])
def test_wrong_arguments_are_loratunes_own_errors(model, values):
    with pytest.raises(EvaluationError, match=next(iter(values))):
        api.evaluate(model, tasks=["gsm8k"], **values)


def test_what_one_task_has_no_room_for_is_said_before_any_is_asked(tmp_path, model, monkeypatch):
    def no_answers(*_: object, **__: object) -> None:
        raise AssertionError("a task was asked")

    monkeypatch.setattr("loratune.evaluating.answer_all", no_answers)
    write(tmp_path / "long.jsonl", [{"q": "short", "a": "1"}, {"q": "x" * 600, "a": "2"}])
    for name, rest in (
        ("long", "grader: exact\nmax_new_tokens: 5\n"),
        ("chosen", "grader: plain\nchoices: c\n"),
    ):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndata: {name}.jsonl\nprompt: q\nreference: a\n{rest}"
        )
    write(tmp_path / "chosen.jsonl", [{"q": "a", "a": "x" * 600, "c": ["b", "x" * 600]}])
    long, chosen = str(tmp_path / "long.yaml"), str(tmp_path / "chosen.yaml")
    with pytest.raises(EvaluationError, match="task long, question 2: the prompt has 601 tokens a"):
        api.evaluate(model, tasks=["demo", long], questions=2, device="cpu")
    with pytest.raises(EvaluationError, match=r"task chosen, question 1: .*the longest choice up"):
        api.evaluate(model, tasks=["demo", chosen], questions=1, device="cpu")
    with pytest.raises(EvaluationError, match="task demo is named twice"):
        api.evaluate(model, tasks=["demo", "demo"], device="cpu")


def test_scores_that_there_are_come_with_the_failure_of_another(
    tmp_path, model, monkeypatch, capsys
):
    def one_fails(*_: object, **__: object) -> Any:
        yield Scored(0, Score("demo", "1", "strict", "greedy", "test", 1, 1, 0, 0), ())
        yield NotScored(1, "no reason")

    monkeypatch.setattr("loratune.evaluating.answer_all", one_fails)
    questions = write(tmp_path / "sums.jsonl", [{"q": "1 + 1", "a": "2"}])
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndata: {questions}\nprompt: q\nreference: a\ngrader: number\n"
    )
    asked = ["evaluate", str(model), "--task", "demo", "--task", str(tmp_path / "sums.yaml")]
    asked += ["--questions", "1", "--max-new-tokens", "4", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["loratune", *asked])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "demo: 50.0%" in printed.out
    assert "can't be scored on sums: no reason" in printed.err


def test_paths_for_a_results_folder_start_at_the_working_folder(tmp_path, trained, monkeypatch):
    folder = without_scores(trained, tmp_path / "out")
    write(tmp_path / "g.jsonl", GSM8K[:2])
    (tmp_path / "own.yaml").write_text(
        "task: own\ndata: g.jsonl\nprompt: question\nreference: answer\ngrader: exact\n"
        "max_new_tokens: 2\n"
    )
    monkeypatch.chdir(tmp_path)
    both: tuple[dict[str, Any], ...] = (
        {"tasks": ["own.yaml"]},
        {"tasks": ["gsm8k"], "data": "g.jsonl"},
    )
    for named in both:
        found = api.evaluate(folder, **named, max_new_tokens=2, device="cpu")
        assert [one.score.total for one in found] == [2, 2]


def test_a_study_whose_task_does_not_fit_is_refused_before_training(
    tmp_path, trained, monkeypatch, capsys
):
    text = (trained.parent / "study.yaml").read_text()
    assert "max_new_tokens: 8" in text
    (tmp_path / "study.yaml").write_text(text.replace("max_new_tokens: 8", "max_new_tokens: 4000"))
    asked = ["run", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["loratune", *asked, "--device", "cpu", "--quiet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "task gsm8k, question 1: the prompt has" in told
    assert "choose max_new_tokens of at most" in told


def test_the_harness_standard_errors_are_printed(monkeypatch, capsys):
    metrics = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1443}
    monkeypatch.setattr(api, "evaluate_by_harness", lambda *_, **__: {"t": metrics})
    asked = ["evaluate", "a-model", "--harness", "lm-eval", "--tasks", "t"]
    monkeypatch.setattr("sys.argv", ["loratune", *asked])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out == "t acc,none: 0.5000\nt acc_stderr,none: 0.1443\n"


def test_options_that_a_harness_has_no_use_for_are_refused(model, monkeypatch, capsys):
    asked = ["evaluate", str(model), "--harness", "lm-eval", "--tasks", "gsm8k"]
    monkeypatch.setattr("sys.argv", ["loratune", *asked, "--prompt", "{prompt}", "--unsafe-exec"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--prompt, --unsafe-exec: with" in " ".join(capsys.readouterr().err.split())


# Many adapters at once ----------------------------------------------------------------------------


def without_scores(trained: Path, folder: Path) -> Path:
    """A copy of the results whose adapters are there and whose scores are not."""
    shutil.copytree(trained.parent / "copy", folder)
    with closing(sqlite3.connect(folder / "loratune.db")) as connection, connection:
        for table in ("predictions", "scores", "question_sets"):
            connection.execute(f"DELETE FROM {table}")
    return folder


def scored(folder: Path) -> dict[tuple[str, str], tuple[Score, tuple[Prediction, ...]]]:
    """Every score with its answers, by trial and task."""
    with open_store(folder / "loratune.db", create=False) as store:
        return {
            (one.trial_id, one.score.task): (one.score, store.predictions(one.score_id))
            for one in store.all_scores("by_heart")
        }


class Requests:
    """Counts the requests of each pass; with `most`, the process is interrupted after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, most: int | None = None) -> None:
        self.counts = list[int]()
        real = Decoder.answers

        def counting(decoder: Decoder, requests: Any) -> Any:
            self.counts.append(len(requests))
            with closing(real(decoder, requests)) as answers:
                for number, one in enumerate(answers):
                    if number == most:
                        raise KeyboardInterrupt
                    yield one

        monkeypatch.setattr(Decoder, "answers", counting)


def test_run_scores_all_adapters_in_one_pass_and_goes_on_where_it_was_stopped(
    tmp_path, trained, monkeypatch
):
    wanted = scored(trained.parent / "copy")
    assert len(wanted) == 2
    folder = without_scores(trained, tmp_path / "stopped")
    study = api.load_study(folder / "study.yaml")
    with monkeypatch.context() as patched:
        first = Requests(patched, most=17)
        with pytest.raises(KeyboardInterrupt):
            api.run(study, out=folder, device="cpu", quiet=True)
    assert first.counts == [2 * len(GSM8K)]
    with monkeypatch.context() as patched:
        second = Requests(patched)
        api.run(study, out=folder, device="cpu", quiet=True)
    assert second.counts == [2 * len(GSM8K) - 17]
    assert scored(folder) == wanted  # Every text, verdict and token count.
    # One adapter after another they answer the same.
    folder = without_scores(trained, tmp_path / "alone")
    monkeypatch.setattr(Decoder, "answers", None)
    api.run(study, out=folder, device="cpu", engine="reference", quiet=True)
    assert scored(folder) == wanted


def test_evaluate_scores_a_results_folder_in_one_pass_for_each_task_and_can_be_stopped(
    tmp_path, trained, monkeypatch
):
    questions = write(tmp_path / "test.jsonl", GSM8K)
    asked: dict[str, Any] = {"data": questions, "max_new_tokens": 9, "device": "cpu"}
    alone = without_scores(trained, tmp_path / "alone")
    wanted = api.evaluate(alone, tasks=["gsm8k"], engine="reference", **asked)
    folder = without_scores(trained, tmp_path / "stopped")
    with monkeypatch.context() as patched:
        Requests(patched, most=5)
        with pytest.raises(KeyboardInterrupt):
            api.evaluate(folder, tasks=["gsm8k"], **asked)
    requests = Requests(monkeypatch)
    remarks = list[str]()
    found = api.evaluate(folder, tasks=["gsm8k"], engine="packed", remark=remarks.append, **asked)
    assert requests.counts == [2 * len(GSM8K) - 5]
    assert remarks == []
    assert [one.score for one in found] == [one.score for one in wanted]
    assert scored(folder) == scored(alone)


def test_an_adapter_of_a_results_folder_that_cannot_answer_is_said_and_the_others_are_scored(
    tmp_path, trained, monkeypatch, capsys
):
    folder = without_scores(trained, tmp_path / "broken")
    broken = sorted((folder / "adapters").iterdir())[0]
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    questions = write(tmp_path / "test.jsonl", GSM8K)
    arguments = ["evaluate", folder, "--task", "gsm8k", "--data", questions, "--device", "cpu"]
    arguments += ["--max-new-tokens", "8"]
    monkeypatch.setattr("sys.argv", ["loratune", *map(str, arguments), "--engine", "packed"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    told = printed.err
    assert "of 12; grader strict" in printed.out
    assert f"{broken.name} can't be scored on gsm8k: " in told
    assert "uses bias" in told
    assert "Traceback" not in told
    assert len(scored(folder)) == 1


DECLARED = "\ndeclared: {data: {rows: 12, mean_tokens: 30, mean_target_tokens: 5}}"


def plan_of_declared_rows(folder: Path, model: str, task_text: str) -> tuple[str, ...]:
    """What a plan remarks of a study whose training rows are elsewhere."""
    more = f"evaluate: {{tasks: [{task_text}]}}{DECLARED}"
    rows = "/cluster/rows.jsonl"
    study_by_heart(folder, model=model, rows=rows, rates="[1e-2]", seeds=1, more=more)
    made, remarks = api.plan_with_remarks(api.load_study(folder / "study.yaml"))
    assert len(made.trials) == 1
    assert made.trials[0].provisional
    return remarks


@pytest.mark.parametrize("name", ["gsm8k", "piqa", "humaneval", "svamp"])
def test_a_plan_from_declared_rows_remarks_that_questions_are_not_here(tmp_path, model, name):
    text = f"{{name: {name}, data: /cluster/test.jsonl}}"
    of_rows, of_task = plan_of_declared_rows(tmp_path, model, text)
    assert of_rows.startswith("data: planned from the declared counts")
    assert of_task.startswith(
        f"task {name}: planned without its questions (data file /cluster/test.jsonl does not exist"
    )


def test_a_task_file_may_name_questions_that_are_not_here(tmp_path, model):
    (tmp_path / "own.yaml").write_text(
        "task: own\ndata: /cluster/own.jsonl\nprompt: q\nreference: a\ngrader: exact\n"
        "max_new_tokens: 4\n"
    )
    _, of_task = plan_of_declared_rows(tmp_path, model, "own.yaml")
    assert of_task.startswith(
        "task own.yaml: planned without its questions (data file /cluster/own"
    )


@pytest.mark.parametrize(
    ("task_text", "message"),
    [
        ("addsub", "task addsub has no data set of its own on the hub"),
        ("{name: gsm8k, data: empty.jsonl}", "empty.jsonl holds no rows"),
        ("{name: gsm8k, data: broken.jsonl}", "broken.jsonl, line 1: no JSON"),
        ("{name: gsm8k, data: folder.jsonl}", "folder.jsonl is a folder"),
        ("{name: gsm8k, data: {file: gone.txt}}", "gone.txt"),
        ("{name: gsm8k, data: /cluster/a.jsonl, prompt: no field}", "should hold {prompt}"),
        ("{name: gsm8k, data: /cluster/a.jsonl, grader: tests}", "not judged by grader tests"),
        ("{name: gsm9k, data: /cluster/a.jsonl}", "did you mean 'gsm8k'"),
        ("gone.yaml", "task file .*gone.yaml cannot be read"),
    ],
)
def test_a_plan_from_declared_rows_refuses_what_is_wrong_with_a_task(
    tmp_path, model, task_text, message
):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(LoratuneError, match=message):
        plan_of_declared_rows(tmp_path, model, task_text)


@pytest.mark.parametrize(
    ("task_text", "message"),
    [
        ("addsub", "task addsub has no data set of its own on the hub.*--data addsub.json"),
        ("{name: gsm8k, data: gone.jsonl}", "data file .*gone.jsonl does not exist"),
        ("{name: gsm8k, data: empty.jsonl}", "empty.jsonl holds no rows"),
        ("{name: demo, prompt: no field}", "should hold {prompt}"),
        ("{name: humaneval, grader: strict}", "humaneval is not judged by grader strict"),
        ("gone.yaml", "task file .*gone.yaml cannot be read"),
        ("empty.yaml", "holds no `key: value` lines; expected at least task, data, prompt, ref"),
    ],
)
def test_a_plan_refuses_a_task_in_the_words_in_which_a_run_would(
    tmp_path, model, task_text, message
):
    for name in ("empty.jsonl", "empty.yaml"):
        (tmp_path / name).touch()
    rows = write(tmp_path / "rows.jsonl", [{"q": f"{n}", "a": f"#### {n}"} for n in range(12)])
    more = f"evaluate: {{tasks: [{task_text}]}}"
    study_by_heart(tmp_path, model=model, rows=rows, rates="[1e-2]", seeds=1, more=more)
    loaded = api.load_study(tmp_path / "study.yaml")
    told = list[str]()
    for ask in (api.plan, lambda one: api.run(one, out=tmp_path / "out", device="cpu", quiet=True)):
        with pytest.raises(EvaluationError, match=message) as refused:
            ask(loaded)
        told.append(str(refused.value))
    assert told[0] == told[1]
    assert not (tmp_path / "out" / "loratune.db").exists()
