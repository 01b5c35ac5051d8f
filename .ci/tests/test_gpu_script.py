"""`benchmarks/gpu.py` runs to its end without a GPU, and without what reads audio and scores words."""
import json
import math
import os
import subprocess
import sys

from conftest import ROOT

PARTS = ["ceiling", "correctness", "train", "ctc", "loader", "decode"]
BARE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
lacking = "jiwer", "soundfile", "soxr", "fastcore"
PathFinder.find_spec = classmethod(lambda cls, name, *more: None if name in lacking else find(name, *more))
"""


def run(folder, *flags, **environment):
    """The script's file of numbers, and its table."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--toy", "--out", "gpu.json", *flags]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8")), done.stdout


def check_rows(rows):
    """Nothing failed, every check passed, every number is a finite one."""
    for row in rows:
        assert not {"failed", "left_out"} & set(row), row
        assert row["part"] != "correctness" or (row["passed"] and row["verdict"] == "pass"), row
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row


def test_toy_run(tmp_path):
    told, table = run(tmp_path)
    rows, about = told["rows"], told["about"]
    check_rows(rows)
    assert list(dict.fromkeys(r["part"] for r in rows)) == PARTS
    assert about["toy"] and about["torch"] and about["seconds"] > 0
    assert all(r["name"] in table for r in rows) and " 0 failed, 0 left out" in table
    for row in (r for r in rows if r["part"] == "train"):
        assert min(row[k] for k in ("step_ms", "share", "real_share", "peak_bytes", "forecast_bytes")) > 0
        assert row["padded_flops_a_second"] >= row["real_flops_a_second"]
        assert (row.get("align_ms", 0) > 0) == ("words aligned" in row["name"])
    dense, lean = (r for r in rows if r["part"] == "ctc")
    assert (dense["form"], lean["form"]) == ("dense", "lean") and lean["time_ratio"] > 0


def test_bare_environment(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    told, _ = run(tmp_path, "--parts", "correctness", "loader", PYTHONPATH=str(tmp_path))
    check_rows(told["rows"])
    assert {r["reader"] for r in told["rows"] if r["part"] == "loader"} == {"wave"}


def test_what_does_not_fit_in_the_time_is_named(tmp_path):
    told, table = run(tmp_path, "--minutes", "0.1")
    assert told["rows"] and all("left_out" in r and r["name"] in table for r in told["rows"])


def test_what_the_clock_stopped_did_not_fail():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu
    row = dict(part="train", name="a")
    assert gpu.stopped_for_time(row | dict(failed="stopped after 27 s")) == row | dict(left_out="stopped after 27 s")
    assert gpu.stopped_for_time(row | dict(failed="out of memory")) == row | dict(failed="out of memory")


def test_more_rows_join_those_of_an_earlier_run(tmp_path):
    """Rows that are not measured again stay, with their commit; a row that no longer fits does not replace one."""
    first, _ = run(tmp_path, "--parts", "ctc")
    (tmp_path / "gpu.json").write_text(json.dumps(first | dict(about=first["about"] | dict(commit="abc"))), encoding="utf-8")
    told, _ = run(tmp_path, "--only", "lean*", "--more")
    by_name = {r["name"]: r for r in told["rows"]}
    assert set(by_name) == {r["name"] for r in first["rows"]} | {r["name"] for r in told["rows"] if r["part"] == "ceiling"}
    commits = {name: r.get("commit") for name, r in by_name.items() if r["part"] == "ctc"}
    assert {commits[n] for n in commits if "lean" not in n} == {"abc"} and {commits[n] for n in commits if "lean" in n} == {None}
    again, _ = run(tmp_path, "--more", "--minutes", "0.01", "--parts", "ceiling", "ctc")      # one job has several rows
    assert [r["name"] for r in again["rows"]] == [r["name"] for r in told["rows"]] and not any("left_out" in r for r in again["rows"])


def test_a_name_that_no_row_has_is_answered_by_all_names(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--toy", "--out", str(tmp_path / "gpu.json"), "--only", "XLSR"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "--only XLSR: no such row. There are: " in done.stderr and "toy XLS-R, LoRA" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
