"""The script for a GPU: whatever hangs or dies, it ends in time with every other result written; and its table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu.journal import DONE, Found, Journal, by_phase, kept_lines, read_lines  # noqa: E402
from gpu.phases import phases  # noqa: E402
from gpu.promises import PROMISES, judge, table  # noqa: E402
from gpu.runner import Phase, run_phases  # noqa: E402

WHERE = {
    "device": "NVIDIA H200",
    "capability": [9, 0],
    "memory_bytes": 139 << 30,
    "commit": "abc1234",
    "versions": {"torch": "2.11.0"},
}
HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print('{"child": %d}' % child.pid, flush=True)
time.sleep(600)
"""
DIES = "import os, signal; print('{\"n\": 1}', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"


def phase(name, code, *, together=False, limit_s=60.0, estimate_s=0.1):
    return Phase(name, "", (sys.executable, "-c", code), estimate_s, limit_s, together)


def says(**row):
    return f"print({json.dumps(json.dumps(row))})"


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "out", WHERE, rehearsal=False)


def run(these, journal, tmp_path, seconds=100.0):
    began_s = time.monotonic()
    run_phases(these, journal, tmp_path / "scratch", began_s + seconds, say=lambda line: None)
    return by_phase(read_lines(journal.file)), time.monotonic() - began_s


def is_gone(pid, within_s=5.0):
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_what_hangs_and_what_dies_cost_their_own_result_only(journal, tmp_path):
    these = [
        phase("good", says(n=1)),
        phase("hangs", HANGS, limit_s=4),
        phase("dies", DIES),
        phase("beside", says(n=2), together=True),
        phase("hangs beside", HANGS, together=True, limit_s=4),
        phase("fails", "import sys; print('why', file=sys.stderr); sys.exit(7)"),
        phase("last", says(n=3)),
    ]
    found, seconds = run(these, journal, tmp_path)
    assert seconds < 60
    assert [found[name].rows for name in ("good", "beside", "last")] == [[{"n": 1}], [{"n": 2}], [{"n": 3}]]
    assert [found[name].status for name in ("good", "beside", "last")] == [DONE] * 3
    assert found["hangs"].status == found["hangs beside"].status == "ended at its limit of 4 s"
    assert (found["dies"].status, found["dies"].rows) == ("failed: signal 11", [{"n": 1}])
    assert (found["fails"].status, found["fails"].tail) == ("failed: exit code 7", "why")
    assert all(is_gone(found[name].rows[0]["child"]) for name in ("hangs", "hangs beside"))


@pytest.mark.slow
def test_no_phase_goes_on_beyond_the_end_or_is_begun_too_late(journal, tmp_path):
    these = [phase("good", says(n=1)), phase("hangs", HANGS, limit_s=600), phase("late", says(n=2), estimate_s=60)]
    found, seconds = run(these, journal, tmp_path, seconds=6.0)
    assert seconds < 12
    assert found["hangs"].status.startswith("ended at its limit")
    assert found["late"].status.startswith("not begun")
    assert found["good"].status == DONE


def test_a_row_is_on_the_disk_while_its_phase_is_at_work(journal, tmp_path):
    code = f"""
import json, time
print('{{"n": 1}}', flush=True)
time.sleep(1)
print(json.dumps({{"seen": open({str(journal.file)!r}).read().count('"n": 1')}}))
"""
    found, _ = run([phase("slow", code, limit_s=60)], journal, tmp_path)
    assert found["slow"].rows == [{"n": 1}, {"seen": 1}]


def test_the_whole_ends_in_time_though_the_script_itself_hangs():
    code = """
import subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import on_gpu
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
on_gpu.end_without_fail(time.monotonic() + 1)
time.sleep(600)
"""
    began_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(BENCHMARKS)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "time is over" in done.stderr
    assert time.monotonic() - began_s < 30
    assert is_gone(int(done.stdout))


