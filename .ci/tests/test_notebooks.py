"""Every notebook runs from its first cell to its last, in a process of its own."""
import json
import os
import tempfile

import pytest
from conftest import ROOT
from forge import python

NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
# The lesson trains for a minute, so that its scores are worth reading; a few recordings show that its code runs. Its own run folder stays as it is.
SMALLER = {"nbs/start_3_train.ipynb": {"n_train=1200, n_val=80, n_test=120": "n_train=200, n_val=40, n_test=60", '"runs/start': '"FOLDER/start'}}
RUN = """
import sys
import nbdev.test
notebook, smaller = sys.argv[1], eval(sys.argv[2])

def read(file, **more):
    made = NBProcessor(file, **more)
    for cell in made.nb.cells:
        for old, new in smaller.items():
            cell.source = cell.source.replace(old, new)
    return made

NBProcessor, nbdev.test.NBProcessor = nbdev.test.NBProcessor, read
nbdev.test.nbdev_test(notebook, n_workers=0)
"""


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook):
    with tempfile.TemporaryDirectory() as folder:     # what the notebook leaves there goes with it; a short path, since sockets' names are limited
        smaller = {old: new.replace("FOLDER", folder) for old, new in SMALLER.get(notebook, {}).items()}
        done = python("-c", RUN, notebook, smaller, env=os.environ | dict(TMPDIR=folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("notebook", SMALLER)
def test_what_is_made_smaller_is_there(notebook):
    code = "".join("".join(c["source"]) for c in json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code")
    assert all(old in code for old in SMALLER[notebook])


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 15
