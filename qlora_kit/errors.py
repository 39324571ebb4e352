"""What a user can cause and mend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
