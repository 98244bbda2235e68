"""PTX as text: an entry's parameters, its registers, and its statements in blocks."""

import re
from dataclasses import dataclass, field

import numpy as np

SPECIAL = ("%tid.", "%ntid.", "%ctaid.", "%nctaid.")  # with x, y or z
CARRY = "%cc"
WARP = 32
OF_WARPS = ("shfl", "redux", "vote", "mma", "ldmatrix", "stmatrix")  # what all threads of a warp do together
OF_PROGRAMS = ("bar", "barrier", "wgmma")
BITS = {".pred": 0, ".b8": 8, ".b16": 16, ".b32": 32, ".b64": 64}

_TOKEN = re.compile(
    r"""\s*(?:
    \.(?P<loc>loc)\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*\n |
    (?P<label>[$\w]+):(?!:) |
    (?P<brace>[{}]) |
    (?P<statement>[^;]+);
    )""",
    re.VERBOSE,
)
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<params>[^)]*)\)(?P<rules>[^{]*)\{")
_PARAM = re.compile(r"\.param\s+\.(\w+)\s[^,]*?([\w$]+)\s*(?:,|$)")
_ARRAY = re.compile(r"\.(?:global|const)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\};")
_OWN = re.compile(r"\.(?:shared|local)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[")
_RANGE = re.compile(r"(%?[\w$]+)<(\d+)>")
_NAME = re.compile(r"[%$\w]+")


class Unknown(Exception):
    """Something of PTX that is not emulated."""


class Fault(Exception):
    """What a GPU would refuse, or leave undefined."""


@dataclass(frozen=True)
class Statement:
    """``@guard opcode.modifiers operands``, and the line of Python that it comes from."""

    text: str
    guard: tuple[str, bool] | None  # a predicate, and whether it is negated
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    place: str

    @property
    def type(self):
        return self.modifiers[-1]


@dataclass
class Block:
    """Statements that run one after another; then a jump, if its guard holds, or the next block.

    As many threads as ``together`` enter at once.
    """

    together: int = 1
    statements: list[Statement] = field(default_factory=list)
    jump: Statement | None = None


@dataclass
class Entry:
    """A kernel. Registers are numbered in the order of ``registers``, which gives the type of each."""

    name: str
    threads: int
    params: list[tuple[str, str]]
    registers: dict[str, np.dtype]
    arrays: dict[str, bytes]  # constants of the module
    symbols: set[str]  # names of memory of programs or threads, which begins at 0
    local_bytes: int
    blocks: list[Block]
    labels: dict[str, int]


def unsigned(bits):
    """Of a register: predicates are booleans."""
    return np.dtype(f"u{bits // 8}" if bits else "?")


def elements(operand):
    """Of a vector ``{a, b}``, or the operand alone."""
    return [x.strip() for x in operand.strip("{} \t\n").split(",")] if operand.startswith("{") else [operand]


def parsed(ptx):
    """The one entry of a module."""
    files = {number: name.rsplit("/", 1)[-1] for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)}
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", ptx), flags=re.DOTALL)
    head = _ENTRY.search(text)
    if head is None:
        raise Unknown("a module without an entry")
    threads = re.search(r"\.reqntid\s+(\d+)", head["rules"])
    entry = Entry(
        name=head["name"],
        threads=int(threads[1]) if threads else 0,
        params=[(name, kind) for kind, name in _PARAM.findall(head["params"])],
        registers={CARRY: unsigned(32)},
        arrays={name: bytes(int(x) for x in data.split(",")) for name, data in _ARRAY.findall(text)},
        symbols=set(_OWN.findall(text)),
        local_bytes=0,
        blocks=[Block()],
        labels={},
    )
    _Body(entry, files).read(text, head.end())
    return entry


class _Body:
    """What stands between the braces of an entry."""

    def __init__(self, entry, files):
        self._entry, self._files = entry, files
        self._place = "?"
        self._scopes = [{}]  # what names declared in inner braces are called
        self._inner = 0

    def read(self, text, position):
        while self._scopes:
            token = _TOKEN.match(text, position)
            position = token.end()
            if token["loc"]:
                self._place = f"{self._files.get(token['file'], '?')}:{token['line']}"
            elif token["label"]:
                self._start(token["label"])
            elif token["brace"] == "{":
                self._scopes.append(dict(self._scopes[-1]))
            elif token["brace"]:
                self._scopes.pop()
            else:
                self._statement(token["statement"].strip())

    def _start(self, label):
        blocks = self._entry.blocks
        if blocks[-1].statements or blocks[-1].together > 1:
            blocks.append(Block())
        self._entry.labels[label] = len(blocks) - 1

    def _statement(self, text):
        if text.startswith((".reg", ".local", ".shared")):
            self._declare(text)
        elif not text.startswith("."):
            self._add(text)

    def _declare(self, text):
        kind, _, names = re.sub(r"\.align\s+\d+", "", text).partition(" ")
        width, names = names.split(None, 1)
        if kind == ".local":
            self._entry.local_bytes += int(re.search(r"\[(\d+)\]", names)[1])
        elif kind == ".reg":
            bits = BITS.get(re.sub(r"^\.[usf](?=\d)", ".b", width))
            if bits is None:
                raise Unknown(f"registers of {width}")
            for name in names.split(","):
                self._registers(name.strip(), unsigned(bits))

    def _registers(self, name, kind):
        several = _RANGE.fullmatch(name)
        if several:
            self._entry.registers.update({f"{several[1]}{i}": kind for i in range(int(several[2]))})
        elif len(self._scopes) > 1:
            self._inner += 1
            self._scopes[-1][name] = f"{name}@{self._inner}"
            self._entry.registers[f"{name}@{self._inner}"] = kind
        else:
            self._entry.registers[name] = kind

    def _add(self, text):
        if self._scopes[-1]:
            text = _NAME.sub(lambda found: self._scopes[-1].get(found[0], found[0]), text)
        statement = _statement(text, self._place)
        blocks = self._entry.blocks
        if statement.opcode in ("bra", "ret", "exit"):
            blocks[-1].jump = statement
            blocks.append(Block())
            return
        together = self._together(statement)
        if together > blocks[-1].together:
            blocks.append(Block(together))
        blocks[-1].statements.append(statement)

    def _together(self, statement):
        is_of_warp = statement.opcode in OF_WARPS or "warp" in statement.modifiers
        return WARP if is_of_warp else self._entry.threads if statement.opcode in OF_PROGRAMS else 1


def _statement(text, place):
    guard = None
    if text.startswith("@"):
        predicate, text = text[1:].split(None, 1)
        guard = predicate.lstrip("!"), predicate.startswith("!")
    opcode, _, rest = text.replace("\t", " ").partition(" ")
    opcode, *modifiers = opcode.split(".")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
    return Statement(text, guard, opcode, tuple(modifiers), tuple(x.strip() for x in operands), place)
