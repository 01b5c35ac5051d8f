"""The first screen of README.md, line by line as in a notebook: each step shows something."""
import os
import re
import subprocess
import sys

from conftest import ROOT

SHOWS = """
import ast, sys
import matplotlib; matplotlib.use("Agg")
from matplotlib.figure import Figure
scope = {}
for node in ast.parse(open(sys.argv[1], encoding="utf-8").read()).body:
    code = ast.unparse(node)
    if not isinstance(node, ast.Expr):
        exec(code, scope)
        names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        values = [scope[n] for n in names]
    else:
        values = [eval(code, scope)]
    for value in values:
        shown = "figure" if isinstance(value, Figure) else value._repr_html_() if hasattr(value, "_repr_html_") else ""
        print(f"{code[:50]:52}{type(value).__name__:12}{len(shown)}")
        assert shown or code.startswith("predict = "), code
assert "torch" in sys.modules
run = scope["run"]
assert run.best_model.is_dir() and run.best["epoch"] <= 4
"""


def test_first_screen(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import prosody_ser as ps.*?)```", text, re.S)[1]
    assert text.index(code) < 3000 and len([line for line in code.splitlines() if line]) <= 10
    (tmp_path / "first.py").write_text(code, encoding="utf-8")
    (tmp_path / "show.py").write_text(SHOWS)
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "show.py", "first.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "runs/first/best_model/model.safetensors").is_file()
    assert list((tmp_path / "runs/first").rglob("report.html"))          # of run.evaluate(test)


def test_import_is_light():
    """Under 0.3 s, and no PyTorch: the API is loaded when it is asked for."""
    code = "import sys, prosody_ser; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'heavy'"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_functions_and_rooms_of_one_name():
    """`prosody_ser.train` is a function and a room: both work, in either order."""
    code = "import prosody_ser as ps; {}; assert callable(ps.train) and callable(ps.audit); import prosody_ser.train as t; t.run_training; from prosody_ser import audit; audit.audit_manifests"
    for first in ("pass", "import prosody_ser.train, prosody_ser.audit", "ps.train, ps.audit"):
        done = subprocess.run([sys.executable, "-c", code.format(first)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
