"""The shape of the package, read off its source without importing it: rooms, names, lengths, what imports are heavy."""

from __future__ import annotations

import ast
import functools
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qlora_kit"
MAX_ENTRIES = 22
MAX_LINES, MEDIAN_LINES, P90_LINES = 50, 8, 19
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "matplotlib", "sklearn", "optuna"}

MAX_POSITIONAL = 3
BUILT_BY_PLACE = {"errors.py: Fault"}  # its four texts stand in the order in which they are read

LIGHT = ("qlora_kit", "qlora_kit.errors", "qlora_kit.config", "qlora_kit.cli.main")
"""What must not bring in `HEAVY` when it is imported: settings, errors, and the parser of the command line."""

OF_NO_MODULE = {  # tests in a room that are about no single module of it: their name, and what they are about
    "killed": "a process killed at any moment",
    "runs": "whole runs of a task",
    "data": "the real data sets",
    "families": "each family of models",
    "cli/help": "the help pages as a user sees them",
    "lean/toy_piece": "a piece that is added to a copy of the package",
    "optim/toy_optimizer": "an optimizer that is added to a copy of the package",
    "tasks/toy_task": "a task that is added to a copy of the package",
    "demo/demo": "the demo from end to end",
    "memory/accuracy": "plans against an independent record",
    "memory/profile/profile": "profiles from end to end",
    "model/span_head": "the head for question answering, across loading, factors and plans",
    "release/command": "the command from end to end",
    "release/input": "all that a merge may be given wrongly",
    "release/kinds": "each kind of adapter and base",
    "release/memory": "the memory of a merge",
    "release/proof/proof": "proofs from end to end",
    "search/search": "searches from end to end",
    "tasks/classification/plan": "the plan of a classifier",
    "training/train": "training from end to end",
}
OF_THE_PROJECT = {"configs", "distribution", "examples", "upgrades"}  # rooms of what stands beside the package
OF_THE_WHOLE = {"devices", "gpu", "house"}  # tests beside the rooms: conftest's devices, a GPU's, this one


@functools.cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    """Every module of the package by its path within it, parsed."""
    files = sorted(PACKAGE.rglob("*.py"))
    return tuple((file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))) for file in files)


def functions() -> Iterator[tuple[str, int]]:
    """Every function and method, nested ones too, with its lines from `def` to its end, the docstring among them."""
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                yield f"{path}: {node.name}", node.end_lineno - node.lineno + 1


def test_the_top_of_the_package_is_seen_at_a_glance():
    entries = {entry.name for entry in PACKAGE.iterdir() if entry.name != "__pycache__"}
    assert len(entries) <= MAX_ENTRIES, sorted(entries)
    folders = {entry for entry in PACKAGE.rglob("*") if entry.is_dir() and any(entry.glob("*.py"))}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_functions_are_short():
    assert {name: lines for name, lines in functions() if lines > MAX_LINES} == {}
    lengths = sorted(lines for _, lines in functions())
    assert statistics.median(lengths) <= MEDIAN_LINES
    assert lengths[len(lengths) * 9 // 10] <= P90_LINES


def test_a_class_name_has_one_meaning():
    names = Counter(
        node.name
        for _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} == set()


def test_large_records_are_built_by_keyword():
    assert {f"{path}: {node.name}" for path, node in records() if not is_keyword_only(node)} == BUILT_BY_PLACE


def records() -> Iterator[tuple[str, ast.ClassDef]]:
    """The dataclasses of more than `MAX_POSITIONAL` fields, each with the path of its module."""
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and decorator_of(node) and n_fields(node) > MAX_POSITIONAL:
                yield path, node


def n_fields(node: ast.ClassDef) -> int:
    return sum(isinstance(line, ast.AnnAssign) for line in node.body)


def decorator_of(node: ast.ClassDef) -> str:
    """How the class is made a dataclass; "" where it is none."""
    return next((text for d in node.decorator_list if (text := ast.unparse(d)).startswith("dataclass")), "")


def is_keyword_only(node: ast.ClassDef) -> bool:
    return "kw_only=True" in decorator_of(node)


def test_settings_errors_and_the_parser_are_light():
    trees = {module_name(path): tree for path, tree in modules()}
    reached, waiting = set(), [name for name in trees if name in LIGHT or name.startswith("qlora_kit.config.")]
    assert len(waiting) > len(LIGHT), "the settings were found"
    while waiting:
        name = waiting.pop()
        reached.add(name)
        for wanted in imported_at_once(trees[name]):
            assert wanted.split(".")[0] not in HEAVY, f"{name} imports {wanted}"
            parts = wanted.split(".")
            known = {".".join(parts[: n + 1]) for n in range(len(parts))} & trees.keys()
            waiting += known - reached
    assert "qlora_kit.config.settings" in reached


def module_name(path: str) -> str:
    """`config/settings.py` as Python imports it."""
    return ".".join(("qlora_kit", *Path(path).with_suffix("").parts)).removesuffix(".__init__")


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """What a module imports when it is imported: not within functions, and not for type checkers alone."""
    waiting: list[ast.AST] = [*tree.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "no relative imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def test_every_test_stands_where_the_module_does():
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        room, stem = file.parent.relative_to(ROOT / "tests"), file.stem.removeprefix("test_")
        if room.parts[:1] and room.parts[0] in OF_THE_PROJECT:
            continue
        home = ROOT if room.parts[:1] == ("benchmarks",) else PACKAGE
        assert (home / room).is_dir(), f"{file}: {room} is no room of {home.name}"
        is_of_module = (home / room / f"{stem}.py").is_file() or (home / room / stem / "__init__.py").is_file()
        known = OF_THE_WHOLE if room == Path() else OF_NO_MODULE
        assert is_of_module or stem in known or f"{room.as_posix()}/{stem}" in known, f"{file} is of no module"


def test_no_exception_outlives_its_reason():
    stems = {
        file.relative_to(ROOT / "tests").with_suffix("").as_posix().replace("test_", "", 1)
        for file in (ROOT / "tests").rglob("test_*.py")
    }
    for name in OF_NO_MODULE:
        assert name in stems if "/" in name else any(stem.rpartition("/")[2] == name for stem in stems), name
