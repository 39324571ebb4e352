"""Faults: what they say in Python and on the command line, how they are collected and renamed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_kit
from qlora_kit.errors import Fault, Faults, UserError, as_field, as_flag, named, said_of

PACKAGE = Path(qlora_kit.__file__).parent


@pytest.mark.parametrize(
    ("text", "field", "flag"),
    [
        (named("eval_data"), "eval_data", "--eval-data"),
        (named("bits", 16), "bits=16", "--bits 16"),
        (named("full", True), "full=True", "--full"),
        (named("double_quant", False), "double_quant=False", "--no-double-quant"),
        (named("columns", "prompt=a,completion=b"), "columns=prompt=a,completion=b", "--columns prompt=a,completion=b"),
        (named("revision", ""), "revision=", "--revision "),
    ],
)
def test_each_door_writes_settings_in_its_own_way(text, field, flag):
    fault = Fault("seq_len", 9, f"does not go with {text}", f"Drop {text}.")
    assert str(fault) == f"seq_len = 9: does not go with {field}.\n    Drop {field}."
    assert fault.text(as_flag) == f"--seq-len = 9: does not go with {flag}.\n    Drop {flag}."


@pytest.mark.parametrize("name", ["standard input", "model.layers.0.q_proj.lora_B", "the combination"])
def test_what_is_no_setting_is_shown_as_it_is(name):
    fault = Fault(name, "x", "is wrong", "Fix it.")
    assert fault.text(as_flag) == fault.text(as_field) == f"{name} = 'x': is wrong.\n    Fix it."


def refuse_odd(value: int) -> int:
    if value % 2:
        raise UserError.of("r", value, "is odd", "Use an even one.")
    return value


def collect(*values: int) -> list[int]:
    """The even ones."""
    found = []
    with Faults() as faults:
        for value in values:
            with faults.collecting():
                found.append(refuse_odd(value))
    return found


def collect_and_end(*values: int) -> None:
    """The last one is no step of its own."""
    with Faults() as faults:
        for value in values[:-1]:
            with faults.collecting():
                refuse_odd(value)
        refuse_odd(values[-1])


def test_the_mistakes_of_several_steps_come_at_once():
    assert collect(2, 4) == [2, 4]
    with pytest.raises(UserError) as caught:
        collect(1, 2, 1, 3)
    assert [fault.value for fault in caught.value.faults] == [1, 3]  # each once


def test_a_mistake_that_ends_the_steps_comes_with_those_before_it():
    with pytest.raises(UserError) as caught:
        collect_and_end(1, 2, 3)
    assert [fault.value for fault in caught.value.faults] == [1, 3]


def test_other_errors_pass_as_they_are():
    with pytest.raises(TypeError):
        collect_and_end(1, "x")


def test_a_mistake_is_reported_under_the_name_of_what_was_given():
    faults = Fault("model", "x", f"not {named('model')}", "Guess."), Fault("bits", 3, "odd", "Guess.")
    renamed = said_of("base", instead_of="model", remedies={"Guess.": "Look."})
    with pytest.raises(UserError) as caught, renamed:
        raise UserError(faults)
    first, second = caught.value.faults
    assert str(first) == "base = 'x': not model.\n    Look."  # the text is left alone
    assert str(second) == "bits = 3: odd.\n    Guess."


# ------------------------------------------------------------- no text of a fault is written for one door alone

# where flags in a text are meant
FLAGS_ARE_MEANT = {
    "cli/generate.py": "the help of a flag",
    "cli/parse.py": "a command in backticks, with a value within",
    "release/proof/verify.py": "the words of a command",
}


class Messages(ast.NodeVisitor):
    """The texts of a module that reach a fault: literals, and what the names and functions in its arguments stand for.

    A text in backticks is a command, which is the same for everyone.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.values: dict[str, list[ast.expr]] = {}
        self.found: set[tuple[int, str]] = set()
        self.seen: set[str] = set()
        for node in ast.walk(tree):
            for name, value in _bound(node):
                self.values.setdefault(name, []).append(value)
        self.visit(tree)

    def visit_Call(self, node: ast.Call) -> None:
        if _makes_a_fault(node.func):
            for part in (*node.args, *(keyword.value for keyword in node.keywords)):
                self._follow(part)
        self.generic_visit(node)

    def _follow(self, expression: ast.expr) -> None:
        for node in ast.walk(expression):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.found.add((node.lineno, node.value))
            name = _name_in(node)
            if name is not None and name not in self.seen:
                self.seen.add(name)
                for value in self.values.get(name, ()):
                    self._follow(value)


def _name_in(node: ast.AST) -> str | None:
    """The name that is looked up, also as an attribute of something else than `self` (whose fields are values)."""
    if isinstance(node, ast.Attribute):
        return None if ast.unparse(node.value) == "self" else node.attr
    return node.id if isinstance(node, ast.Name) else None


def _bound(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that a statement binds, with the expressions that they may then stand for."""
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from ((part.id, node.value) for part in ast.walk(target) if isinstance(part, ast.Name))
    if isinstance(node, ast.FunctionDef):
        yield from ((node.name, own.value) for own in ast.walk(node) if isinstance(own, ast.Return) and own.value)
        named_defaults = zip(node.args.args[::-1], node.args.defaults[::-1], strict=False)
        yield from ((argument.arg, default) for argument, default in named_defaults)


def _makes_a_fault(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        owner = ast.unparse(function.value)
        return (function.attr, owner) == ("of", "UserError") or (
            function.attr in ("add", "add_kind") and "problems" in owner
        )
    makers = ("Fault", "Problems", "BadValueError", "TemplateError", "DroppedError", "NotYetError", "said_of")
    return isinstance(function, ast.Name) and function.id in makers


def flags_in(text: str) -> bool:
    """Whether `text` names a flag outside backticks."""
    outside = "".join(text.split("`")[::2])
    return any(part[:1].isalpha() for part in outside.split("--")[1:])


def test_what_is_looked_for_is_found():
    tree = ast.parse(
        "X = 'Add --bits 16.'\n"
        "def f(n):\n    return 'Give --r 4.'\n"
        "def g():\n"
        "    rule = f'is {n} of --lr'\n"
        "    raise UserError.of('r', n, rule, X + f(1))\n"
        "Fault('--seq-len', 1, 'see `train --help`', 'fine')\n"
        "print('--out')\n"
    )
    found = Messages(tree).found
    assert sorted(line for line, text in found if flags_in(text)) == [1, 3, 5, 7]


def test_no_fault_is_written_for_the_command_line_alone():
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        texts = Messages(ast.parse(file.read_text(encoding="utf-8"))).found
        lines = sorted({line for line, text in texts if flags_in(text)})
        if lines:
            found[file.relative_to(PACKAGE).as_posix()] = lines
    assert found.keys() == FLAGS_ARE_MEANT.keys(), found
