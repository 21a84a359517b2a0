"""A pickle as plain data. No class is looked up and no function called: each of the known harmless names stands for a
rule in ``classes.py``, and every other name is refused.

``pickle`` and PyTorch's restricted unpickler let a file choose how much memory and time it takes (a ``bytearray`` of a
terabyte, a key that takes 2³⁴ steps to hash); here every operation costs about the same, and they are counted.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import IO, Any

from ldm_ray.checkpoints.untrusted.classes import Name, call, fill, key_of, known_as
from ldm_ray.checkpoints.untrusted.tensors import Unread
from ldm_ray.settings.errors import CheckpointError
from ldm_ray.terminal.text import escaped, shown

MAX_OPERATIONS = 1_000_000
MAX_WORK = 2**28  # bytes that are copied from one value into another
ITEM = 64  # of them that an item of a list or dictionary counts
MAX_INT_BITS = 2048
MARK = object()


class Machine:
    """The stack that a pickle's operations work on. persistent: what stands for ``('storage', …)``."""

    def __init__(self, persistent: Callable[[Any], Any]) -> None:
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.work = MAX_WORK

    def run(self, stream: IO[bytes]) -> Any:
        """What the pickle holds. CheckpointError: a name or operation that is not known, or too many; ValueError,
        IndexError, KeyError, TypeError: a damaged one."""
        stack, memo, table = self.stack, self.memo, OPERATIONS
        argument: Any
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPERATIONS:
                raise CheckpointError(f"holds more than the {MAX_OPERATIONS:,} values that are read")
            name = opcode.name
            if name in PUTS:
                memo[argument] = stack[-1]
            elif name in GETS:
                stack.append(memo[argument])
            elif name in CONSTANTS:
                stack.append(plain_number(argument))
            elif name in table:
                table[name](self, argument)
            elif name not in IGNORED:
                raise CheckpointError(f"is refused: the pickle operation {name} is not read")
        return stack.pop()

    def since_mark(self) -> list[Any]:
        """What was put after the last mark, which goes with it."""
        stack = self.stack
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is MARK:
                items = stack[i + 1 :]
                del stack[i:]
                return items
        raise IndexError("no mark")


def plain_number(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise CheckpointError(f"holds {shown(value)}")
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, str) and not value.isprintable():
        return value.encode("utf-8", "replace").decode()  # no halves of characters
    return value


def append(machine: Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise ValueError("items are added to what is no list")
    target.extend(items)


def drop(machine: Machine, _: Any) -> None:
    machine.stack.pop()


def drop_to_mark(machine: Machine, _: Any) -> None:
    machine.since_mark()


def set_items(machine: Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, Unread):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items are set in what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key_of(key)] = value


def named(machine: Machine, module: Any, name: Any) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a class without a name")
    full = known_as(module, name)
    if full is None:
        title = escaped(f"{module[:100]}.{name[:100]}")
        raise CheckpointError(f"is refused: it holds {title}, which is not on the list of harmless classes")
    machine.stack.append(full)


def reduce(machine: Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise CheckpointError("is refused: it calls what is no harmless class")
    machine.work -= sum(size_of(value) for value in arguments)
    if machine.work < 0:
        raise CheckpointError("makes more of its values than is read")
    machine.stack.append(call(function, arguments))


def size_of(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return ITEM * len(value) if isinstance(value, (list, tuple, dict)) else 0


def build(machine: Machine) -> None:
    state = machine.stack.pop()
    machine.work -= sum(size_of(value) for value in (state if isinstance(state, tuple) else (state,))) + size_of(state)
    if machine.work < 0:
        raise CheckpointError("makes more of its values than is read")
    fill(machine.stack[-1], state)


def pop(machine: Machine, count: int) -> list[Any]:
    stack = machine.stack
    if count > len(stack):
        raise IndexError("the stack is empty")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return items


def stacked_name(machine: Machine) -> None:
    named(machine, *pop(machine, 2))


def put(value: Callable[[], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.stack.append(value())


def tuple_of(count: int) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(pop(machine, count)))


IGNORED = {"PROTO", "FRAME", "STOP"}
PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
GETS = {"GET", "BINGET", "LONG_BINGET"}
CONSTANTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
OPERATIONS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": put(lambda: MARK),
    "NONE": put(lambda: None),
    "NEWTRUE": put(lambda: True),
    "NEWFALSE": put(lambda: False),
    "EMPTY_LIST": put(list),
    "EMPTY_DICT": put(dict),
    "EMPTY_TUPLE": put(tuple),
    "EMPTY_SET": put(list),
    "TUPLE1": tuple_of(1),
    "TUPLE2": tuple_of(2),
    "TUPLE3": tuple_of(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(machine.since_mark()),
    "DICT": lambda machine, _: dictionary(machine),
    "APPEND": lambda machine, _: append(machine, pop(machine, 1)),
    "APPENDS": lambda machine, _: append(machine, machine.since_mark()),
    "ADDITEMS": lambda machine, _: append(machine, machine.since_mark()),
    "SETITEM": lambda machine, _: set_items(machine, pop(machine, 2)),
    "SETITEMS": lambda machine, _: set_items(machine, machine.since_mark()),
    "POP": drop,
    "POP_MARK": drop_to_mark,
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    "GLOBAL": lambda machine, argument: named(machine, *argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: stacked_name(machine),
    "REDUCE": lambda machine, _: reduce(machine),
    "NEWOBJ": lambda machine, _: reduce(machine),
    "BUILD": lambda machine, _: build(machine),
    "BINPERSID": lambda machine, _: machine.stack.append(machine.persistent(machine.stack.pop())),
}


def dictionary(machine: Machine) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    set_items(machine, items)
