"""Which trials one engine trains together, and what is refused or remarked on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from feeds import ListFeed
from loratune import run, workshop
from loratune.engine.base import Finished
from loratune.errors import ModelError, StudyError
from loratune.planning.build import make_plan
from loratune.planning.cost import H100
from loratune.planning.shapes import declared_model_facts
from loratune.records import DataFacts, Trial
from loratune.study.identity import cell_key
from loratune.study.loading import parse_study
from loratune.study.schema import DeclaredModel
from loratune.workshop import EngineChoice, LocalWorkshop
from nf4_bases import NEEDS_BITSANDBYTES
from tiny_models import save_tiny

STUDY = """\
study: groups
model: [one, two]
precision: float32
data: {train: rows.jsonl, prompt: q, response: a, max_tokens: 64, validation: {rows: 8}}
protocol: {kind: fixed_samples, epochs: 1}
methods: [lora, adalora, pissa]
rank: 4
alpha: rank
targets: all-linear
batch_size: [8, 16]
learning_rate: [1e-3, 1e-2]
seeds: 2
schedule: {kind: cosine}
"""


class Packed:
    """A method as far as the workshop asks: it can be packed."""

    def start(self, *args: Any, **kwargs: Any) -> None: ...

    def adam_factors(self, *args: Any) -> None: ...

    def export_layers(self, *args: Any) -> None: ...


@pytest.fixture
def packs_lora_and_pissa(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a packed engine that trains everything but adalora."""
    monkeypatch.setattr(
        workshop, "load_method", lambda name: object() if name == "adalora" else Packed()
    )


def shop(engine: EngineChoice) -> LocalWorkshop:
    loaded = parse_study(STUDY, name="groups.yaml", folder=Path.cwd())
    return LocalWorkshop(loaded, torch.device("cpu"), engine_choice=engine)


def trials() -> tuple[Trial, ...]:
    shape = DeclaredModel(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=128,
    )
    names = ("one", "two")
    return make_plan(
        shop("auto").loaded.study,
        models={name: declared_model_facts(name, shape) for name in names},
        data={(name, None): DataFacts("data", 64, 8, 640, 6400, 320, 16) for name in names},
        rate=H100,
    ).trials


@pytest.mark.usefixtures("packs_lora_and_pissa")
def test_auto_packs_a_models_trials_together_and_leaves_the_rest_to_the_reference_engine():
    groups = shop("auto").groups(trials())
    ids = [trial.trial_id for group in groups for trial in group]
    assert sorted(ids) == sorted(trial.trial_id for trial in trials())
    packed = [group for group in groups if len({cell_key(trial) for trial in group}) > 1]
    assert [{trial.model for trial in group} for group in packed] == [{"one"}, {"two"}]
    for group in packed:
        assert {trial.method.name for trial in group} == {"lora", "pissa"}
    alone = [group for group in groups if group not in packed]
    assert {trial.method.name for group in alone for trial in group} == {"adalora"}
    (remark,) = shop("auto")._unpacked()
    assert remark.startswith("adalora: ")


@pytest.mark.usefixtures("packs_lora_and_pissa")
def test_the_packed_engine_refuses_a_study_with_a_method_that_it_lacks():
    with pytest.raises(StudyError, match="the packed engine can't train the method adalora"):
        shop("packed").plan()


@pytest.mark.usefixtures("packs_lora_and_pissa")
def test_for_the_reference_engine_a_group_is_a_cell():
    groups = shop("reference").groups(trials())
    assert len(groups) == len({cell_key(trial) for trial in trials()})
    assert all(len({cell_key(trial) for trial in group}) == 1 for group in groups)
    assert shop("reference")._unpacked() == ()


def test_provenance_names_the_engine_that_trains():
    assert shop("auto").provenance("reference").engine == "reference"
    assert shop("auto").provenance("packed").engine == "packed"


FAMILY = """\
study: family
model: {model}
precision: float32
data:
  train: {rows}
  prompt: q
  response: a
  template: plain
  max_tokens: 32
  validation: {{rows: 2}}
protocol: {{kind: fixed_samples, epochs: 1}}
methods: [lora]
rank: 2
alpha: rank
targets: all-linear
batch_size: 4
learning_rate: 1e-3
seeds: 1
schedule: {{kind: cosine}}
"""


def test_a_family_that_computes_something_else_when_packed_is_said_or_refused(
    tmp_path, monkeypatch
):
    def differs(*_: object, **__: object) -> None:
        raise ModelError("its logits differ")

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"q": "say {n}", "a": "{n}"}}\n' for n in range(12)))
    model = save_tiny(tmp_path / "model", "llama")
    text = FAMILY.format(model=model, rows=rows)
    loaded = parse_study(text, name="family.yaml", folder=tmp_path)
    monkeypatch.setattr("loratune.workshop.check_family", differs)
    said = list[str]()
    auto = LocalWorkshop(loaded, torch.device("cpu"))
    engine = auto.engine(auto.plan().trials, remark=said.append)
    assert engine.name == "reference"
    assert said == [f"{model} trains on the reference engine, one by one: its logits differ"]
    # Asked for by name it is refused before anything is written or trained.
    with pytest.raises(ModelError, match="its logits differ"):
        LocalWorkshop(loaded, torch.device("cpu"), engine_choice="packed").plan()


def test_a_precision_that_cannot_be_had_is_refused_before_anything_is_written(tmp_path):
    text = FAMILY.format(model=tmp_path / "not looked at", rows=tmp_path / "nor.jsonl")
    text = text.replace("precision: float32", "precision: int8")
    loaded = parse_study(text, name="quantised.yaml", folder=tmp_path)
    with pytest.raises(ModelError, match="precision int8 needs a CUDA device"):
        run(loaded, out=tmp_path / "out", device="cpu", quiet=True)
    assert not (tmp_path / "out").exists()


def test_int8_is_left_to_the_reference_engine_and_the_reason_is_said(tmp_path):
    text = FAMILY.format(model="demo:1m", rows=tmp_path / "rows.jsonl")
    text = text.replace("precision: float32", "precision: int8")
    loaded = parse_study(text, name="quantised.yaml", folder=tmp_path)
    (remark,) = LocalWorkshop(loaded, torch.device("cpu"))._unpacked()
    assert "reference engine; LLM.int8 rounds activations as well" in remark
    packed = LocalWorkshop(loaded, torch.device("cpu"), engine_choice="packed")
    with pytest.raises(StudyError, match=r"a base in int8: LLM\.int8 rounds activations as well"):
        packed.plan()


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("choice", ["auto", "packed"])
def test_a_study_over_nf4_trains_in_a_pack(tmp_path, choice):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"q": "say {n}", "a": "{n}"}}\n' for n in range(12)))
    text = FAMILY.format(model="demo:1m", rows=rows)
    text = text.replace("precision: float32", "precision: nf4")
    text = text.replace("learning_rate: 1e-3", "learning_rate: [1e-3, 1e-2]")
    loaded = parse_study(text, name="quantised.yaml", folder=tmp_path)
    shop = LocalWorkshop(loaded, torch.device("cpu"), engine_choice=choice)
    (group,) = shop.groups(shop.plan().trials)
    said = list[str]()
    engine = shop.engine(group, remark=said.append)
    assert engine.name == "packed"
    assert said == []
    assert shop._unpacked() == ()
    ends = [one for one in engine.train(ListFeed(group)) if isinstance(one, Finished)]
    assert [one.outcome.status for one in ends] == ["done", "done"]
