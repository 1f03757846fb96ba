"""The documentation against the code: what it lists is what there is."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML
from typer.main import get_command

from loratune.analyse.audit.detectors import DETECTORS
from loratune.analyse.audit.findings import Finding, Kind, NotChecked
from loratune.analyse.audit.from_csv import FIELDS
from loratune.analyse.audit.inspect import Audit
from loratune.analyse.cells import cells_table
from loratune.analyse.compare import Comparison
from loratune.analyse.curves import Crossover
from loratune.analyse.laws.learning_rate import LearningRateFit, LearningRateLaw
from loratune.analyse.laws.loss import FormCriterion, LossLaw, Optimum
from loratune.analyse.laws.optimum import PowerLaw
from loratune.analyse.laws.report import (
    BestBatchSize,
    Laws,
    LearningRateFinding,
    LossFinding,
    OptimumFinding,
)
from loratune.analyse.lemma import LemmaCheck, PluginCheck
from loratune.analyse.tables import IDENTITY_COLUMNS, RUN_COLUMNS, TASK_COLUMNS
from loratune.cli import app
from loratune.planning.build import Plan, make_plan
from loratune.planning.cost import H100
from loratune.planning.shapes import declared_data_facts, declared_model_facts
from loratune.recommendation.grid import Recommendation
from loratune.study.loading import parse_study
from loratune.study.methods import descriptions
from loratune.study.presets import preset_names, preset_scales, preset_text
from loratune.study.schema import Study

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def sections(annotation: Any, seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    if is_section and annotation not in seen:
        seen.add(annotation)
        yield annotation
        for info in annotation.model_fields.values():
            yield from sections(info.annotation, seen)
    for inner in typing.get_args(annotation):
        yield from sections(inner, seen)


def test_every_key_of_the_study_file_is_documented():
    text = page("study-file.md")
    missing = [
        f"{section.__name__}.{key}"
        for section in sections(Study, set())
        for key in section.model_fields
        if not re.search(rf"`{key}`|\*\*{key}\*\*|[{{ ]{key}:", text)
    ]
    assert missing == []


def test_every_choice_of_the_study_file_is_documented():
    text = page("study-file.md")
    for section in sections(Study, set()):
        for info in section.model_fields.values():
            for choice in literals(info.annotation):
                assert choice in text, f"{section.__name__}: {choice}"


def literals(annotation: Any) -> Iterator[str]:
    if typing.get_origin(annotation) is typing.Literal:
        yield from (value for value in typing.get_args(annotation) if isinstance(value, str))
    for inner in typing.get_args(annotation):
        yield from literals(inner)


@pytest.mark.parametrize("file", [DOCS / "study-file.md", ROOT / "README.md"])
def test_the_example_study_of_a_page_is_valid(file: Path):
    blocks = file.read_text(encoding="utf-8").split("```yaml\n")[1:]
    studies = [block.split("```")[0] for block in blocks if block.startswith("study:")]
    assert len(studies) == 1
    content: Any = YAML(typ="safe", pure=True).load(studies[0])
    assert Study.model_validate(content).methods[0].name == "lora"


def test_every_command_and_option_has_help_and_stands_in_its_page():
    text = page("commands.md")
    command: Any = get_command(app)
    assert command.commands
    for name, one in command.commands.items():
        assert one.help, name
        assert f"## loratune {name}\n" in text
        own = text.split(f"## loratune {name}\n")[1].split("\n## ")[0]
        for parameter in one.params:
            option = parameter.opts[-1]
            if not option.startswith("--") or option == "--help" or parameter.hidden:
                continue
            assert parameter.help, f"{name} {option}"
            general = option in ("--json", "--quiet", "--device", "--format", "--output")
            assert option in (text if general else own), f"{name} {option}"


def test_every_column_and_key_of_the_output_is_documented():
    text = page("output-formats.md")
    columns = [*IDENTITY_COLUMNS, *RUN_COLUMNS, *(f"<task>_{part}" for part in TASK_COLUMNS)]
    columns += list(cells_table([]).columns)
    for record in (Recommendation, Comparison, Crossover):
        columns += [field.name for field in dataclasses.fields(record)]
    columns += list(planned("fig3", "small").to_json())
    records = (
        *(Laws, LearningRateFinding, LearningRateFit, LearningRateLaw, LossFinding, LossLaw),
        *(FormCriterion, Optimum, OptimumFinding, BestBatchSize, PowerLaw),
        *(LemmaCheck, PluginCheck, Audit, Finding, NotChecked),
    )
    columns += [field.name for record in records for field in dataclasses.fields(record)]
    columns += FIELDS
    assert [name for name in columns if f"`{name}`" not in text] == []


def test_every_kind_of_finding_is_explained():
    text = page("audit.md")
    kinds = typing.get_args(Kind)
    assert len(kinds) == len(DETECTORS)
    assert [kind for kind in kinds if f"| `{kind}` |" not in text] == []


def test_every_preset_stands_in_its_page_with_the_size_and_cost_that_plan_gives():
    paper, small = page("presets.md").split("## Small scale")
    for name in preset_names():
        for scale in preset_scales(name):
            plan = planned(name, scale)
            amount = plan.hours if scale == "paper" else plan.hours * 60
            expected = f"| {len(plan.trials):,} | {plan.num_cells} | {amount:,.0f} |"
            text = paper if scale == "paper" else small
            (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
            assert row.endswith(expected), f"{name} {scale}: {row!r} should end {expected!r}"


def planned(name: str, scale: str) -> Plan:
    study = parse_study(preset_text(name, scale=scale), name=name, folder=Path()).study
    declared = study.declared.data
    assert declared is not None
    models = {
        source: declared_model_facts(source, study.declared.models[source])
        for source in study.model
    }
    data = {
        (source, rows): declared_data_facts(study.data, declared, rows=rows)
        for source in study.model
        for rows in study.data.rows
    }
    return make_plan(study, models=models, data=data, rate=H100)


def test_every_method_stands_in_its_page():
    text = page("methods.md")
    assert [name for name in descriptions() if f"`{name}`" not in text and name not in text] == []


def test_every_page_is_in_the_navigation_or_linked_from_one_that_is():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    linked = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    for path in DOCS.glob("*.md"):
        assert path.name in navigation or f"({path.name})" in linked, path.name


def test_the_licence_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License\n                           Version 2.0")
    assert "END OF TERMS AND CONDITIONS" in text
    assert text.count("\n") > 200


def test_the_lock_pins_torch_for_every_machine_alike_and_names_no_index():
    for name in ("lock.txt", "dev-lock.txt"):
        lines = (ROOT / "requirements" / name).read_text(encoding="ascii").splitlines()
        pins = [line for line in lines if not line.startswith(("#", "-r "))]
        assert all(line.count("==") == 1 for line in pins)
        assert not any("+" in line or "://" in line or "nvidia" in line for line in pins)
        if name == "lock.txt":
            assert "torch==2.13.0" in pins
