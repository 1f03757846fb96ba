"""From a name to its tensor part, built in or of another package."""

import re
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from loratune.errors import StudyError
from loratune.methods import load_method, lora, registry
from loratune.models.targets import target_modules
from loratune.study import methods as study_methods
from loratune.study.methods import MethodDescription
from methods.trials import METHODS, make_optimizer, make_trial, run_updates
from tiny_models import tiny_model


def test_every_built_in_method_loads():
    assert all(callable(load_method(name).attach) for name in METHODS)
    assert load_method("lora") is lora.METHOD


def test_an_unknown_method_is_an_error_with_the_nearest_name():
    with pytest.raises(StudyError, match="did you mean 'pissa'"):
        load_method("pisa")


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("no_such_package_of_ours:METHOD", "cannot be imported.*install or update"),
        ("loratune.methods.lora:MISSING", "does not exist in loratune.methods.lora"),
        ("loratune.methods.lora:Attached_", "does not exist"),
        ("loratune.methods.lora", "not of the form module:attribute"),
        ("math:pi", "float, which has no attach"),
    ],
)
def test_an_implementation_that_cannot_be_had_is_an_error_that_names_it(
    implementation, message, monkeypatch
):
    described = MethodDescription(name="mine", summary="", source="", implementation=implementation)
    monkeypatch.setattr(registry, "describe", lambda name: described)
    with pytest.raises(StudyError, match=message) as caught:
        load_method("mine")
    assert implementation in str(caught.value)


def test_a_method_of_another_package_loads(monkeypatch):
    class Mine:
        def attach(self, model, trial, *, targets):
            raise NotImplementedError

    package = types.ModuleType("somebodys_package")
    package.MINE = Mine()  # pyright: ignore[reportAttributeAccessIssue]  # a module made here
    monkeypatch.setitem(sys.modules, "somebodys_package", package)
    described = MethodDescription(
        name="mine", summary="", source="", implementation="somebodys_package:MINE"
    )
    monkeypatch.setattr(registry, "describe", lambda name: described)
    assert load_method("mine") is package.MINE


def test_the_method_in_the_documentation_is_found_by_its_entry_point_and_trains(monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    package = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", package)
    for name, code in re.findall(r'```python title="my_package/(\w+)\.py"\n(.*?)```', text, re.S):
        module = types.ModuleType(f"my_package.{name}")
        exec(code, vars(module))
        monkeypatch.setitem(sys.modules, f"my_package.{name}", module)
    target = re.search(r'gauss = "([\w.:]+)"', text)
    assert target is not None
    entry = EntryPoint("gauss", target[1], study_methods.ENTRY_POINT_GROUP)
    monkeypatch.setattr(study_methods, "entry_points", lambda group: [entry])
    study_methods.descriptions.cache_clear()
    try:
        model = tiny_model("llama")
        trial = make_trial("gauss", deviation=0.05)
        attached = load_method("gauss").attach(
            model, trial, targets=target_modules(model, trial.targets)
        )
    finally:
        study_methods.descriptions.cache_clear()
    drawn = torch.cat([one.flatten() for one in attached.parameter_groups()[0].parameters])
    assert drawn.std().item() == pytest.approx(0.05, rel=0.05)
    first, *_, last = run_updates(attached, make_optimizer(attached, trial), range(5))
    assert first != last