def test_a_flood_of_rows_leaves_space_for_the_way_back(journal, tmp_path, monkeypatch):
    monkeypatch.setattr("gpu.journal.MOST_BYTES", 4000)
    journal.row("wordy", {"text": "x" * 100_000})
    run([phase("floods", "for n in range(2000): print('{\"n\": %d}' % n)", limit_s=60)], journal, tmp_path)
    assert journal.file.stat().st_size <= 4000
    assert "too long a row" in journal.file.read_text()


# --------------------------------------------------------------------------- what is held already


def line(phase_, *, rehearsal=False, **what):
    return {"phase": phase_, "rehearsal": rehearsal, "where": WHERE, **what}


def ended(phase_, status=DONE, seconds=5.0, **more):
    return line(phase_, status=status, seconds=seconds, tail="", **more)


def test_of_a_phase_the_last_go_that_was_done_counts():
    lines = [
        *(line("a", row={"n": 1}), ended("a")),
        *(line("a", row={"n": 2}), ended("a")),
        *(line("a", row={"n": 3}), ended("a", "failed: signal 9")),
        *(line("b", row={"n": 4}), ended("b", "failed: signal 9")),
        ended("b", "not begun: 3 s were left", 0.0),
        *(line("c", row={"n": 5}, rehearsal=True), ended("c", rehearsal=True)),
        line("d", row={"n": 6}),
    ]
    found = by_phase(lines)
    assert found["a"].rows == [{"n": 2}]
    assert found["b"].rows == [{"n": 4}]
    assert "c" not in found
    assert (found["d"].rows, found["d"].status) == ([{"n": 6}], "broke off")
    assert by_phase(kept_lines(lines)).keys() == {"a", "b", "d"}
    assert by_phase(kept_lines(lines))["a"].rows == [{"n": 2}]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(ended("a")) + "\n" + json.dumps(ended("b"))[:30])
    assert [found["phase"] for found in read_lines(file)] == ["a"]


# --------------------------------------------------------------------------- the table


def speed(contender, step_s, peak_bytes):
    return {"contender": contender, "status": "ok", "step_s": step_s, "peak_bytes": peak_bytes}


GOOD = {
    "tests": [{"test": "t", "outcome": "passed"}, {"all": {"passed": 1}}],
    **{f"planner-{m}": [{"error": 0.004}] * 6 for m in ("gpt2", "opt-125m", "pythia-410m", "qwen2.5-0.5b")},
    "planner-llama-3.2-1b": [{"error": -0.02}],
    "fit-6gib": [{"status": "trained", "reserved_bytes": 5 << 30}],
    "speed-llama": [speed("stock", 2.0, 16e9), speed("lean", 1.8, 6.4e9)],
}


def found_of(rows, status=DONE):
    return {name: Found(rows=own, status=status, seconds=5.0, where=WHERE) for name, own in rows.items()}


def outcome(says_, found):
    return judge(next(promise for promise in PROMISES if promise.says == says_), found).outcome


def test_good_results_hold():
    found = found_of(GOOD)
    names = ["GPU tests that fail", "planner: cases measured", "planner: worst error of the peak"]
    names += ["llama-3.1-8b, 2 × 2048, reserved inside 6 GiB", "llama-3-8b: time of a step, of stock"]
    assert [outcome(name, found) for name in names] == ["held"] * len(names)
    text, fell_short = table(found)
    assert not fell_short
    assert "NVIDIA H200; torch 2.11.0; commit abc1234." in text


def test_bad_results_say_by_how_much():
    bad = {
        **GOOD,
        "tests": [{"test": "t", "outcome": "failed"}, {"all": {"passed": 1, "failed": 2}}],
        "planner-llama-3.2-1b": [{"error": -0.08}],
        "fit-6gib": [{"status": "does not fit"}],
        "speed-llama": [speed("stock", 2.0, 16e9), speed("lean", 2.5, 6.4e9)],
    }
    found = found_of(bad)
    assert outcome("GPU tests that fail", found) == "fell short by 2"
    assert outcome("planner: worst error of the peak", found) == "fell short by 5.00%"
    assert outcome("llama-3.1-8b, 2 × 2048, reserved inside 6 GiB", found) == "fell short: does not fit"
    assert outcome("llama-3-8b: time of a step, of stock", found) == "fell short by 0.250"
    assert table(found)[1]


