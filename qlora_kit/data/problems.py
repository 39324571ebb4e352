"""Collects the faults of a data set, so that the user gets all of them in one message."""

from __future__ import annotations

from qlora_kit.errors import Fault, UserError

SHOWN = 5  # faulty places that are named one by one; the others are counted


class Problems:
    """Faulty places in the data of `setting`; the first few in full, the others as a count."""

    def __init__(self, setting: str, source: str, remedy: str) -> None:
        self._setting, self._source, self._remedy = setting, source, remedy
        self._faults: list[Fault] = []
        self._count = 0
        self._kinds: dict[tuple[str, str], tuple[str, int]] = {}  # rule and remedy: the first place, and how many

    def add(self, where: str, rule: str) -> None:
        """Note that the place `where` ("train.jsonl:17") breaks `rule`."""
        self._count += 1
        if self._count <= SHOWN:
            self._faults.append(Fault(self._setting, where, rule, self._remedy))

    def add_kind(self, where: str, rule: str, remedy: str) -> None:
        """Note that the place `where` breaks a `rule` that many may break: only the first is named, all are counted."""
        first, count = self._kinds.get((rule, remedy), (where, 0))
        self._kinds[rule, remedy] = first, count + 1

    def raise_if_any(self) -> None:
        """Raise one `UserError` with everything noted so far."""
        hidden = self._count - len(self._faults)
        if hidden:
            rule = f"has {self._count} faulty places in all, {hidden} more than shown"
            self._faults.append(Fault(self._setting, self._source, rule, self._remedy))
        for (rule, remedy), (first, count) in self._kinds.items():
            said = rule if count == 1 else f"{rule} (the first of {count:,} such places)"
            self._faults.append(Fault(self._setting, first, said, remedy))
        if self._faults:
            raise UserError(self._faults)
