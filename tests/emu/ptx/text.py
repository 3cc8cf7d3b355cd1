"""Reads the PTX text that `nvcc -ptx` writes: kernels, their parameters, registers, shared memory and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

REDZONE = 64  # bytes between two shared variables, which belong to neither


class PtxError(AssertionError):
    """A kernel did what it must not, or holds what the interpreter does not know."""


@dataclass(frozen=True)
class Instruction:
    guard: str | None  # the predicate register it depends on
    negated: bool
    name: tuple[str, ...]  # "ld.global.v2.f32" split at its dots
    operands: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass
class Variable:
    """A table in global or constant memory."""

    name: str
    alignment: int
    contents: bytes
    constant: bool


@dataclass
class Code:
    """The instructions of a kernel with those of the functions it calls before them."""

    name: str
    parameters: list[tuple[str, int]]  # (name, bytes)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # "%r" of "%r<12>", or a whole name → type
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → (offset, bytes)
    shared_bytes: int = 0
    local: dict[str, tuple[int, int]] = field(default_factory=dict)  # of each thread
    local_bytes: int = 0
    dynamic: list[str] = field(default_factory=list)  # names of the launch's dynamic shared memory
    functions: dict[str, tuple[int, list[str], list[str]]] = field(default_factory=dict)  # (entry, results, parameters)
    entry: int = 0

    def type_of(self, register: str) -> str:
        found = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if found is None:
            raise PtxError(f"{self.name}: no register {register} is declared")
        return found


def split_operands(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return [*parts, current.strip()] if current.strip() else parts


PARAMETER = re.compile(
    r"\.param(?: \.align \d+)? \.[a-z](\d+)(?: \.ptr(?: \.[a-z]+)*(?: \d+)?)? ([\w$]+)(?:\[(\d+)\])?"
)
VARIABLE = re.compile(
    r"^(?:\.visible )?\.(const|global) \.align (\d+) \.b8 ([\w$]+)\[(\d+)\](?: = \{([^}]*)\})?;", re.M
)
SHARED = re.compile(r"\.shared \.align (\d+) \.[a-z](\d+) ([\w$]+)(?:\[(\d*)\])?")
SCALAR_SHARED = re.compile(r"\.shared \.[a-z](\d+) ([\w$]+)$")
LOCAL = re.compile(r"\.local \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]$")
REGISTERS = re.compile(r"\.reg \.(\w+)\s+(.*)$")
LABEL = re.compile(r"([\w$]+):(?!:)")
STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)


def _parameters(text: str) -> list[tuple[str, int]]:
    return [(name, int(bits) // 8 * int(count or 1)) for bits, name, count in PARAMETER.findall(text)]


class Module:
    """A whole file. Kernels are read when they are asked for: files run to a hundred thousand lines."""

    def __init__(self, text: str):
        self.text = re.sub(r"//[^\n]*", "", text)
        target = re.search(r"^\.target (\w+)", self.text, re.M)
        self.target = target.group(1) if target else "?"
        self._codes: dict[str, Code] = {}

    @cached_property
    def kernels(self) -> dict[str, tuple[str, str]]:
        """name → (parameters, body)"""
        found = {}
        for entry in re.finditer(r"\.entry ([\w$]+)\(([^)]*)\)", self.text):
            begin = self.text.index("{", entry.end()) + 1
            found[entry.group(1)] = (entry.group(2), self.text[begin : self.text.index("\n}", begin)])
        return found

    @cached_property
    def functions(self) -> dict[str, tuple[str, str, str]]:
        """name → (results, parameters, body)"""
        found = {}
        for entry in re.finditer(r"^\.func\s+(?:\(([^)]*)\)\s*)?([\w$]+)\s*\(([^)]*)\)\s*\{", self.text, re.M):
            body = self.text[entry.end() : self.text.index("\n}", entry.end())]
            found[entry.group(2)] = (entry.group(1) or "", entry.group(3), body)
        return found

    @cached_property
    def variables(self) -> list[Variable]:
        found = []
        for space, alignment, name, size, values in VARIABLE.findall(self.text):
            contents = bytes(int(v) for v in values.split(",")) if values else b""
            found.append(Variable(name, int(alignment), contents.ljust(int(size), b"\0"), space == "const"))
        return found

    @cached_property
    def dynamic_names(self) -> list[str]:
        return re.findall(r"^\.extern \.shared [^;]*?([\w$]+)\[\]", self.text, re.M)

    @cached_property
    def module_shared(self) -> list[str]:
        return re.findall(r"^\.shared [^;]*", self.text, re.M)

    def code(self, name: str) -> Code:
        if name not in self._codes:
            parameters, body = self.kernels[name]
            code = Code(name, _parameters(parameters), dynamic=self.dynamic_names)
            for declaration in self.module_shared:
                _declare_shared(code, " ".join(declaration.split()))
            # Functions first: at a lower address, their threads run on until they are back with the others.
            for function, (results, arguments, function_body) in self.functions.items():
                if re.search(rf"\b{re.escape(function)}\b", body):
                    names = [[n for n, _ in _parameters(part)] for part in (results, arguments)]
                    code.functions[function] = (len(code.instructions), *names)
                    _read_body(code, function_body, function + "/")
            code.entry = len(code.instructions)
            _read_body(code, body, "")
            self._codes[name] = code
        return self._codes[name]


def _declare_shared(code: Code, statement: str) -> None:
    found = SHARED.match(statement)
    if found:
        alignment, bits, name, count = int(found[1]), int(found[2]), found[3], found[4]
        size = bits // 8 * int(count or 1)
    elif found := SCALAR_SHARED.match(statement):
        alignment, name, size = int(found[1]) // 8, found[2], int(found[1]) // 8
    else:
        raise PtxError(f"{code.name}: a declaration of shared memory that the interpreter cannot read: {statement}")
    offset = -(-code.shared_bytes // alignment) * alignment
    code.shared[name] = (offset, size)
    code.shared_bytes = offset + size + REDZONE


def _read_body(code: Code, body: str, prefix: str) -> None:
    """Adds the body's instructions. Names declared in it get `prefix`, those of an inner { } a number too."""
    scopes: list[dict[str, str]] = [{}]
    count, at = 0, 0

    def declare(name: str, kind: str | None) -> None:
        nonlocal count
        if len(scopes) > 1:
            count += 1
            scopes[-1][name] = f"{prefix}{name}#{count}."
        elif prefix:
            scopes[-1][name] = f"{prefix}{name}"
        if kind:
            code.registers[scopes[-1].get(name, name)] = kind

    def renamed(match: re.Match) -> str:
        name = match[0]
        stem = name.rstrip("0123456789")
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
            if stem in scope and stem.startswith("%"):
                return scope[stem] + name[len(stem) :]
        return name

    while at < len(body):
        if body[at].isspace():
            at += 1
        elif body[at] == "{":
            scopes.append({})
            at += 1
        elif body[at] == "}":
            scopes.pop()
            at += 1
        elif label := LABEL.match(body, at):
            code.labels[prefix + label[1]] = len(code.instructions)
            at = label.end()
        else:
            end = body.index(";", at)
            statement = " ".join(body[at:end].split())
            at = end + 1
            if statement.startswith(".reg"):
                kind, names = REGISTERS.match(statement).groups()
                for name in names.split(","):
                    declare(re.sub(r"<\d+>", "", name.strip()), kind)
            elif statement.startswith(".shared"):
                _declare_shared(code, statement)
            elif found := LOCAL.match(statement):
                offset = -(-code.local_bytes // int(found[1])) * int(found[1])
                code.local[found[2]] = (offset, int(found[3]))
                code.local_bytes = offset + int(found[3]) + REDZONE
            elif statement.startswith(".param"):
                declare(PARAMETER.match(statement)[2], None)
            elif statement.startswith(".pragma"):
                pass
            else:
                found = STATEMENT.match(statement)
                if statement.startswith(".") or found is None:
                    raise PtxError(f"{code.name}: the interpreter cannot read {statement!r}")
                negated, guard, name, operands = found.groups()
                rename = re.compile(r"%?[A-Za-z_$][\w$]*")
                parts = [prefix + o if o.startswith("$") else rename.sub(renamed, o) for o in split_operands(operands)]
                code.instructions.append(
                    Instruction(
                        rename.sub(renamed, guard) if guard else None,
                        bool(negated),
                        tuple(name.split(".")),
                        tuple(parts),
                        statement,
                    )
                )
