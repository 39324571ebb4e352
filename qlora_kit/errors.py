"""Mistakes that a user can make and fix, and how they are shown.

A fault carries the name of the setting that is wrong, as Python has it (`eval_data`), and its texts name other settings
with `named`. Who shows a fault decides how settings are written: Python as fields (`bits=16`), the command line as
flags (`--bits 16`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

Written = Callable[[str, "str | None"], str]  # a setting and its value, or None, as text
_NAMED = re.compile("⟦([^=⟧]*)(?:=([^⟧]*))?⟧")


def named(setting: str, value: object = None) -> str:
    """The setting `setting`, or it with `value`, within the text of a fault; each door writes it in its own way."""
    return f"⟦{setting}⟧" if value is None else f"⟦{setting}={value}⟧"


def as_field(setting: str, value: str | None) -> str:
    """A setting as Python writes it: `bits=16`."""
    return setting if value is None else f"{setting}={value}"


def as_flag(setting: str, value: str | None) -> str:
    """A setting as the command line writes it: `--bits 16`, `--no-double-quant`."""
    flag = setting.replace("_", "-")
    if value == "False":
        return f"--no-{flag}"
    return f"--{flag}" if value in (None, "True") else f"--{flag} {value}"


def rendered(text: str, written: Written) -> str:
    """`text`, each setting that it names with `named` written as `written` has it."""
    return _NAMED.sub(lambda found: written(found[1], found[2]), text)


@dataclass(frozen=True)
class Fault:
    """One mistake: which setting, the value received (None for none), the rule it breaks, and the remedy.

    `rule` and `remedy` name other settings with `named`. What is wrong but is not a setting has a name that is not an
    identifier ("standard input", a layer's path), and is shown as it is.
    """

    setting: str
    value: object
    rule: str
    remedy: str

    def text(self, written: Written) -> str:
        """The fault in words, settings written as `written` has it."""
        setting = named(self.setting) if self.setting.isidentifier() else self.setting
        value = "" if self.value is None else f" = {self.value!r}"
        return rendered(f"{setting}{value}: {self.rule}.\n    {self.remedy}", written)

    def __str__(self) -> str:
        return self.text(as_field)


class UserError(Exception):
    """Mistakes that the user can fix, all of them at once; the command line prints them and exits with 2."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        assert self.faults, "a UserError names at least one fault"
        super().__init__(self.text(as_field))

    @classmethod
    def of(cls, setting: str, value: object, rule: str, remedy: str) -> UserError:
        """The error of a single fault."""
        return cls([Fault(setting, value, rule, remedy)])

    def text(self, written: Written) -> str:
        """All faults in words, settings written as `written` has it."""
        return "\n".join(fault.text(written) for fault in self.faults)


class Faults:
    """Collects the mistakes found in several steps, so that the user gets all of them in one message.

    with Faults() as faults:         # raises one `UserError` at its end, with every fault found
        with faults.collecting():    # a step; what it would have bound stays as it was where it failed
            tokenizer = load_tokenizer(config)
    """

    def __init__(self) -> None:
        self._found: list[Fault] = []

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            self._note(error)
            raise UserError(self._found) from None
        if kind is None:
            self.raise_if_any()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A step whose `UserError` is kept rather than raised."""
        try:
            yield
        except UserError as error:
            self._note(error)

    def add(self, fault: Fault) -> None:
        """Note `fault`."""
        if fault not in self._found:
            self._found.append(fault)

    def raise_if_any(self) -> None:
        """Raise one `UserError` with every fault found."""
        if self._found:
            raise UserError(self._found)

    def _note(self, error: UserError) -> None:
        for fault in error.faults:
            self.add(fault)


@contextmanager
def said_of(setting: str, instead_of: str, remedies: Mapping[str, str] | None = None) -> Iterator[None]:
    """Report mistakes in the setting `instead_of` under the name of `setting`, which is what the user gave.

    `remedies` maps a remedy for `instead_of` to the one that helps with `setting`.
    """
    try:
        yield
    except UserError as error:
        raise UserError(
            replace(fault, setting=setting, remedy=(remedies or {}).get(fault.remedy, fault.remedy))
            if fault.setting == instead_of
            else fault
            for fault in error.faults
        ) from None
