"""What a user can cause and mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """One mistake: which setting, the value received, the rule it breaks, and the remedy."""

    setting: str
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.setting} = {self.value!r}: {self.rule}.\n    {self.remedy}"


class UserError(Exception):
    """Mistakes that the user can mend, all of them at once; the command line prints it and exits with 2."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        assert self.faults, "a UserError names at least one fault"
        super().__init__("\n".join(str(fault) for fault in self.faults))

    @classmethod
    def of(cls, setting: str, value: object, rule: str, remedy: str) -> UserError:
        """The error of a single fault."""
        return cls([Fault(setting, value, rule, remedy)])


class Faults:
    """Gathers the mistakes of several steps, so that the user hears of all at once."""

    def __init__(self) -> None:
        self._found: list[Fault] = []

    def collect(self, step: Callable[[], T]) -> T | None:
        """The result of `step`; None where it raised a `UserError`, whose faults are kept."""
        try:
            return step()
        except UserError as error:
            self._found += [fault for fault in error.faults if fault not in self._found]
            return None

    def add(self, fault: Fault) -> None:
        """Note `fault`."""
        if fault not in self._found:
            self._found.append(fault)

    def raise_if_any(self) -> None:
        """Raise one `UserError` with every fault found."""
        if self._found:
            raise UserError(self._found)


@contextmanager
def said_of(setting: str, instead_of: str, old_remedy: str = "", remedy: str = "") -> Iterator[None]:
    """Say mistakes of the setting `instead_of` of `setting`, which is what the user gave.

    `remedy` stands in the place of `old_remedy`, where that does not help with `setting`.
    """
    try:
        yield
    except UserError as error:
        raise UserError(
            replace(fault, setting=setting, remedy=fault.remedy.replace(old_remedy, remedy))
            if fault.setting == instead_of
            else fault
            for fault in error.faults
        ) from None
