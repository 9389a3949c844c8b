"""What a pickle holds, found without running it.

A pickle is a program for a stack machine, whose instructions may call whatever can be imported.
`load` is such a machine with nothing behind it: it imports nothing and calls nothing. Lists,
dictionaries, tuples, texts and numbers become what they are, and every call becomes a `Call`, a
note of what was to be called. A pickle that names more than plain data is refused all the same:
whoever made it wanted something else to happen.

Time and memory are bounded by the number of instructions: none makes more than one object, and
none looks into an object that was made before. (A list that holds a list twice, which holds a list
twice, and so on forty times, is small, but has no end for whoever prints or compares it.) That is
why only short texts are keys.
"""

import dataclasses
import pickletools
from collections.abc import Collection
from typing import Any

from stvit_jax.errors import described

_MOST_STEPS = 2_000_000  # a training checkpoint of stvit_large has 126,000
_LONGEST = 1000  # characters of a name or key, which are put together and compared

# What gives data and does nothing, whatever it is called with.
PLAIN = frozenset(
    {"_codecs.encode", "argparse.Namespace", "decimal.Decimal", "fractions.Fraction"}
    | {"types.SimpleNamespace", "uuid.UUID", "typing.Any"}
    | {f"datetime.{n}" for n in ("date", "datetime", "time", "timedelta", "timezone")}
    | {
        f"{module}.{pure}{kind}"
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for kind in ("Path", "PosixPath", "WindowsPath")
    }
    | {
        f"builtins.{name}"
        for name in (
            *("bool", "bytearray", "bytes", "complex", "float", "frozenset", "int", "list", "set"),
            *("dict", "range", "slice", "str", "tuple", "Ellipsis", "NotImplemented"),
        )
    }
    | {
        f"numpy.{core}.{name}"
        for core in ("core", "_core")
        for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
    }
    | {"numpy.dtype", "numpy.ndarray", "numpy.bool", "numpy.bool_", "numpy.str_", "numpy.bytes_"}
    | {f"numpy.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
    | {f"numpy.{kind}" for kind in ("float16", "float32", "float64", "complex64", "complex128")}
    | {
        f"omegaconf.{name}"
        for name in (
            *("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata"),
            *("base.Metadata", "nodes.AnyNode", "nodes.BooleanNode", "nodes.FloatNode"),
            *("nodes.IntegerNode", "nodes.StringNode"),
        )
    }
)
# Dictionaries under other names; what is set in them is what they hold.
_TABLES = frozenset(
    {
        "addict.addict.Dict",
        "collections.Counter",
        "collections.OrderedDict",
        "collections.defaultdict",
        "easydict.EasyDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "ml_collections.config_dict.config_dict.ConfigDict",
        "mmcv.utils.config.ConfigDict",
        "mmengine.config.config.ConfigDict",
        "munch.Munch",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "yacs.config.CfgNode",
    }
)
_LISTS = frozenset({"collections.deque"})
# As Python 2 calls them, and Python 3 where it writes for both.
_RENAMED = {"__builtin__.xrange": "builtins.range", "__builtin__.long": "builtins.int"}


class ForeignError(Exception):
    """More than plain data is named in it.

    Attributes:
      names: of what.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"it names {', '.join(names)}")
        self.names = names


class MalformedError(Exception):
    """It is no pickle, or a program too long for what it is to hold."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Named:
    """What a name stands for, `torch.float16`; it was not looked up."""

    name: str


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """What was to be called, with what, and the state that its result was to get."""

    name: str
    args: tuple
    state: Any = None


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Persistent:
    """What the pickle says lies elsewhere, under this id."""

    id: Any


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Key:
    """Of a dictionary, and no text."""

    text: str


def load(program: bytes, allowed: Collection[str]) -> Any:
    """What a pickle of any protocol holds.

    Args:
      program: the pickle.
      allowed: names beyond those of plain data that may be in it, as `torch.Size`.

    Returns:
      Lists (sets, too), dictionaries, tuples, texts, bytes, numbers, None, and the classes above.

    Raises:
      ForeignError: there are other names in it.
      MalformedError: it cannot be followed to its end.
    """
    machine, fault = _Machine(), None
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if step == _MOST_STEPS:
                raise MalformedError(f"it has more than {_MOST_STEPS:,} instructions")
            machine.run(opcode.name, argument)
        result = machine.stack.pop()
    except MalformedError as error:
        fault = error
    except Exception as error:  # whatever bytes that are no pickle lead to
        fault = MalformedError(f"it is no pickle ({described(error)})")
    if foreign := sorted(machine.names - PLAIN - _TABLES - _LISTS - frozenset(allowed)):
        raise ForeignError(foreign)  # rather than a fault, which these may have led to
    if fault:
        raise fault
    return result


class _Machine:
    """The stack, the stacks below its marks, the memo, and every name that was met."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.names: set[str] = set()
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, opcode: str, argument: Any) -> None:
        """Carries out one instruction; raises anything where there is nothing to do it on."""
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "MARK":
                self._below.append(stack)
                self.stack = []
            case "TUPLE" | "FROZENSET":
                self._push(tuple(self._marked()))
            case "LIST":
                self._push(self._marked())
            case "DICT":
                self._push(_set({}, self._marked()))
            case "APPENDS" | "ADDITEMS":
                items = self._marked()
                self.stack[-1].extend(items)
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "SETITEMS":
                items = self._marked()
                _set(self.stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "DUP":
                stack.append(stack[-1])
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                self._marked()
            case "GLOBAL":
                stack.append(self._named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._named(module, name))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(self._named("copyreg", f"extension_{argument}"))
            case "INST":
                args = self._marked()
                self._push(self._call(self._named(*argument.split(" ", 1)), tuple(args)))
            case "OBJ":
                function, *args = self._marked()
                self._push(self._call(function, tuple(args)))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack[-1] = self._call(stack[-1], args)
            case "NEWOBJ_EX":
                _, args = stack.pop(), stack.pop()
                stack[-1] = self._call(stack[-1], args)
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Call):
                    stack[-1].state = state
            case "PERSID":
                stack.append(Persistent(argument))
            case "BINPERSID":
                stack[-1] = Persistent(stack[-1])
            case _ if argument is not None:  # what carries its value with it: numbers and texts
                stack.append(argument)
            case _:
                raise MalformedError(
                    f"it has an instruction {opcode}, which torch.save never writes"
                )

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _marked(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _named(self, module: str, name: str) -> Named:
        if len(module) + len(name) > _LONGEST:
            raise MalformedError("it has a name without end")
        full = f"{module}.{name}"
        full = _RENAMED.get(full, full).replace("__builtin__.", "builtins.", 1)
        self.names.add(full)
        return Named(full)

    def _call(self, function: Named, args: tuple) -> Any:
        if not isinstance(args, tuple):
            raise MalformedError("it calls something with what are no arguments")
        if function.name in _LISTS:
            return []
        if function.name in _TABLES:
            return {}
        if function.name == "builtins.bytearray" and args and isinstance(args[0], int):
            self.names.add("builtins.bytearray(NUMBER)")  # no data: so many bytes of nothing
        return Call(function.name, args)


def _set(table: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str) or len(key) > _LONGEST:
            small = isinstance(key, int | float) and -1e9 < key < 1e9
            key = Key(str(key) if small else f"a {type(key).__name__}")
        table[key] = value
    return table
