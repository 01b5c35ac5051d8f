"""Fixtures: a corpus small enough to train on in a second, and the real data where it is at hand."""
import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


def needs(path):
    """Skip, with a reason, where the real data are absent."""
    return pytest.mark.skipif(not path.exists(), reason=f"{path.relative_to(ROOT.parent)} is not on this machine")


def tone(emotion, marks, rng):
    """0.4 s a word, the pitch says the emotion and the loudness the prominence."""
    t = np.arange(6400) / 16000
    pitch = {"joy": 150, "anger": 400}[emotion]
    return np.concatenate([(0.4 if m else 0.1) * np.sin(2 * np.pi * pitch * t) * np.hanning(6400) + rng.normal(size=6400) * 0.01 for m in marks])


def write_corpus(folder):
    """A folder with audio and train/val/test manifests; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 6), ("test", 6)):
        rows = []
        for i in range(n):
            emotion, words = ("anger", "joy")[i % 2], ["me", "kɔ", "fie"] if i % 3 == 0 else ["bra", "ha"]
            marks = [int(m) for m in rng.random(len(words)) < 0.4]
            rows.append(dict(audio_filepath=f"{split}{i}.wav", words=words, prosody_annotations=marks, emotion=emotion, speaker=f"{split}{i % 2}"))
            sf.write(folder / rows[-1]["audio_filepath"], tone(emotion, marks, rng), 16000)
        write(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with audio and train/val/test manifests."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def command(capsys):
    """Runs the console script within this process: its exit code, and what it printed."""
    from prosody_ser.cli import main

    def run(*argv):
        code = 0
        try:
            main(list(map(str, argv)))
        except SystemExit as e:
            code = e.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        out, err = capsys.readouterr()
        return code, out + err
    return run


def write(path, rows):
    """Rows to JSONL."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path):
    """JSONL to rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


LONGEST = "notebooks commands faults distributed papermill wheel readme timeline predict hub annotate serve".split()


def pytest_collection_modifyitems(items):
    """The files that take longest come first: the last ones are short, and both processes end at about the same time."""
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish():
    """What is loaded by now is not looked through each time that a training collects garbage."""
    gc.collect()
    gc.freeze()
