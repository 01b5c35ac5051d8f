"""Every notebook runs from its first cell to its last, in a process of its own."""
import os
import tempfile

import pytest
from conftest import ROOT
from forge import python

NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook):
    with tempfile.TemporaryDirectory() as folder:     # what the notebook leaves there goes with it; a short path, since sockets' names are limited
        done = python("-c", f"from nbdev.test import nbdev_test; nbdev_test({notebook!r}, n_workers=0)", env=os.environ | dict(TMPDIR=folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 15
