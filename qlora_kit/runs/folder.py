"""The run folder: written beside its final place and renamed when complete, so that it is complete or absent.

runs/x/            run.json, adapter/ (or model/ after full fine-tuning), metrics.jsonl, checkpoints/, README.md
runs/x.partial/    the same while the run goes on; an interrupted run is resumed from here

A run holds a lock in the folder that it works in. Nothing that was not made by a run is ever removed, in either place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_kit.errors import UserError, named
from qlora_kit.system.files import check_writable, empty_folder, unwritable, write_text
from qlora_kit.system.locks import LOCK_FILE, Lock, is_held, take

RUN_FILE, METRICS_FILE, CARD_FILE, CHECKPOINTS = "run.json", "metrics.jsonl", "README.md", "checkpoints"
LABELS_FILE = "labels.json"  # beside the weights of a model with labels
PARTIAL = ".partial"
STATE_FILE = "trainer_state.json"  # of a checkpoint, written last
IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run is written (`working`) and where it is put when complete (`final`), replacing it with `overwrite`.

    While the run works it holds the `lock`.
    """

    final: Path
    working: Path
    overwrite: bool = field(default=False, compare=False)
    lock: Lock | None = field(default=None, compare=False, repr=False)

    @classmethod
    def at(cls, final: Path) -> RunFolder:
        """The run folder that will be at `final`; nothing is created yet. Raises `UserError` for paths such as `..`."""
        if final.name in ("", ".."):
            raise UserError.of("out", str(final), "does not name a folder", f"For example {named('out', 'runs/x')}.")
        return cls(final=final, working=final.with_name(final.name + PARTIAL))

    @classmethod
    def create(cls, out: str | None, name: str, overwrite: bool) -> RunFolder:
        """Create the working folder of a new run. Raises `UserError` if it may not or cannot be created."""
        final = Path(out) if out is not None else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = cls.at(final)
        folder.check_place(overwrite)
        folder = folder.begun(overwrite)
        try:
            empty_folder(folder.working, keep=LOCK_FILE)
            folder.checkpoints.mkdir()
        except OSError as error:
            folder.release()
            raise unwritable(str(final), error) from None
        return folder

    def begun(self, overwrite: bool) -> RunFolder:
        """The same with the lock of the working folder. Raises `UserError` if another run holds it."""
        try:
            lock = take(self.working / LOCK_FILE, wait=False)
        except OSError as error:
            raise unwritable(str(self.final), error) from None
        if lock is None:
            raise self._busy()
        return replace(self, overwrite=overwrite, lock=lock)

    def release(self) -> None:
        """Release the working folder, whatever is in it."""
        if self.lock is not None:
            self.lock.release()

    def check_place(self, overwrite: bool) -> None:
        """Check that the place can be written, and that nothing would be overwritten unasked. Raises `UserError`.

        Even with `overwrite`, only finished runs are replaced: no other folder, and no run that is still going on.
        """
        if self.final.name.endswith(PARTIAL):
            rule = f"ends in {PARTIAL}, which marks the folders of unfinished runs"
            raise UserError.of("out", str(self.final), rule, "Choose another name.")
        check_writable(self.final)
        self.check_final(overwrite)
        self.check_idle()
        if os.path.lexists(self.working) and not overwrite:
            resume = f"Continue it with {named('resume', self.working)}, or add"
            remedy = f"{resume if complete_checkpoints(self.working) else 'Add'} {named('overwrite', True)}."
            raise UserError.of("out", str(self.final), f"there is an unfinished run in {self.working}", remedy)

    def check_final(self, overwrite: bool) -> None:
        """Check that the run may be put in its final place. Raises `UserError`."""
        if not os.path.lexists(self.final):
            return
        if self.final.is_symlink():
            remedy = f"Give the folder that it points to, {self.final.resolve()}, or choose another."
            raise UserError.of("out", str(self.final), "is a symbolic link, which is never replaced", remedy)
        if not _may_be_replaced(self.final):
            rule = "already exists and is not a run folder, so it is never replaced"
            raise UserError.of("out", str(self.final), rule, "Choose another folder.")
        if not overwrite:
            remedy = f"Choose another folder, or add {named('overwrite', True)}."
            raise UserError.of("out", str(self.final), "already exists", remedy)

    def check_idle(self) -> None:
        """Check that an existing working folder is a run's, and that no run works in it. Raises `UserError`."""
        if not os.path.lexists(self.working):
            return
        if not _is_working_folder(self.working):
            rule = f"needs {self.working}, which exists and is not a run's, so it is never replaced"
            raise UserError.of("out", str(self.final), rule, f"Move that away, or choose another {named('out')}.")
        if is_held(self.working / LOCK_FILE):
            raise self._busy()

    def _busy(self) -> UserError:
        rule = f"another run is working in {self.working}"
        return UserError.of("out", str(self.final), rule, "Wait for it, stop it first, or choose another folder.")

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer writes its checkpoints."""
        return self.working / CHECKPOINTS

    def finish(self) -> None:
        """Move the complete run to its final place, which is checked again, since much may have happened meanwhile.

        Raises `UserError` if something else is there now; the complete run then stays in the working folder.
        """
        try:
            self.check_final(self.overwrite)
            self._put()
        except UserError:
            raise self._taken() from None
        except OSError as error:
            if error.errno in IN_THE_WAY:
                raise self._taken() from None
            raise
        (self.final / LOCK_FILE).unlink(missing_ok=True)
        self.release()

    def _put(self) -> None:
        old = None
        if self.final.exists():
            old = Path(tempfile.mkdtemp(dir=self.final.parent, prefix=f".{self.final.name}.old-"))
            self.final.rename(old)
        self.working.rename(self.final)
        if old is not None:
            shutil.rmtree(old)

    def _taken(self) -> UserError:
        rule = f"appeared while the run was going on; the complete run is in {self.working}"
        return UserError.of("out", str(self.final), rule, "Move one of the two to another place.")

    def discard_if_empty(self) -> bool:
        """Remove the working folder unless a checkpoint in it can be resumed; returns whether it was removed."""
        if not self.working.exists() or complete_checkpoints(self.working):
            return False
        shutil.rmtree(self.working)
        return True

    def remove_unfinished(self) -> None:
        """Remove the working folder of a run that has ended; anything else stays."""
        if _is_working_folder(self.working) and not is_held(self.working / LOCK_FILE):
            shutil.rmtree(self.working, ignore_errors=True)


def _may_be_replaced(folder: Path) -> bool:
    """Whether `folder` is a run, or empty: anything else may be of value to its owner."""
    return folder.is_dir() and (_is_record(folder / RUN_FILE) or not any(folder.iterdir()))


def _is_record(file: Path) -> bool:
    """Whether `file` is the record of a run: other programs may use the same file name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("settings"), dict) and "base_hash" in content


