"""Values on the wire: plain ones arrive equal and of the same type, all else as an `Opaque`."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.evaluation.sandbox import guest
from loratune.evaluation.sandbox.guest.wire import (
    MOST_BYTES,
    Opaque,
    WireError,
    holds_opaque,
    pack,
    receive,
    send,
    unpack,
)

KEYS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.fractions()
    | st.decimals(allow_nan=False)
)
VALUES = st.recursive(
    KEYS | st.sets(KEYS) | st.frozensets(KEYS),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)


def over_the_wire(value):
    stream = io.BytesIO()
    send(stream, {"value": pack(value)})
    stream.seek(0)
    message = receive(stream)
    assert message is not None
    return unpack(message["value"])


@given(VALUES)
def test_a_plain_value_arrives_equal_and_of_the_same_type(value):
    arrived = over_the_wire(value)
    assert arrived == value
    assert repr(type(arrived)) == repr(type(value))


@pytest.mark.parametrize("value", [7**4000, -(7**4000), 2**63, -(2**63), math.inf, -0.0, "\ud800"])
def test_what_json_finds_hard_arrives(value):
    assert repr(pack(over_the_wire(value))) == repr(pack(value))
    assert over_the_wire(value) == value


def test_nan_arrives_as_nan():
    assert math.isnan(over_the_wire(math.nan))


def test_what_has_no_builtin_form_equals_nothing():
    class Yes:
        def __eq__(self, other):
            return True

    arrived = over_the_wire(Yes())
    assert isinstance(arrived, Opaque)
    assert arrived != Yes.__name__
    assert holds_opaque(pack([1, {2: (Yes(),)}]))
    assert not holds_opaque(pack([1, {"opaque": ("opaque",)}]))


def test_an_iterator_that_never_ends_is_cut_and_says_so():
    import itertools

    arrived = over_the_wire(itertools.count())
    assert list(itertools.islice(arrived, 3)) == [0, 1, 2]
    with pytest.raises(WireError, match="more than 100000 items"):
        list(arrived)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"int": "0xg"},
        {"int": 5},
        {"set": [[1]]},
        {"tuple": 3},
        {"dict": [[1]]},
        {"dict": [[[], 1]]},
        {"fraction": [1, 0]},
        {"decimal": "one"},
        {"range": [0, 1, 0]},
        {"complex": ["a"]},
        {"bytes": "0"},
        {"iterator": [1, 2, 3]},
        {"function": 1},
        {"tuple": [], "set": []},
    ],
)
def test_data_of_no_value_is_an_error_and_nothing_else(data):
    with pytest.raises(WireError, match="impossible value"):
        unpack(data)


@pytest.mark.parametrize(
    "sent",
    [
        b"\0",
        b"\0\0\0\2{",
        b"\0\0\0\2[]",
        b"\0\0\0\1x",
        b"\xff\xff\xff\xff",
        (100_000).to_bytes(4, "big") + b"[" * 100_000,
    ],
)
def test_bytes_that_are_no_frame_are_an_error(sent):
    with pytest.raises(WireError):
        receive(io.BytesIO(sent))


def test_the_end_of_the_stream_is_none():
    assert receive(io.BytesIO()) is None


def test_a_message_that_is_too_large_is_not_sent():
    stream = io.BytesIO()
    with pytest.raises(WireError, match="can be sent"):
        send(stream, {"value": "x" * MOST_BYTES})
    assert not stream.getvalue()


def test_the_guest_imports_the_standard_library_alone():
    """It runs where nothing else is."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import guest.enter, json; " + (
        "print(json.dumps([m for m in sys.modules if not m.startswith('_')]))"
    )
    path = str(Path(guest.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-s", "-c", code, path],
        capture_output=True,
        check=True,
        text=True,
    )
    outside = {one.partition(".")[0] for one in json.loads(done.stdout)}
    assert outside <= {*sys.stdlib_module_names, "guest"}
