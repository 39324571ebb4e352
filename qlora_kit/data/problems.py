"""Collects what is wrong with a data set, so that the user hears of all of it at once."""

from __future__ import annotations

from qlora_kit.errors import Fault, UserError

SHOWN = 5  # so many faulty places are named one by one, the others counted


class Problems:
    """Faulty places of the data that `setting` names; the first few in full, the others as a count."""

    def __init__(self, setting: str, source: str, remedy: str) -> None:
        self._setting, self._source, self._remedy = setting, source, remedy
        self._faults: list[Fault] = []
        self._count = 0

    def add(self, where: str, rule: str) -> None:
        """Note that the place `where` ("train.jsonl:17") breaks `rule`."""
        self._count += 1
        if self._count <= SHOWN:
            self._faults.append(Fault(self._setting, where, rule, self._remedy))

    def raise_if_any(self) -> None:
        """Raise one `UserError` with everything noted so far."""
        hidden = self._count - len(self._faults)
        if hidden:
            rule = f"has {self._count} faulty places in all, {hidden} more than shown"
            self._faults.append(Fault(self._setting, self._source, rule, self._remedy))
        if self._faults:
            raise UserError(self._faults)
