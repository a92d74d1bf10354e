"""Architecture: imports run down the rooms, objects keep their private names, classes and files stay small."""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# from the bottom up: a room imports from itself and from lower floors, not from others of its own floor
FLOORS = [
    {"_version"},
    {"tensors"},
    {"validation"},
    {"models"},
    {"masks", "schedules", "export"},
    {"structure"},
    {"units"},
    {"granularities", "criteria"},
    {"scopes"},
    {"updates"},
    {"training", "posttraining"},
    {"methods"},
    {"reporting"},
    {"command_line"},
    {"_moved", "__main__"},
    {"__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITH_TRAINER = {"training", "methods", "reporting"}

OF_TORCH = {"_parameters", "_values"}  # of nn.Module and of sparse tensors
METHODS, LINES, FILE_LINES = 20, 160, 250

LIGHTNING = {
    "structure/checkpoints.py",  # names, when asked, the function with which Lightning's command line makes models
}
PRIVATE = {
    "training/protocols.py",  # declares, as a protocol, a private name of Lightning
}


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def room(file: str) -> str:
    return file.removesuffix(".py").split("/")[0]


def imported(file: str) -> Iterator[str]:
    """The modules that a file imports anywhere, also late, but for type checkers alone."""
    types_only = {
        inner
        for node in ast.walk(tree(file))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree(file)):
        if node in types_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(file: str) -> set[str]:
    parts = (name.split(".") for name in imported(file))
    return {part[1] for part in parts if part[0] == "lightning_prune" and len(part) > 1} & FLOOR.keys()


def classes(file: str) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree(file)) if isinstance(node, ast.ClassDef))


def code_lines(file: str, node: ast.AST) -> int:
    """The lines of a node without blank ones, comments and docstrings."""
    source = (PACKAGE / file).read_text(encoding="utf-8")
    first, last = getattr(node, "lineno", 1), getattr(node, "end_lineno", None) or len(source.splitlines())
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.Module) and ast.get_docstring(inner) is not None:
            text = inner.body[0]
            lines.difference_update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return sum(first <= line <= last for line in lines)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@cache
def own_names(node: ast.ClassDef) -> set[str]:
    """The private names that a class defines: methods, attributes of the class, and what its methods set on self."""
    names = {inner.name for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and is_self(inner.value):
            names.add(inner.attr)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
    return {name for name in names if is_private(name)}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@cache
def private_names() -> set[str]:
    """All private names that classes of the package define, but those that are names of torch, too."""
    return {name for file in FILES for node in classes(file) for name in own_names(node)} - OF_TORCH


@cache
def local_names(file: str) -> set[str]:
    """The names under which a file imports anything of the package."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_prune")
        for alias in node.names
    }


def foreign_reads(file: str) -> Iterator[tuple[str, int]]:
    """The reads, in a file, of private names that another class or module of the package defines."""
    inside: dict[ast.AST, ast.ClassDef] = {}
    for node in classes(file):  # from the outside in: an inner class is the owner of what is in it
        inside.update(dict.fromkeys(ast.walk(node), node))
    for node in ast.walk(tree(file)):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr):
            continue
        of_a_module = isinstance(node.value, ast.Name) and node.value.id in local_names(file)
        if node.attr not in private_names() and not of_a_module:
            continue
        owner = inside.get(node)
        mine = owner is not None and node.attr in own_names(owner)
        if not mine or not is_self(node.value):
            others_own = owner is not None and isinstance(node.value, ast.Name) and node.value.id == owner.name and mine
            if not others_own:
                yield node.attr, node.lineno


def calls_of_self(node: ast.ClassDef) -> Iterator[str]:
    """The methods of its own object that the constructor of a class calls, so that a subclass might override them."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            for inner in ast.walk(method):
                if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and is_self(inner.func.value):
                    yield inner.func.attr


def test_every_room_has_a_floor() -> None:
    assert {room(file) for file in FILES} == FLOOR.keys()


def test_imports_run_down() -> None:
    upwards = {
        f"{file} imports from {found}"
        for file in FILES
        for found in rooms_imported(file) - {room(file)}
        if FLOOR[found] >= FLOOR[room(file)]
    }
    assert not upwards


def test_arithmetic_needs_no_lightning() -> None:
    known = {file: {name.split(".")[0] for name in imported(file)} for file in FILES if room(file) not in WITH_TRAINER}
    assert {file for file, names in known.items() if names & {"lightning", "pytorch_lightning"}} == LIGHTNING


def test_files_are_short() -> None:
    lengths = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {file: lines for file, lines in lengths.items() if lines > FILE_LINES}


def test_classes_are_small() -> None:
    for file in FILES:
        for node in classes(file):
            methods = sum(isinstance(inner, ast.FunctionDef) for inner in node.body)
            lines = code_lines(file, node) if (node.end_lineno or 0) - node.lineno > LINES else 0
            assert methods <= METHODS, f"{node.name} in {file}: {methods} methods"
            assert lines <= LINES, f"{node.name} in {file}: {lines} lines of code"


def test_private_names_are_read_by_their_owner() -> None:
    found = {file: list(foreign_reads(file)) for file in FILES}
    assert {file: reads for file, reads in found.items() if reads}.keys() == PRIVATE, found


def test_constructors_call_no_method_of_their_object() -> None:
    for file in FILES:
        if room(file) in ("training", "methods"):
            for node in classes(file):
                assert not [name for name in calls_of_self(node) if name != "State"], f"{node.name} in {file}"
