"""The benchmark of the merge, end to end on one tiny shape."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from families import FAMILIES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def test_one_tiny_shape_from_end_to_end(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("merge_benchmark", BENCHMARKS / "merge.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    FAMILIES["llama"]().to_json_file(tmp_path / "tiny.json")

    def in_this_process(*words):
        values = dict(zip(words[::2], words[1::2], strict=True))
        folder = Path(values["--folder"])
        if values["--way"] == "make":
            return benchmark.make_inputs(values["--shape"], folder), 0
        return benchmark.run(values["--way"], folder), 1

    monkeypatch.setattr(benchmark, "in_a_process", in_this_process)
    monkeypatch.setattr(benchmark, "write_result", lambda name, result: written.update(result))
    written: dict = {}
    words = ["merge.py", "--shape", str(tmp_path / "tiny.json"), "--folder", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", words)
    benchmark.main()
    assert set(written["ways"]) == set(benchmark.WAYS)
    assert all(own["seconds"] > 0 for own in written["ways"].values())
    assert written["bound_bytes"] > written["largest_tensor_fp32_bytes"]
    json.dumps(written)
    assert not list((tmp_path / "work").iterdir())
