"""The wheel, as Colab has it: installed in a fresh environment, without the checkout, the notebooks alone in another folder."""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import nbformat
import pytest
from conftest import ROOT

from prosody_ser.run import FACTS

DRIVE = 'def mount(where):\n    with open("mounted.txt", "a") as f: f.write(where)\n'


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".git", "runs", "*.egg-info", "build", "__pycache__", ".venv"))
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Runs the Python of a fresh environment: the package from the wheel, what it needs from this environment, in a folder of its own, on a machine that looks like Colab."""
    folder = tmp_path_factory.mktemp("content")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    exe = folder / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "pip", "--python", exe, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    site = next((folder / "venv/lib").glob("python3*/site-packages"))
    (site / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")       # the .pth files within are not followed: no editable install
    (site / "google/colab").mkdir(parents=True)
    (site / "google/colab/__init__.py").write_text("")
    (site / "google/colab/drive.py").write_text(DRIVE)
    (site / "sitecustomize.py").write_text("import google.colab\n")                   # Colab's kernels have it loaded
    for page in ("train", "evaluate", "gather", "ablation"):
        shutil.copy(ROOT / f"nbs/{page}.ipynb", folder)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")} | dict(JUPYTER_DATA_DIR=str(folder / "jupyter"), MPLBACKEND="Agg")

    def run(*argv):
        done = subprocess.run([exe, *map(str, argv)], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run.folder = folder
    return run


def test_contents(wheel):
    """The modules and the licence; no notebook, no test."""
    names = zipfile.ZipFile(wheel).namelist()
    modules = {n for n in names if n.startswith("prosody_ser/")}
    assert modules == {f"prosody_ser/{p.name}" for p in (ROOT / "prosody_ser").glob("*.py")} | {f"prosody_ser/{name}" for name in ("audit_findings.toml", "style.css", "report.css", "serve.css", "serve.js", "annotate.html", "annotate.css", "annotate.js")}
    rest = {n.split(".dist-info/")[1] for n in set(names) - modules}
    assert "licenses/LICENSE" in rest and rest == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    text = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "prosody-ser=prosody_ser.cli:main" in text.replace(" ", "")


def test_the_package_is_the_wheels(python):
    where = python("-c", "import prosody_ser; print(prosody_ser.__file__)").strip()
    assert where.startswith(str(python.folder / "venv"))
    assert "gather" in python(python.folder / "venv/bin/prosody-ser", "--help")


def test_notebooks_run_without_the_checkout(python):
    """Train with Drive mounted, evaluate what it saved, gather the executed notebook; everything lies where it was run."""
    folder = python.folder
    page = nbformat.read(folder / "train.ipynb", 4)
    page.cells.append(nbformat.v4.new_code_cell("import prosody_ser; print('FROM', prosody_ser.__file__)"))
    nbformat.write(page, folder / "train.ipynb")
    python("-m", "papermill", "train.ipynb", "out.ipynb", "-p", "num_epochs", "1", "-p", "mount_drive", "True", "-p", "alpha_asr", "0.5", "-p", "decode_method", "greedy")
    assert (folder / "mounted.txt").read_text() == "/content/drive"
    assert (folder / "runs/notebook/test/report.html").is_file()
    assert json.loads((folder / "runs/notebook/train_config.json").read_text())["alpha_asr"] == 0.5
    out = nbformat.read(folder / "out.ipynb", 4)
    outputs = [o for c in out.cells if c.cell_type == "code" for o in c.outputs]
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    assert f"FROM {folder / 'venv'}" in text and "epoch   1.00  val loss" in text
    html = "".join(o.data["text/html"] for o in outputs if "text/html" in o.get("data", {}))
    for piece in ("<td>alpha_asr</td><td>0.5</td>", "95 % interval", "floor", "<th>precision</th>", "resamples of", 'class="word', "<b>cure:</b>"):
        assert piece in html, piece
    assert html.count("data:audio/mpeg") == 5 and sum("image/png" in o.get("data", {}) for o in outputs) == 2
    assert not any(o.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs)         # no bars
    assert (folder / "out.ipynb").stat().st_size < 600_000
    tested = json.loads((folder / "runs/notebook/test_results.json").read_text())["metrics"]
    python("-m", "papermill", "evaluate.ipynb", "eval.ipynb", "-p", "checkpoint_path", "runs/notebook/best_model", "-p", "tokenizer_path", "runs/notebook/tok.model", "-p", "audio_base_path",
           "runs/demo-corpus-200", "-p", "test_jsonl", "runs/demo-corpus-200/test.jsonl", "-p", "output_dir", "eval", "-p", "decode_method", "greedy")
    assert json.loads((folder / "eval/test_metrics.json").read_text())["ser/ua"] == pytest.approx(tested["ser/ua"])
    facts = next(o.data[FACTS] for o in outputs if FACTS in o.get("data", {}))
    assert facts["test"]["ser/ua"] == tested["ser/ua"]
    shutil.rmtree(folder / "runs")                                                   # the executed notebook is enough
    python("-m", "papermill", "gather.ipynb", "gathered.ipynb", "-p", "runs", "out.ipynb", "-p", "out", "compared")
    table = (folder / "compared/comparison.md").read_text()
    assert f"{tested['ser/ua']:.3f} [{tested['ser/ua_low']:.3f}, {tested['ser/ua_high']:.3f}] ({tested['ser/ua_floor']:.3f})" in table


def test_study_runs_without_the_checkout(python):
    """A grid of two weights for each auxiliary task, trained; the executed page shows its table and its map."""
    folder = python.folder
    python("-m", "papermill", "ablation.ipynb", "study.ipynb", "-p", "ablation_mode", "grid", "-p", "ablation_alphas", "[0, 0.5]", "-p", "decode_method", "greedy", "-p", "save_dir", "study")
    study = json.loads((folder / "study/ablation_results.json").read_text())
    assert study["mode"] == "grid" and [(r["alpha_asr"], r["alpha_prosody"]) for r in study["table"]] == [(0, 0), (0, 0.5), (0.5, 0), (0.5, 0.5)] and not study["failed"]
    settings = json.loads((folder / "study/train_config.json").read_text())
    assert {k: settings[k] for k in study["best"]} == study["best"]                   # the final model has the weights that were chosen
    outputs = [o for c in nbformat.read(folder / "study.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs]
    markdown = "".join(o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {}))
    assert "| α transcript | α prominence |" in markdown and sum("image/png" in o.get("data", {}) for o in outputs) == 2
