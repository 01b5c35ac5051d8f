"""A run that is killed and resumed ends as the unbroken run does."""
import json
import os
import signal
import time

import pytest
from conftest import ROOT
from forge import forge, python
from safetensors.torch import load_file
from test_commands import TINY, manifests, train

LONG = ["--num_epochs", "8", "--checkpoint_interval", "2", "--checkpoint_steps", "4", "--eval_steps", "2", "--seed", "3"]   # three steps an epoch


def kill_during(argv, folder, step):
    """Start a run and kill it, without a warning, once its checkpoint of that step is being written."""
    run = forge().begin(argv, ROOT, os.environ, folder.with_suffix(".log"))
    while not run.is_zombie() and not (folder / f"checkpoint-{step}").exists():
        time.sleep(0.002)
    return run.signal(signal.SIGKILL).end().code


def history(run):
    """All but the clock's figures."""
    lines = json.loads((run / "training_history.json").read_text())
    return [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in lines["train"] + lines["val"]], lines["best"]["epoch"]


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(corpus, folder, *LONG).returncode == 0
    return folder / "run"


@pytest.mark.parametrize("step", [4, 8, 18])
def test_killed_and_resumed(corpus, unbroken, tmp_path, step):
    """Within an epoch, and at its end; the killed checkpoint may be incomplete, then the one before it counts."""
    folder = tmp_path / "killed"
    argv = ["-m", "prosody_ser.train", "--audio_base_path", corpus, *manifests(corpus), "--tokenizer_path", folder / "tok.model",
            "--save_dir", folder / "run", *TINY, *LONG]
    folder.mkdir()
    assert kill_during(argv, folder / "run", step) == -signal.SIGKILL
    done = python(*argv, "--resume")
    if done.returncode and "no checkpoint in" in done.stderr and step == 4:        # killed before the first one was whole: start anew
        done = python(*argv)
    assert done.returncode == 0, done.stderr[-3000:]
    assert history(folder / "run") == history(unbroken)
    one, two = (load_file(p / "best_model/model.safetensors") for p in (unbroken, folder / "run"))
    assert max((one[k].double() - two[k].double()).nan_to_num().abs().max().item() for k in one) < 1e-6
    assert not (folder / "run/best_model.new").exists() and not (folder / "run/best_model.old").exists()
