"""Frames and values between the asking and the answering process. Data only, never code.

A frame is four bytes of length (big-endian) and so many bytes of JSON. A value is packed into JSON
by its builtin type, so that what arrives on the other side is a plain builtin object: no class, no
`__eq__`, no method of the sender travels. What has no builtin form arrives as `Opaque`, which
equals nothing. pickle and marshal would run or crash on what a hostile sender makes.

Of a subclass (Counter, a namedtuple, an IntEnum) the builtin part travels, which compares as the
whole does with builtin values. Identity and shared references do not travel.
"""

import json
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from itertools import islice
from typing import Any, BinaryIO, cast

MOST_BYTES = 1 << 24  # of one frame: no test's value is near, and the reader must stay in memory
MOST_ITEMS = 100_000  # taken from an iterator, which may never end

_IMPOSSIBLE = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError, MemoryError)
_SMALL = 1 << 63  # larger integers travel in base 16, which Python reads without a limit of digits


class WireError(Exception):
    """Bytes that are no frame, or a frame that is no value."""


class Opaque:
    """A value of the other process that has no builtin form; it equals only itself.

    It is true or false as it was over there, such as what `re.search` found, or an empty deque;
    what could not be told there cannot be told here either.
    """

    def __init__(self, type_name: str, *, truth: bool | None) -> None:
        self.type_name = type_name
        self.truth = truth

    def __repr__(self) -> str:
        return f"<{self.type_name} object of the program>"

    def __bool__(self) -> bool:
        if self.truth is None:
            raise TypeError(f"{self!r} is neither true nor false")
        return self.truth


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Write one frame.

    Raises:
        WireError: the message is larger than a frame may be.
        OSError: the other side is gone.
    """
    data = json.dumps(message).encode("ascii")
    if len(data) > MOST_BYTES:
        raise WireError(f"a message of {len(data)} bytes; at most {MOST_BYTES} can be sent")
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one frame; None at the end of the stream.

    Raises:
        WireError: what came is no frame.
    """
    head = stream.read(4)
    if not head:
        return None
    size = int.from_bytes(head, "big")
    if len(head) < 4 or size > MOST_BYTES:
        raise WireError("bytes that are no message")
    data = stream.read(size)
    try:
        message = json.loads(data) if len(data) == size else None
    except (ValueError, RecursionError, MemoryError) as error:
        raise WireError("bytes that are no message") from error
    if not isinstance(message, dict):
        raise WireError("bytes that are no message")
    return cast("dict[str, Any]", message)


def pack(value: Any) -> Any:
    """A value as JSON can carry it.

    Raises:
        RecursionError: it is nested too deeply, or contains itself.
    """
    if value is None or isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "item") and not value.shape:
        return pack(value.item())  # a numpy scalar compares as the number that it is
    for builtin, name, to_data in _PACKERS:
        if isinstance(value, builtin):
            data = to_data(value)
            return data if name is None else {name: data}
    if _is_from(value, "decimal", "Decimal"):
        return {"decimal": str(value)}
    if _is_from(value, "fractions", "Fraction"):
        return {"fraction": [_pack_int(value.numerator), _pack_int(value.denominator)]}
    return {"opaque": [type(value).__name__[:100], _truth(value)]}


def _truth(value: Any) -> bool | None:
    try:
        return bool(value)
    except Exception:  # noqa: BLE001  # an array of many values, or the program's own class
        return None


def holds_opaque(data: Any) -> bool:
    """Whether something in packed `data` has no builtin form."""
    if isinstance(data, list):
        return any(holds_opaque(one) for one in cast("list[Any]", data))
    if isinstance(data, dict):
        items = cast("dict[str, Any]", data).items()
        return any(name == "opaque" or holds_opaque(content) for name, content in items)
    return False


def unpack(data: Any) -> Any:
    """The value that `pack` made into `data`.

    Raises:
        WireError: `data` is none of its making.
    """
    try:
        return _unpack(data)
    except _IMPOSSIBLE as error:
        raise WireError(f"a message with an impossible value ({type(error).__name__})") from error


def _unpack(data: Any) -> Any:
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [_unpack(one) for one in cast("list[Any]", data)]
    ((name, content),) = data.items()
    return _UNPACKERS[name](content)


def _list(data: Any) -> list[Any]:
    return [_unpack(one) for one in data]


def _pack_int(value: int) -> Any:
    value = int(value)
    return value if -_SMALL < value < _SMALL else {"int": hex(value)}


def _pack_all(values: Any) -> list[Any]:
    return [pack(one) for one in values]


def _pack_dict(value: dict[Any, Any]) -> list[Any]:
    return [[pack(key), pack(one)] for key, one in value.items()]


def _pack_iterator(value: Iterator[Any]) -> list[Any]:
    items = list(islice(value, MOST_ITEMS + 1))
    return [_pack_all(items[:MOST_ITEMS]), len(items) > MOST_ITEMS]


# Tried in this order. A name of None: the data needs no mark.
_PACKERS: tuple[tuple[Any, str | None, Callable[[Any], Any]], ...] = (
    (int, None, _pack_int),
    (float, None, lambda value: float.__float__(value)),
    (str, None, str.__str__),
    (list, None, _pack_all),
    (tuple, "tuple", _pack_all),
    (dict, "dict", _pack_dict),
    (set, "set", _pack_all),
    (frozenset, "frozenset", _pack_all),
    (bytes, "bytes", bytes.hex),
    (bytearray, "bytearray", bytearray.hex),
    (complex, "complex", lambda value: [value.real, value.imag]),
    (range, "range", lambda value: _pack_all([value.start, value.stop, value.step])),
    (KeysView, "keys", _pack_all),
    (ValuesView, "values", _pack_all),
    (ItemsView, "items", _pack_all),
    (Iterator, "iterator", _pack_iterator),
)


def _is_from(value: Any, module: str, name: str) -> bool:
    """Whether it is of that class, which is not imported for those who do not use it."""
    return (type(value).__module__, type(value).__name__) == (module, name)


def _decimal(content: str) -> Any:
    from decimal import Decimal

    return Decimal(content)


def _fraction(content: list[Any]) -> Any:
    from fractions import Fraction

    return Fraction(*_unpack(content))


def _unpack_dict(content: list[Any]) -> dict[Any, Any]:
    return {_unpack(key): _unpack(one) for key, one in content}


def _unpack_iterator(content: list[Any]) -> Iterator[Any]:
    items, is_cut = content
    return _ending_in_error(_unpack(items)) if is_cut else iter(_unpack(items))


def _ending_in_error(items: list[Any]) -> Iterator[Any]:
    yield from items
    raise WireError(f"the program's iterator has more than {MOST_ITEMS} items")


def _opaque(content: list[Any]) -> Opaque:
    name, truth = content
    return Opaque(str(name)[:100], truth=None if truth is None else bool(truth))


_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "tuple": lambda content: tuple(_list(content)),
    "dict": _unpack_dict,
    "set": lambda content: set(_list(content)),
    "frozenset": lambda content: frozenset(_list(content)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda content: complex(*content),
    "range": lambda content: range(*_list(content)),
    "decimal": _decimal,
    "fraction": _fraction,
    "keys": lambda content: dict.fromkeys(_list(content)).keys(),
    "values": lambda content: dict(enumerate(_list(content))).values(),
    "items": lambda content: dict(_list(content)).items(),
    "iterator": _unpack_iterator,
    "opaque": _opaque,
}