def _is_working_folder(folder: Path) -> bool:
    """Whether a run works or worked in `folder`; before runs had locks, they had checkpoints or a record."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if (folder / LOCK_FILE).is_file() or _may_be_replaced(folder):
        return True
    only_begun = {file.name for file in folder.iterdir()} == {CHECKPOINTS}
    return only_begun and (folder / CHECKPOINTS).is_dir() and not any((folder / CHECKPOINTS).iterdir())


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: the Trainer writes their state file last."""
    found = [p for p in (run / CHECKPOINTS).glob("checkpoint-*") if _step(p) is not None and _is_complete(p)]
    return sorted(found, key=lambda p: _step(p) or 0)


def _step(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on: a complete checkpoint, its run, and whether that run is unfinished."""

    checkpoint: Path
    run: Path
    unfinished: bool

    @property
    def step(self) -> int:
        return _step(self.checkpoint) or 0

    @property
    def settings_file(self) -> Path:
        return self.run / RUN_FILE

    @property
    def total(self) -> int:
        """The planned number of steps of the run that wrote the checkpoint."""
        return int(self._state["max_steps"])

    @property
    def best_metric(self) -> float | None:
        """The figure of the best evaluation so far; None before any."""
        best: float | None = self._state.get("best_metric")
        return best

    @property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return state


def find_resume_point(path: str) -> ResumePoint:
    """The newest complete checkpoint of the run folder `path`, or `path` itself if it is a checkpoint.

    Raises `UserError` if there is none.
    """
    given = Path(path)
    if given.name.startswith("checkpoint-") and given.is_dir():
        if not _is_complete(given):
            raise UserError.of(
                "resume", path, "the checkpoint is not complete", "Give an older one, or the run folder."
            )
        run = given.absolute().parent.parent
        return ResumePoint(given, run, run.name.endswith(PARTIAL))
    for run in (given.with_name(given.name + PARTIAL), given):  # what was going on last comes first
        whole = complete_checkpoints(run)
        if whole:
            return ResumePoint(whole[-1], run, run.name.endswith(PARTIAL))
    raise UserError.of(
        "resume", path, "has no complete checkpoint", "Give a run folder, or runs/x/checkpoints/checkpoint-N."
    )


def _goes_on_in_place(point: ResumePoint, out: str | None) -> RunFolder | None:
    """The unfinished run of `point`, if it goes on where it is; None for a run of its own."""
    final = Path(str(point.run).removesuffix(PARTIAL))
    is_same = out is None or Path(out).absolute() == final.absolute()
    return RunFolder(final=final, working=point.run) if point.unfinished and is_same else None


def check_place(point: ResumePoint | None, out: str | None, overwrite: bool) -> None:
    """Make the checks of `begin` early, before anything else is done. Raises `UserError`."""
    own = None if point is None else _goes_on_in_place(point, out)
    if own is not None:
        check_writable(own.working)
        own.check_final(overwrite)
        own.check_idle()
    elif out is not None:
        RunFolder.at(Path(out)).check_place(overwrite)


def begin(point: ResumePoint | None, out: str | None, name: str, overwrite: bool) -> RunFolder:
    """The folder of a run, new or resumed at `point`. Raises `UserError` if it may not or cannot be created."""
    if point is None:
        return RunFolder.create(out, name, overwrite)
    return continue_run(point, out, name, overwrite)


def continue_run(point: ResumePoint, out: str | None, name: str, overwrite: bool) -> RunFolder:
    """The folder of a resumed run: the unfinished run itself, or a new one if `out` names another folder.

    Checkpoints and metrics after the resumed checkpoint are dropped; earlier metrics are kept.
    """
    own = _goes_on_in_place(point, out)
    if own is None:
        folder = RunFolder.create(out, name, overwrite)
    else:
        own.check_final(overwrite)
        folder = own.begun(overwrite)
        for checkpoint in folder.checkpoints.glob("checkpoint-*"):
            if not _is_complete(checkpoint) or (_step(checkpoint) or 0) > point.step:
                shutil.rmtree(checkpoint)
    _carry_metrics(point, folder)
    return folder


def _carry_metrics(point: ResumePoint, folder: RunFolder) -> None:
    source = point.run / METRICS_FILE
    lines = source.read_text(encoding="utf-8").split("\n") if source.is_file() else []  # not at U+2028
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= point.step]
    write_text(folder.working / METRICS_FILE, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> int | None:
    """The step of a line of metrics; None for one that was cut off."""
    try:
        return int(json.loads(line).get("step", 0))
    except json.JSONDecodeError:
        return None


def append_metrics(folder: RunFolder, metrics: Mapping[str, Any]) -> None:
    """Add one line to `metrics.jsonl`."""
    with (folder.working / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics, ensure_ascii=False) + "\n")