def test_tests_that_were_all_skipped_show_nothing():
    skipped = found_of({**GOOD, "paging": [{"all": {"skipped": 1}}]})
    assert outcome("memory of paged states that is not freed (tests)", skipped).startswith("missing")


def test_missing_results_say_why():
    found = {**found_of(GOOD), "speed-gpt2": Found(status="ended at its limit of 80 s", seconds=80.0, where=WHERE)}
    assert outcome("gpt2-large: time of a step, of stock", found) == "missing: speed-gpt2 ended at its limit of 80 s"
    assert outcome("real run: proof of the release passed", found) == "missing: real-run not run"
    assert outcome("planner: cases measured", found_of({"planner-gpt2": [{"error": 0.1}]})) == (
        "fell short by 23 (of a part)"
    )
    assert "missing" in table({})[0]


def test_an_odd_row_costs_its_own_line():
    odd = [{"contender": name, "status": "ok", "step_s": 0.0} for name in ("stock", "lean")]
    found = found_of({**GOOD, "speed-llama": odd, "ablation": [{"without": None, "status": "ok"}]})
    assert outcome("llama-3-8b: peak, of stock", found) == "missing: its rows do not hold it"
    assert outcome("llama-3-8b: time of a step, of stock", found) == "missing: its rows do not hold it"
    assert outcome("GPU tests that fail", found) == "held"
    assert table(found)


def test_a_void_contender_is_named_where_its_figure_is_missing():
    rows = [{**row, "first_loss": 10.0, "loss": 9.0, "steps": 13} for row in GOOD["speed-llama"]]
    found = found_of({**GOOD, "speed-llama": [rows[0], {**rows[1], "first_loss": 12.0}]})
    assert outcome("llama-3-8b: time of a step, of stock", found).startswith("missing: lean void: loss 12.000 to 9.000")
    assert outcome("llama-3-8b: time of a step, of stock", found_of({**GOOD, "speed-llama": rows})) == "held"


class Event:
    """One of torch's profiler, as far as it is asked."""

    def __init__(self, key, device_type, time_us, is_user_annotation=False):
        self.key, self.count, self.device_type, self.is_user_annotation = key, 1, device_type, is_user_annotation
        self.self_device_time_total = time_us


def test_a_kernel_is_not_counted_again_by_what_launched_it():
    from gpu.kernels import busy, kernels_of
    from torch.autograd import DeviceType

    events = [
        Event("aten::mm", DeviceType.CPU, 800.0),
        Event("gemm", DeviceType.CUDA, 800.0),
        Event("step", DeviceType.CUDA, 900.0, is_user_annotation=True),
    ]
    found = busy(kernels_of(events), "device", 0.001)
    assert found["busy_share"] == pytest.approx(0.8)
    assert [kernel["name"] for kernel in found["kernels"]] == ["gemm"]


def test_every_phase_has_a_promise_and_every_promise_a_phase():
    names = {found.name for found in phases(rehearsal=True)}
    assert names == {name for promise in PROMISES for name in promise.phases}


# --------------------------------------------------------------------------- the command


def on_gpu(*arguments, **environment):
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), *map(str, arguments)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hidden}, check=False)


