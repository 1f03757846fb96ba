"""A study file's text to a `Study`, with errors that name the file, the line, the key and a fix.

YAML 1.2 (ruamel): `1e-5` is a number, `no` is a word, a key given twice is an error. Lines come
from the composed node tree, values from the plain load, so that pydantic sees ordinary Python.
"""

import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from loratune.errors import StudyError
from loratune.study.schema import Study

# ruamel.yaml is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false


@dataclass(frozen=True)
class LoadedStudy:
    """A study, the text it came from, and the folder that its relative paths start at."""

    study: Study
    text: str
    folder: Path


def load_study(path: str | Path) -> LoadedStudy:
    """The study in a YAML file.

    Raises:
        StudyError: no such file, not UTF-8, malformed YAML, or an invalid study; the message has
            one line for each thing that is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise StudyError(
            f"{path}: no such file; expected a study file, such as one that "
            "`loratune init fig1 --scale small > fig1.yaml` writes"
        ) from error
    except IsADirectoryError as error:
        raise StudyError(f"{path} is a folder; expected a study file (.yaml)") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: not UTF-8 text; expected a YAML study file") from error
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_study(text, name=str(path), folder=path.resolve().parent)


def parse_study(text: str, *, name: str, folder: Path) -> LoadedStudy:
    """The study in a YAML text; `name` stands for the file in messages.

    Raises:
        StudyError: malformed YAML or an invalid study.
    """
    try:
        content: object = YAML(typ="safe", pure=True).load(text)
        root: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise StudyError(f"{name}:{line}: malformed YAML: {error.problem}") from error
    except YAMLError as error:
        raise StudyError(f"{name}: malformed YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # Python's: a date that does not exist, a number without end
        raise StudyError(f"{name}: a value that cannot be read: {error}") from error
    if not isinstance(content, dict) or root is None:
        given = "nothing" if content is None else f"a {type(content).__name__}"
        raise StudyError(f"{name}: holds {given}; expected a study: keys and values in YAML")
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        explained = [_explain(problem, root, name) for problem in error.errors()]
        raise StudyError("\n".join(_merged(explained))) from error
    return LoadedStudy(study=study, text=text, folder=folder)


def _merged(explained: Sequence[tuple[str, str]]) -> Iterator[str]:
    """One line for each place and what was given there: a union says what each branch expects."""
    by_place = dict[str, list[str]]()
    for place, message in explained:
        messages = by_place.setdefault(place, [])
        if message not in messages:
            messages.append(message)
    for place, messages in by_place.items():
        if all(message.startswith("expected ") for message in messages):
            expected = (message.removeprefix("expected ") for message in messages)
            yield f"{place}expected {', or '.join(expected)}"
        else:
            yield from (place + message for message in messages)


# pydantic's words for what YAML calls otherwise.
_IN_PLAIN_WORDS = (
    (r"^Input should be ", "expected "),
    (r"a valid dictionary( or instance of \w+)?", "keys and values"),
    (r"a valid (tuple|list)", "a list"),
)


def _explain(problem: Any, root: Node, name: str) -> tuple[str, str]:
    """The place with what was given there, and what is wrong with it."""
    loc: Sequence[str | int] = problem["loc"]
    line, keys = _locate(root, loc)
    kind: str = problem["type"]
    start = f"{name}:{line}: "
    if kind == "extra_forbidden":
        key = str(loc[-1])
        return start, f"unknown key {'.'.join(keys)!r}{_near_key(key, loc)}"
    where = f"{start}{'.'.join(keys)}: " if keys else start
    given = f"{where}got {_shown(problem['input'])}; "
    if kind == "missing":
        if isinstance(loc[-1], int):  # a list that is too short
            return given, "expected more values"
        path = ".".join(str(part) for part in loc if isinstance(part, str))
        return start, f"missing key {path!r}{_description(loc)}"
    message: str = problem["msg"]
    if kind == "value_error":
        return where, message.removeprefix("Value error, ")
    for theirs, ours in _IN_PLAIN_WORDS:
        message = re.sub(theirs, ours, message)
    return given, message


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _locate(root: Node, loc: Sequence[str | int]) -> tuple[int, list[str]]:
    """The line of the deepest node that `loc` reaches, and the keys on the way there.

    Parts that stand only in the normalised form (`values` in a plain list) are passed over.
    """
    node, line, keys = root, root.start_mark.line + 1, list[str]()
    for part in loc:
        if isinstance(node, MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == str(part):
                    node, line = value_node, key_node.start_mark.line + 1
                    keys.append(str(part))
                    break
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line, keys


def _models_within(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_within(inner)


def _section_of(loc: Sequence[str | int]) -> type[BaseModel]:
    """The schema's section that holds the last key of `loc`."""
    section: type[BaseModel] = Study
    for part in loc[:-1]:
        info = section.model_fields.get(part) if isinstance(part, str) else None
        if info is not None:
            section = next(_models_within(info.annotation), section)
    return section


def _near_key(key: str, loc: Sequence[str | int]) -> str:
    known = list(_section_of(loc).model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"; {hint}known keys here: {', '.join(known)}"


def _description(loc: Sequence[str | int]) -> str:
    info = _section_of(loc).model_fields.get(str(loc[-1]))
    return f": {info.description}" if info is not None and info.description else ""
