"""The guide *Add a task*: short, and right; what opens the model for it."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from prosody_ser.model import CheckpointError, Collator, create_model, load_checkpoint

CELLS = ["".join(c["source"]) for c in json.loads((ROOT / "nbs/guide_task.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def test_a_fourth_task_takes_less_than_60_lines():
    own = [line.strip() for cell in CELLS if cell.startswith("# your own code") for line in cell.splitlines()]
    lines = [line for line in own if line and not line.startswith("#")]
    assert 30 < len(lines) < 60


def test_the_task_trains_and_loads(tmp_path):
    code = "\n\n".join(c for c in CELLS if "fig-alt" not in c and "assert ccc" not in c)
    code = re.sub(r"n_train=\d+, n_val=\d+, n_test=\d+", "n_train=20, n_val=10, n_test=10", code).replace("num_epochs=8", "num_epochs=1")
    assert "n_train=20" in code and "num_epochs=1" in code
    check = ("\n\nassert 'arousal/loss' in str(trainer.state.log_history) and 'arousal/ccc' in trainer.best\n"
             "assert heard.shape == truth.shape and (0 < heard).all() and (heard < 1).all()\n"
             "try:\n    load_checkpoint('run/best_model')\nexcept ValueError as e:\n    print('REFUSED', e)\n")
    (tmp_path / "task.py").write_text(code + check, encoding="utf-8")
    env = os.environ | dict(TMPDIR=str(tmp_path), PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "task.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "REFUSED" in done.stdout and "model_class" in done.stdout


def test_a_label_that_no_task_takes_is_an_error():
    model = create_model(["anger", "joy"], tasks=["ser"])
    with pytest.raises(TypeError, match="arousal"):
        model(audio=torch.randn(1, 8000), audio_lengths=torch.tensor([8000]), arousal=torch.tensor([0.5]))


def test_numbers_of_a_row_reach_the_batch():
    row = dict(audio=[0.0] * 10, words=None, prosody=None, emotion=1, row=0)
    batch = Collator()([row | dict(age=31.5), row | dict(age=-1.0, row=1)])
    assert batch["age"].tolist() == [31.5, -1.0] and batch["row"].tolist() == [0, 1]
    assert "age" not in Collator()([row])


def test_a_model_with_weights_of_another_class_is_refused(tmp_path):
    model = create_model(["anger", "joy"], tasks=["ser"])
    model.arousal = torch.nn.Linear(2, 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model_class"):
        load_checkpoint(tmp_path)