def test_a_dry_run_names_every_phase_and_needs_no_gpu():
    done = on_gpu("--dry-run")
    assert done.returncode == 0
    assert all(found.name in done.stdout for found in phases(rehearsal=False))
    assert "s in all" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path):
    done = on_gpu("--out", tmp_path / "out")
    assert done.returncode == 2
    assert "no CUDA device on this machine: --rehearse" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_phase_rehearsed_from_end_to_end_without_git(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), str(tmp_path)])  # no git on it
    done = on_gpu("--rehearse", "--only", "fit-6gib", "--out", tmp_path / "out", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = by_phase(read_lines(tmp_path / "out" / "results.jsonl"), rehearsal=True)
    assert found["fit-6gib"].status == DONE
    assert found["fit-6gib"].rows[0]["predicted_peak_bytes"] > 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["results.jsonl", "table.md"]


def test_what_is_held_is_not_run_again(tmp_path):
    import on_gpu as script

    have = tmp_path / "have"
    have.mkdir()
    (have / "on_gpu_nvidia-h200.jsonl").write_text(
        "\n".join(json.dumps(text) for text in [ended("tests"), ended("kernels", "failed: exit code 1")])
    )
    args = argparse.Namespace(rehearse=False, only=None, again=False, have=have)
    names = [found.name for found in script.chosen(args, WHERE)]
    assert "tests" not in names
    assert "kernels" in names
    small = {**WHERE, "device": "NVIDIA L4", "capability": (8, 9), "memory_bytes": 24 << 30}
    other = script.chosen(args, small)
    assert "tests" in [found.name for found in other]
    assert "speed-cudnn" not in [found.name for found in other]
    assert not any(found.together for found in other)
    args.again = True
    assert "tests" in [found.name for found in script.chosen(args, WHERE)]


# --------------------------------------------------------------------------- what the README says of it


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """The module that fills the README, with a copy of the committed results to add to."""
    import readme as script

    for file in (BENCHMARKS / "results").glob("*_cpu.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    return script


def recorded(folder, rows):
    lines = [text for name, own in rows.items() for text in (*(line(name, row=row) for row in own), ended(name))]
    (folder / "on_gpu_nvidia-h200.jsonl").write_text("".join(json.dumps(text) + "\n" for text in lines))


def test_without_a_measurement_the_readme_says_so(readme):
    assert readme.gpu() == "How fast it is on a GPU, and whether the plans hold there, is not yet measured."
    assert "Nothing here has been measured on a GPU yet" in readme.gpu_limits()
    assert "not yet validated on hardware" in readme.memory()
    assert "not yet shown on a GPU" in readme.fits()


def test_a_measurement_takes_the_place_of_that_it_is_missing(readme):
    trained = {"case": "6gib", "model": "llama-3.1-8b", "rows": 2, "tokens": 2048, "r": 16, "cap_bytes": 6 << 30}
    trained |= {"status": "trained", "peak_bytes": 5 << 30, "reserved_bytes": 5 << 30}
    speeds = [
        {**row, "reserved_bytes": row["peak_bytes"], "tokens_per_s": 4096 / row["step_s"]}
        for row in GOOD["speed-llama"]
    ]
    recorded(readme.RESULTS, {**GOOD, "fit-6gib": [trained], "speed-llama": speeds})
    said = readme.gpu()
    assert "| llama-3-8b, 2 × 2048 | qlora_kit | 6.40 | 6.40 | 2,276 | 1.11 × |" in said
    assert "not yet measured" not in said + readme.gpu_limits()
    assert "25 cases on NVIDIA H200 differ by 0.40% at the median, 2.00% at most" in readme.memory()
    assert "not yet validated" not in readme.memory() + readme.step()
    shown, planned = readme.fits().splitlines()[:2]
    assert shown == (
        "Shown on NVIDIA H200: llama-3.1-8b at 2 × 2,048, r = 16 trains inside 6 GiB (peak 5.00 GiB allocated)."
    )
    assert planned.startswith("Planned: llama-3.1-8b at ")


def test_what_was_measured_is_kept_once(readme, tmp_path, monkeypatch):
    import on_gpu as script

    monkeypatch.setattr(script, "RESULTS", readme.RESULTS)
    out = tmp_path / "out"
    out.mkdir()
    lines = [line("tests", row={"all": {"passed": 1}}), ended("tests"), ended("kernels", rehearsal=True)]
    (out / "results.jsonl").write_text("".join(json.dumps(text) + "\n" for text in lines))
    assert script.keep(out) == script.keep(out) == 0
    kept = read_lines(readme.RESULTS / "on_gpu_nvidia-h200.jsonl")
    assert [(found["phase"], "row" in found) for found in kept] == [("tests", True), ("tests", False)]
