"""What surrounds a training changes nothing: its locale, the clock of the disk, processes that load data."""
import os
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT

from prosody_ser.cli import main
from prosody_ser.model import load_checkpoint

QUICK = dict(backbone="tiny", vocab_size=30, batch_size=4, num_workers=0, checkpoint_interval=1, checkpoint_steps=2)


def arguments(corpus, place, **settings):
    """The command line of a training."""
    manifests = [f"--{s}_jsonl={corpus / f'{s}.jsonl'}" for s in ("train", "val", "test")]
    places = [f"--audio_base_path={corpus}", f"--save_dir={place / 'run'}", f"--tokenizer_path={place / 'tok.model'}"]
    return ["train", *manifests, *places, *[f"--{k}={v}" for k, v in (QUICK | settings).items()]]


def elsewhere(argv, after="", **variables):
    """A command in a process of its own, with other variables; gives what it printed."""
    code = f"import sys\nfrom prosody_ser.cli import main\nmain(sys.argv[1:])\n{after}"
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, env=os.environ | variables, capture_output=True,
                          text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def is_same(one, other):
    """Two runs have the same weights, and the same pieces."""
    weights = [load_checkpoint(p / "run/best_model").state_dict() for p in (one, other)]
    assert all(weights[0][k].equal(weights[1][k]) for k in weights[0] | weights[1])
    assert (one / "tok.model").read_bytes() == (other / "tok.model").read_bytes()


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """A run of two epochs."""
    place = tmp_path_factory.mktemp("plain")
    main(arguments(corpus, place, num_epochs=2))
    return place


@pytest.mark.parametrize("name", ["C", "tr_TR.UTF-8"])
def test_locale(corpus, plain, tmp_path, name):
    """ASCII, or a language in which the small form of I has no dot: the pieces and the weights are the same."""
    elsewhere(arguments(corpus, tmp_path, num_epochs=2), LC_ALL=name, LANG=name, PYTHONUTF8="0")
    is_same(plain, tmp_path)


def test_clock(corpus, tmp_path):
    """Files of a copy, or of a disk whose clock is wrong, have any time: a run goes on where it was."""
    for years in (0, -30, 30):
        place = tmp_path / str(years)
        main(arguments(corpus, place, num_epochs=1))
        for i, p in enumerate(sorted((place / "run").rglob("*")) if years else ()):
            when = p.stat().st_mtime + years * 365 * 86400 - i * 3600
            os.utime(p, (when, when))
        main([*arguments(corpus, place, num_epochs=2), "--resume"])
        is_same(tmp_path / "0", place)


LEFT = "import psutil\nprint('children:', psutil.Process().children(recursive=True))"


def test_workers_end(corpus, plain, tmp_path):
    """The processes that load data end with the training, and take their folders with them."""
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:             # short: their sockets lie there
        out = elsewhere(arguments(corpus, tmp_path, num_epochs=2, num_workers=1), LEFT, TMPDIR=temporary)
        assert "children: []" in out and "TMPDIR" not in out
        assert not os.listdir(temporary)
    is_same(plain, tmp_path)


def test_long_name_of_the_temporary_folder(corpus, plain, tmp_path):
    """A socket's path has about a hundred letters at most: a worker's batches would be lost, and the training wait for ever."""
    temporary = tmp_path / ("x" * 110)
    temporary.mkdir()
    out = elsewhere(arguments(corpus, tmp_path, num_epochs=2, num_workers=1), LEFT, TMPDIR=str(temporary))
    assert "Set TMPDIR to a shorter one" in out
    is_same(plain, tmp_path)
