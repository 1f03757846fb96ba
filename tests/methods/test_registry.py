"""From a name to its tensor part, built in or of another package."""

import types

import pytest

from loratune.errors import StudyError
from loratune.methods import load_method, lora, registry
from loratune.study.methods import MethodDescription
from methods.trials import METHODS


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
    monkeypatch.setitem(__import__("sys").modules, "somebodys_package", package)
    described = MethodDescription(
        name="mine", summary="", source="", implementation="somebodys_package:MINE"
    )
    monkeypatch.setattr(registry, "describe", lambda name: described)
    assert load_method("mine") is package.MINE
