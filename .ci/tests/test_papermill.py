"""The runnable pages: what papermill reads of their parameters, their first cells, and many runs gathered."""
import importlib.util
import json
import os
import subprocess
import sys
from ast import literal_eval
from configparser import ConfigParser
from dataclasses import fields
from types import ModuleType, SimpleNamespace

import papermill
import pytest
from conftest import ROOT

from prosody_ser.config import default_of
from prosody_ser.parsing import from_parameters

spec = importlib.util.spec_from_file_location("make_pages", ROOT / ".ci/make_pages.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)


def cells(page):
    return ["".join(c["source"]) for c in json.loads((ROOT / f"nbs/{page}.ipynb").read_text(encoding="utf-8"))["cells"]]


@pytest.mark.parametrize("page", pages.RUNNABLE)
def test_help_notebook_shows_every_setting(page):
    """Name, type, default and help of each setting are what the command line says."""
    config_class, own, left_out = pages.RUNNABLE[page]
    told = papermill.inspect_notebook(str(ROOT / f"nbs/{page}.ipynb"))
    recipe = {"recipe"} if config_class is pages.TrainConfig else set()
    assert set(told) == {f.name for f in fields(config_class)} - set(left_out) | {"mount_drive"} | recipe
    for f in fields(config_class):
        if f.name in left_out:
            continue
        t = told[f.name]
        assert literal_eval(t["default"]) == own.get(f.name, default_of(f)), f.name
        assert t["inferred_type_name"] in (pages.type_text(f.type), f"Optional[{pages.type_text(f.type)}]"), f.name
        assert t["help"].startswith(f.metadata["help"].replace("=", ": ")), f.name


def test_types_that_papermill_can_read():
    assert [pages.type_text(t) for t in (bool, float | None, list[float], list[str] | None)] == ["bool", "Optional[float]", "list[float]", "Optional[list[str]]"]
    assert pages.line("x", str, 'a "b"', "set A=1 first") == 'x: str = "a \\"b\\""  # set A: 1 first'
    with pytest.raises(SystemExit, match="cannot read"):
        pages.line("x", str, "a=b", "help")


def test_a_page_out_of_step_is_found():
    """A default that changed, a moved repository."""
    nb = json.loads((ROOT / "nbs/train.ipynb").read_text(encoding="utf-8"))
    whole = json.dumps(pages.written("train", json.loads(json.dumps(nb))))
    assert whole == json.dumps(nb)
    for old, new in (("alpha_asr: float = 0.1", "alpha_asr: float = 0.2"), ("colab.research.google.com/github", "colab.research.google.com/gitlab"), ("find_spec(", "find(")):
        stale = json.loads(json.dumps(nb).replace(old, new))
        assert stale != nb and json.dumps(pages.written("train", stale)) == whole


@pytest.mark.parametrize("page", [*pages.RUNNABLE, *pages.TUTORIALS])
def test_badge_and_first_cell(page, monkeypatch):
    """The badge opens this page of this repository; the first cell installs it on Colab where it is missing, and nowhere else."""
    from IPython.core.inputtransformer2 import TransformerManager
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    cfg = config["DEFAULT"]
    assert f"github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/nbs/{page}.ipynb)" in "".join(cells(page)[1:3])
    first = next(c for c in cells(page) if "# On Colab" in c)
    code = TransformerManager().transform_cell("\n".join(line for line in first.splitlines() if not line.startswith("#|")))

    def calls():
        made = []
        exec(code, {"get_ipython": lambda: SimpleNamespace(system=made.append)})
        return made

    assert calls() == []                                                # here
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    assert calls() == []                                                # on Colab, installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line, = calls()
    assert f"git+{cfg['git_url']}@{cfg['branch']}" in line and line.startswith('pip install -q "prosody-ser[demo]')


def test_what_papermill_delivers_arrives(tmp_path):
    """-p, -y and lists, through papermill itself: the injected cell's values become the settings."""
    done = subprocess.run(["papermill", "nbs/train.ipynb", str(tmp_path / "out.ipynb"), "--prepare-only", "-p", "use_amp", "False", "-p", "layer_mix", "false", "-p", "ablation_alphas", "[0, 0.1]",
                           "-p", "alpha_asr", "1", "-p", "experiment_name", "None", "-y", "{backbone_lr: 1e-5, emotion_names: [joy, anger], num_epochs: 2}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cell = next(c for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] if "injected-parameters" in c["metadata"].get("tags", []))
    scope = {}
    exec("".join(cell["source"]), scope)
    given = {k: v for k, v in scope.items() if not k.startswith("_")}
    data = dict.fromkeys(["audio_base_path", "train_jsonl", "val_jsonl", "test_jsonl", "tokenizer_path"], "-")
    config = from_parameters(pages.TrainConfig, data | given)
    assert (config.use_amp, config.layer_mix, config.ablation_alphas, config.alpha_asr, config.experiment_name) == (False, False, [0.0, 0.1], 1.0, None)
    assert (config.backbone_lr, config.emotion_names, config.num_epochs) == (1e-5, ["joy", "anger"], 2) and type(config.alpha_asr) is float


def test_loop_over_alpha(corpus, tmp_path):
    """The example's loop: a failed run is told and does not stop the others; finished ones are not repeated; one table at the end. An α that equals the default is that α."""
    env = os.environ | dict(OUT=str(tmp_path), ALPHAS="0 0.1", SEEDS="0", DATA=str(corpus))
    loop = lambda *more, **e: subprocess.run(["bash", "examples/papermill/loop.sh", "-p", "num_epochs", "1", "-p", "backbone", "tiny", "-p", "vocab_size", "30", "-p", "decode_method", "greedy", *more], cwd=ROOT, env=env | e, capture_output=True, text=True)
    done = loop()
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "comparison/comparison.md").read_text()
    assert "| alpha_asr = alpha_prosody |" in table and "| 0.1 | 1 |" in table and (tmp_path / "comparison/comparison.png").is_file()
    done = loop("-p", "batch_sise", "4", ALPHAS="0 0.1 2", DATA="")     # without data: the demo corpus
    assert done.returncode == 1 and done.stdout.count("is finished") == 2 and "alpha_2_seed_0 failed" in done.stdout
    assert "did you mean 'batch_size'" in (tmp_path / "comparison/comparison.md").read_text()           # named, not fatal


@pytest.mark.parametrize("script", ["papermill/loop.sh", "hpc/alpha_array.sbatch"])
def test_examples_go_on(tmp_path, script):
    """What is finished is left alone, what was cut off goes on from its checkpoint, the rest begins; a stub for papermill says what it is called with."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/papermill").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin/papermill").chmod(0o755)
    (tmp_path / "bin/activate").write_text("")
    runs = [tmp_path / f"out/alpha_{a}_seed_0" for a in ("0.0", "0.001", "0.01")]
    for run in runs[:2]:
        (run / "checkpoint-8").mkdir(parents=True)
        (run / "checkpoint-8/trainer_state.json").write_text("{}")
    (runs[0] / "test_results.json").write_text("{}")
    given = os.environ | dict(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", VENV=str(tmp_path), OUT=str(tmp_path / "out"), DATA="data", AUDIO="a.tar", ALPHAS="0.0 0.001 0.01", SEEDS="0")
    said = [subprocess.run(["bash", f"examples/{script}", "-p", "num_epochs", "1"], cwd=ROOT, env=given | dict(SLURM_ARRAY_TASK_ID=str(i)), capture_output=True, text=True, check=True).stdout for i in range(3)]
    calls = [line for line in "".join(said[:1] if "loop" in script else said).splitlines() if "alpha_" in line and "gather" not in line]
    assert [("is finished" in c, "-p resume True" in c, "-p audio_base_path a.tar" in c) for c in calls] == [(True, False, False), (False, True, True), (False, False, True)]
