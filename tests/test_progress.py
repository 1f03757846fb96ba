"""The progress line: what it says of many trials under way, on a terminal and off it."""

from dataclasses import replace

import pytest

from loratune.engine.base import Progress
from loratune.planning.text import plan_text
from loratune.progress import ProgressLine
from stub_sweep import StubWorkshop, searching_study, stub_outcome, stub_study


def test_trials_under_way_together_are_counted_together_and_ended_one_by_one(
    capsys: pytest.CaptureFixture[str],
):
    now = 0.0
    plan = StubWorkshop(stub_study()).plan()
    first, second, third = plan.trials[:3]
    with ProgressLine(clock=lambda: now) as line:
        line.begins(plan, finished=frozenset([third.trial_id]))
        for trial in (first, second):
            line.trial_begins(trial)
        for update in range(first.num_updates):
            now += 1.0
            for trial in (first, second):
                line.update(trial, Progress(trial.trial_id, update, trial.batch_size, 1.0))
        (task,) = line._bar.tasks
        assert task.completed == pytest.approx(3.0)
        assert "and 1 more" in task.description
        line.trial_ends(second, stub_outcome(second))
        assert task.completed == pytest.approx(3.0)
        line.trial_ends(first, replace(stub_outcome(first), status="failed", reason="it broke"))
        assert task.completed == pytest.approx(3.0)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "16 trials, 1 of them done before"
    assert said[1].startswith("[2/16] lora r=4 batch=8 lr=0.01 seed=0: validation loss")
    assert said[2].startswith("[3/16] lora r=4 batch=8 lr=0.001 seed=0: failed: it broke")


def test_a_search_says_what_it_may_train_and_how_much_it_asks_for(
    capsys: pytest.CaptureFixture[str],
):
    plan = StubWorkshop(searching_study()).plan()
    said = plan_text(plan, list_trials=False)
    assert "and up to 18 more that an adaptive search proposes, at most 13 a curve" in said
    assert "learning rate  searched between 0.0001 and 0.01" in said
    with ProgressLine(clock=lambda: 0.0) as line:
        line.begins(plan, finished=frozenset())
        line.plans_more(plan.trials[:6])
        line.plans_more(plan.trials[:1])
    said = capsys.readouterr().err
    assert "6 more trials of lora r=4 batch=8,16\n" in said
    assert "1 more trial of lora r=4 batch=8\n" in said
