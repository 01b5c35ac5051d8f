"""prosody-ser annotate: the listener's file, the addresses of the page, and the page in a real Chromium from the keyboard alone.

What needs FastAPI (`pip install 'prosody-ser[serve]'`), or Playwright and a Chromium, is skipped without it. SCREENSHOTS=FOLDER keeps a picture."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, SHARED, needs, read, write

from prosody_ser.agreement import agreement, merge, read_annotations
from prosody_ser.annotate import _Desk, _Said, _spelt
from prosody_ser.audio import load_audio
from prosody_ser.command_config import AnnotateConfig
from prosody_ser.config import ConfigError
from prosody_ser.data import read_manifest
from prosody_ser.folder import FolderError, StorageError
from prosody_ser.inference import Predictor
from prosody_ser.model import create_model
from prosody_ser.text import ManifestError
from prosody_ser.tokenizer import SentencePieceTokenizer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
NO_SERVER = [m for m in ("fastapi", "uvicorn") if not find_spec(m)]
MISSING = NO_SERVER + [m for m in ["playwright"] if not find_spec(m)] + ["chromium"] * (BROWSER is None)
by_http = pytest.mark.skipif(bool(NO_SERVER), reason=f"not on this machine: {', '.join(NO_SERVER)}")
in_browser = pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {', '.join(MISSING)}")
WORDS = ["me", "rekɔ", "fie"]


@pytest.fixture
def place(tmp_path):
    """Six recordings whose names, labels and marks say what a listener must not know."""
    rows = []
    for i in range(6):
        t = np.arange(16000 + 1600 * i) / 16000
        sf.write(tmp_path / f"{i}_furious.wav", 0.4 * np.sin(2 * np.pi * (200 + 50 * i) * t) * np.abs(np.sin(2 * np.pi * t)), 16000)
        rows.append(dict(audio_filepath=f"{i}_furious.wav", label=["joy", "anger"][i % 2], words=WORDS, prosody_annotations=[1, 1, 1], speaker=f"s{i % 2}", film="x",
                         word_times=[[0.0, 0.3], [0.3, 0.6], [0.6, 0.9]], prosody_source="acoustic", text="Me rekɔ fie."))
    write(tmp_path / "corpus.jsonl", rows)
    return tmp_path


def settings(place, annotator="ama", **more):
    return AnnotateConfig(**dict(manifest=str(place / "corpus.jsonl"), audio_base_path=str(place), annotator=annotator, out=str(place / f"{annotator}.jsonl")) | more)


def said(marks=(0, 1, 0), emotion="joy", words=WORDS, unsure=False, skipped=False, seconds=2.0):
    return _Said(list(words), list(marks), emotion, unsure, skipped, seconds)


# ------------------------------------------------------------------------------------------------------------------ the file

def test_lines(place):
    """The row of the manifest with the listener's labels, and nobody else's; a skipped one has none; a later line replaces an earlier one."""
    desk = _Desk(settings(place, in_order=True))
    desk.save(0, said(seconds=2.04))
    assert desk.save(1, said(skipped=True)) == dict(done=2, total=6, next=2, pace=1800.0)
    desk.save(2, said([1, 0], words=["me", "kɔ"], unsure=True, emotion="anger"))
    desk.save(0, said([0, 0, 1], seconds=1.5))
    desk.save(3, said([], words=[]))
    own = dict(speaker="s0", film="x", annotator="ama", unsure=False, skipped=False)
    times = [[0.0, 0.3], [0.3, 0.6], [0.6, 0.9]]
    lines = read(place / "ama.jsonl")
    assert lines[0] == own | dict(audio_filepath="0_furious.wav", emotion="joy", words=WORDS, prosody_annotations=[0, 1, 0], word_times=times, seconds=2.0)
    assert lines[1] == own | dict(audio_filepath="1_furious.wav", speaker="s1", emotion=None, words=WORDS, prosody_annotations=None, word_times=times, skipped=True, seconds=2.0)
    assert lines[2] == own | dict(audio_filepath="2_furious.wav", emotion="anger", words=["me", "kɔ"], prosody_annotations=[1, 0], unsure=True, seconds=2.0)
    assert lines[3] == lines[0] | dict(prosody_annotations=[0, 0, 1], seconds=3.5)                  # of both times
    assert lines[4]["words"] is None and lines[4]["prosody_annotations"] is None
    found = {u.audio_filepath: u for u in read_manifest(place / "ama.jsonl")}
    assert found["1_furious.wav"].emotion is None and found["0_furious.wav"].prosody_annotations == [0, 0, 1]
    for wrong, why in ((said(emotion="fear"), "Choose an emotion"), (said(emotion=None), "Choose an emotion"), (said([1]), "3 words but 1"), (said([0, 2, 0]), "must be a list of 0 and 1"),
                       (said(words=["a", " ", "b"]), "non-empty"), (said(seconds=-9), "seconds must be")):
        with pytest.raises((ConfigError, ManifestError), match=why):
            desk.save(4, wrong)
    assert len(read(place / "ama.jsonl")) == 5


def test_recordings_that_are_not_there(place):
    """Some are told before the work, and if all are gone there is no work."""
    (place / "0_furious.wav").unlink()
    with pytest.warns(UserWarning, match="1 of 6 recordings cannot be heard.*0_furious.wav"):
        assert len(_Desk(settings(place)).order) == 6
    with pytest.raises(ManifestError, match="6 of 6 recordings cannot be heard.*--audio_base_path"):
        _Desk(settings(place, audio_base_path=str(place / "none")))
    _Desk(settings(place)).save(1, said())
    with pytest.warns(UserWarning, match="6 of 6 recordings cannot be heard"):                     # what was said can be looked at
        assert _Desk(settings(place, audio_base_path=str(place / "none"))).progress()["done"] == 1


def test_resume(place):
    """What is in the file is done and comes first, with what was said of it; the rest keeps its order."""
    first = _Desk(settings(place))
    order = list(first.order)
    for i in range(3):
        first.save(i, said([i % 2, 0, 1], ["joy", "anger", "joy"][i]))
    again = _Desk(settings(place, annotator=" AMA", out=str(place / "ama.jsonl")))
    assert again.order == order and again.progress()["next"] == 3
    assert again.item(1)["given"] == dict(words=WORDS, prosody_annotations=[1, 0, 1], emotion="anger", unsure=False) and "given" not in again.item(3)
    again.save(4, said())                                                    # out of turn
    assert again.progress()["next"] == 3
    assert _Desk(settings(place)).order == order[:3] + [order[4], order[3], order[5]]


def test_order(place):
    """Each listener's own, the same each time; the manifest's on request."""
    order = [[k[0] for k in _Desk(settings(place, name, **more)).order] for name, more in (("ama", {}), ("ama", {}), ("kofi", {}), ("ama", dict(in_order=True)))]
    assert order[0] == order[1] != order[2] and order[3] == [f"{i}_furious.wav" for i in range(6)] == sorted(order[0]) == sorted(order[2])
    shuffled = list(order[3])
    random.Random("ama").shuffle(shuffled)
    assert order[0] == shuffled                                              # of tomorrow's version, too


@pytest.mark.parametrize("cut", [0, 1, 2, 9, 40, 150])
def test_half_a_line(place, capsys, cut):
    """It is left out and told; what is whole stays, byte for byte; a line that lacks nothing but its end is whole."""
    desk = _Desk(settings(place))
    desk.save(0, said())
    whole = (place / "ama.jsonl").read_bytes()
    desk.save(1, said())
    both = (place / "ama.jsonl").read_bytes()
    half = both[len(whole):len(whole) + cut] if cut else bytes(99)                                     # zeros: the machine went down
    (place / "ama.jsonl").write_bytes(whole + half)
    capsys.readouterr()
    assert _Desk(settings(place)).progress()["done"] == 1 and (place / "ama.jsonl").read_bytes() == whole
    assert f"its last line was never finished, and is left out: {half.decode()!r}" in capsys.readouterr().out
    (place / "ama.jsonl").write_bytes(both[:-1])
    desk = _Desk(settings(place))
    assert desk.progress()["done"] == 2 and (place / "ama.jsonl").read_bytes() == both and not capsys.readouterr().out
    desk.save(2, said())
    assert len(read(place / "ama.jsonl")) == 3
    (place / "ama.jsonl").write_bytes(whole[:60])
    assert _Desk(settings(place)).progress()["done"] == 0 and (place / "ama.jsonl").read_bytes() == b""


def test_other_files_are_refused(place):
    """One sentence with the line and the cure, and not a byte is changed."""
    _Desk(settings(place)).save(0, said())
    line = (place / "ama.jsonl").read_text(encoding="utf-8")
    other = json.dumps(json.loads(line) | dict(audio_filepath="elsewhere.wav")) + "\n"
    cases = {"other manifest": (line + other, "ama.jsonl:2: elsewhere.wav is not in .*corpus.jsonl: the file is of another manifest. Give that one, or another --out."),
             "kofi's": (line.replace('"ama"', '"kofi"'), "ama.jsonl:1: 'kofi' wrote this, not 'ama'. Give each listener a file of their own"),
             "a manifest": ((place / "corpus.jsonl").read_text(encoding="utf-8"), "ama.jsonl:1: this is no line of an annotation file. Give another --out."),
             "printed": (json.dumps(json.loads(line), indent=1), "ama.jsonl:1: this is no line of an annotation file"),
             "a note": ("to buy: bread", "no annotation file|none of an annotation file"), "a list": (f"[{line.strip()}]", "none of an annotation file"),
             "in the middle": (line + line[:50] + "\n" + line, "ama.jsonl:2: this is no line"), "wrong": (line.replace("false", '"no"'), "ama.jsonl:1: unsure must be true or false"),
             "half and wrong": (other + line[:40], "ama.jsonl:1: elsewhere.wav is not in")}
    for text, why in cases.values():
        (place / "ama.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises((ConfigError, ManifestError), match=why):
            _Desk(settings(place))
        assert (place / "ama.jsonl").read_text(encoding="utf-8") == text
    with pytest.raises(FolderError, match="is the manifest itself"):
        _Desk(settings(place, out=str(place / "corpus.jsonl")))
    with pytest.raises(FolderError, match="is no file"):
        _Desk(settings(place, out=str(place)))
    with pytest.raises(ConfigError, match="is no name"):
        _Desk(settings(place, annotator=" ", out=str(place / "new.jsonl")))


def test_disk(place, monkeypatch):
    """A line that cannot be written whole is not there, and can be saved again; a file that somebody else has written to is left alone."""
    desk = _Desk(settings(place))
    desk.save(0, said())
    before = (place / "ama.jsonl").read_bytes()

    def full(number):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr("os.fsync", full)
        with pytest.raises(StorageError, match=r"could not be saved \(No space left on device\). Make room"):
            desk.save(1, said())
    assert (place / "ama.jsonl").read_bytes() == before and desk.progress()["done"] == 1
    assert desk.save(1, said())["done"] == 2
    with (place / "ama.jsonl").open("ab") as f:
        f.write(before)
    with pytest.raises(FolderError, match="changed by somebody else"):
        desk.save(2, said())
    assert len(read(place / "ama.jsonl")) == 3


def test_emotions(place, tmp_path):
    """The manifest's, or those that are named; numbers are refused; without any only prominence is asked for."""
    rows = read(place / "corpus.jsonl")
    def desk(rows, **more):
        write(place / "corpus.jsonl", rows)
        return _Desk(settings(place, **more))
    assert desk(rows).names == ["anger", "joy"] and desk(rows, emotions=["b", "a"]).names == ["b", "a"]
    assert desk([r | dict(label=None, emotion=dict(joy=0.5, fear=0.5)) for r in rows]).names == ["fear", "joy"]
    numbers = [r | dict(label=i % 2) for i, r in enumerate(rows)]
    with pytest.raises(ConfigError, match=r"the emotions are numbers \(0, 1\), which nobody hears. Name them in their order: --emotions"):
        desk(numbers)
    assert desk(numbers, emotions=["akan"]).names[:2] == ["neutral", "confusion"]
    for wrong in (["joy", "Joy"], ["joy", "nan"]):
        with pytest.raises(ConfigError, match=f"--emotions {' '.join(wrong)}: give each emotion a name of its own"):
            desk(rows, emotions=wrong)
    with pytest.warns(UserWarning, match="1 rows name a stretch of a file that an earlier row names: it is heard once"):
        assert desk([*rows, rows[0] | dict(audio_filepath=f"./{rows[0]['audio_filepath']}")]).progress()["total"] == 6
    none = desk([r | dict(label=None) for r in rows])
    assert none.names == []
    none.save(0, said(emotion=None))
    assert read(place / "ama.jsonl")[0]["emotion"] is None and read(place / "ama.jsonl")[0]["prosody_annotations"] == [0, 1, 0]


def test_nothing_is_given_away(place):
    """Neither labels nor names nor speakers reach the page."""
    desk = _Desk(settings(place))
    shown = desk.item(0)
    assert set(shown) == {"index", "words", "times", "peaks", "seconds", "done", "total", "next", "pace"} and "furious" not in json.dumps(shown)
    assert shown["times"] == [[0.0, 0.3], [0.3, 0.6], [0.6, 0.9]] and max(shown["peaks"]) == 100
    (place / desk.order[1][0]).write_text("no sound")
    assert "cannot be decoded: text, not sound" in desk.item(1)["problem"] and desk.save(1, said(skipped=True))["done"] == 1
    assert desk.item(6) == dict(index=6, finished=True, **desk.progress())


def test_packs_and_parts(place, command):
    """A part of a file is heard alone; from a pack the same."""
    rows = [dict(audio_filepath="5_furious.wav", words=WORDS, emotion="joy", start=k / 2, end=k / 2 + 0.5) for k in range(3)]
    write(place / "corpus.jsonl", rows)
    assert command("pack", place / "corpus.jsonl", "--audio_base_path", place, "--out", place / "corpus.tar")[0] == 0
    whole = sf.read(place / "5_furious.wav", dtype="float32")[0]
    for audio in (place, place / "corpus.tar"):
        desk = _Desk(settings(place, out=str(place / f"{audio.name}.jsonl"), audio_base_path=str(audio), in_order=True))
        for k in range(3):
            assert np.abs(desk.samples(k) - whole[8000 * k:8000 * (k + 1)]).max() < 1e-4 and desk.item(k)["seconds"] == 0.5
            desk.save(k, said(emotion="joy"))
        assert [(r["start"], r["end"]) for r in read(desk.out)] == [(0.0, 0.5), (0.5, 1.0), (1.0, 1.5)]
        assert _Desk(settings(place, out=str(desk.out), audio_base_path=str(audio))).progress()["done"] == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that places words and has learned nothing else."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = SentencePieceTokenizer(40, folder / "tok", model_type="char").train_tokenizer(["me rekɔ fie", "bra ha"] * 9)
    torch.manual_seed(0)
    model = create_model(["anger", "joy"], tokenizer).eval()
    model.asr_nats.fill_(0.0)
    model.config.emotion_temperature = 0.5
    model.save_pretrained(folder / "best_model")
    return folder / "best_model"


def test_suggestions(place, model):
    """By the entropy of the calibrated emotion, the most uncertain first; the line keeps what was suggested beside what was said."""
    rows = [{k: v for k, v in r.items() if k not in ("word_times", "label")} for r in read(place / "corpus.jsonl")]
    del rows[5]["words"], rows[5]["text"], rows[5]["prosody_annotations"]
    write(place / "corpus.jsonl", rows)
    desk = _Desk(settings(place, suggest=str(model), device="cpu"))
    predictor, wanted = Predictor(model, "cpu"), {}
    for u in read_manifest(place / "corpus.jsonl", place):
        wanted[u.audio_filepath] = predictor(u, words=u.words)
    def entropy(p):
        return -sum(x * np.log(x) for x in p.probabilities.values())
    assert [k[0] for k in desk.order] == sorted(wanted, key=lambda k: -entropy(wanted[k])) and desk.names == ["anger", "joy"]
    for i, (name, *_) in enumerate(desk.order):
        answer, shown = wanted[name], desk.item(i)
        given = dict(emotion=answer.emotion, prosody_annotations=[int(w["prominent"]) for w in answer.words])
        assert shown["suggested"] == given | (dict(words=[w["word"] for w in answer.words]) if name == "5_furious.wav" else {})
        assert shown["times"] == ([[w["start"], w["end"]] for w in answer.words] if answer["aligned"] else None)
    assert any(a["aligned"] for a in wanted.values())
    i = [k[0] for k in desk.order].index("0_furious.wav")
    mine = "joy" if wanted["0_furious.wav"].emotion == "anger" else "anger"
    desk.save(i, said(emotion=mine))
    line, = read(place / "ama.jsonl")
    assert line["emotion"] == mine and line["suggested"] == desk.item(i)["suggested"] and line["suggested"]["emotion"] != mine
    again = _Desk(settings(place))                                            # without a model: what was suggested is not forgotten
    again.save(0, said(emotion=None))
    assert read(place / "ama.jsonl")[1]["suggested"] == line["suggested"]
    other = _Desk(settings(place, "kofi", in_order=True))
    other.save(0, said(emotion=None))
    assert all("suggested" not in row for row in merge(read_annotations([place / "ama.jsonl", place / "kofi.jsonl"]))[0])
    assert _spelt(["0", "1"], ["joy", "fear"]) == {"0": "joy", "1": "fear"} and _spelt(["1", "0"], ["joy", "fear"]) == {} and _spelt(["Joy ", "x"], ["fear", "joy"]) == {"Joy ": "joy"}
    with pytest.raises(ConfigError, match="it knows anger, which cannot be chosen here: joy, fear. Name all: --emotions"):
        _Desk(settings(place, "esi", suggest=str(model), emotions=["joy", "fear"]))


def test_a_model_without_emotions(place, model):
    """It fills in the marks alone, and the order is the listener's own, which is told."""
    torch.manual_seed(0)
    create_model(None, Predictor(model, "cpu").model.processor.tokenizer, tasks=["asr", "prosody"]).eval().save_pretrained(place / "marks")
    with pytest.warns(UserWarning, match="it knows no emotions, so that the order is the listener's own"):
        desk = _Desk(settings(place, suggest=str(place / "marks"), device="cpu"))
    assert desk.order == _Desk(settings(place)).order and desk.names == ["anger", "joy"]
    assert set(desk.item(0)["suggested"]) == {"prosody_annotations"} and desk.item(0)["times"] == [[0.0, 0.3], [0.3, 0.6], [0.6, 0.9]]


# ------------------------------------------------------------------------------------------------------------- the addresses

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(manifest, audio, out, annotator, *argv):
    """The command in a process of its own: the process, its address, its log."""
    port, log = free_port(), out.with_suffix(f".{time.time_ns()}.log")
    argv = [sys.executable, "-m", "prosody_ser.cli", "annotate", manifest, "--audio_base_path", audio, "--annotator", annotator, "--out", out, "--port", port, *argv]
    env = os.environ | dict(PYTHONPATH=str(ROOT), GOMP_SPINCOUNT="0")
    with log.open("w") as f:
        server = subprocess.Popen([*map(str, argv)], env=env, stdout=f, stderr=f)
    end = time.time() + 120
    while "Ctrl-C" not in log.read_text() and server.poll() is None and time.time() < end:
        time.sleep(0.05)
    return server, f"http://127.0.0.1:{port}", log


@contextmanager
def annotating(manifest, audio, out, annotator, *argv):
    server, address, log = start(manifest, audio, out, annotator, *argv)
    try:
        assert server.poll() is None, log.read_text()
        yield address
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0 and "stopped: " in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
        assert not out.with_name(f"{out.name}.lock").exists()
    finally:
        server.kill()


def ask(url, post=None, **headers):
    """Status, headers, JSON or bytes of an answer."""
    data = None if post is None else post if isinstance(post, bytes) else json.dumps(post).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | headers)
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as e:
        answer = e
    body = answer.read()
    return answer.status, answer.headers, json.loads(body) if "json" in answer.headers.get("Content-Type", "") else body


def answer(marks=(0, 1, 0), emotion="joy", words=WORDS, **more):
    return dict(words=list(words), prosody_annotations=list(marks), emotion=emotion, unsure=False, skipped=False, seconds=3.0) | more


@by_http
def test_addresses(place, command):
    """What the page asks for, and what nobody may ask for; one program a file; a kill loses nothing."""
    out = place / "ama.jsonl"
    server, address, log = start(place / "corpus.jsonl", place, out, "ama")
    try:
        status, headers, page = ask(f"{address}/")
        assert status == 200 and b"What do you hear?" in page and headers["Content-Security-Policy"].startswith("default-src 'self';") and headers["Cache-Control"] == "no-store"
        for name, kind in (("annotate.js", "text/javascript"), ("annotate.css", "text/css"), ("style.css", "text/css")):
            status, headers, body = ask(f"{address}/{name}")
            assert status == 200 and headers["Content-Type"].startswith(kind) and body == (ROOT / "prosody_ser" / name).read_bytes()
        assert [ask(f"{address}/{name}")[0] for name in ("serve.py", "docs", "openapi.json", "..%2fsetup.py", "items/x")] == [404, 404, 404, 404, 422]
        assert ask(f"{address}/items")[2] == dict(annotator="ama", emotions=["anger", "joy"], done=0, total=6, next=0, pace=None)
        shown = ask(f"{address}/items/0")[2]
        order = [k[0] for k in _Desk(settings(place)).order]
        status, headers, sound = ask(f"{address}/sound/0")
        (place / "heard.wav").write_bytes(sound)
        assert np.abs(load_audio(place / "heard.wav") - load_audio(place / order[0])).max() < 1e-4 and len(shown["peaks"]) == 500
        assert shown["seconds"] == pytest.approx(sf.info(place / order[0]).duration)
        assert ask(f"{address}/items", Host="evil.example")[0] == 400                                     # a name that was turned to this machine
        assert ask(f"{address}/items/0", answer(), **{"Content-Type": "text/plain"})[0] == 422            # what another page's form could send
        assert ask(f"{address}/items/0", answer(emotion="fear")) [::2] == (422, dict(error="Choose an emotion (anger, joy), or skip it."))
        assert ask(f"{address}/items/9")[::2] == (422, dict(error="there is no utterance 9.")) and ask(f"{address}/items/0", dict(words=WORDS))[0] == 422
        assert not out.exists()
        assert ask(f"{address}/items/0", answer())[2] == dict(done=1, total=6, next=1, pace=1200.0)
        assert ask(f"{address}/items/1", answer(skipped=True))[2]["next"] == 2
        code, printed = command("annotate", place / "corpus.jsonl", "--audio_base_path", place, "--annotator", "ama", "--out", out, "--port", free_port())
        assert code == 1 and f"{out}.lock is in use by process {server.pid}" in printed and "give another --out" in printed
        server.kill()
        server.wait()
        assert [r["audio_filepath"] for r in read(out)] == order[:2]
        with out.open("a") as f:
            f.write(out.read_text(encoding="utf-8")[:33])
        with annotating(place / "corpus.jsonl", place, out, "ama") as address:
            assert ask(f"{address}/items")[2]["next"] == 2
            assert ask(f"{address}/items/1")[2]["given"]["emotion"] is None
            ask(f"{address}/items/2", answer())
        assert [r["audio_filepath"] for r in read(out)] == order[:3]
    finally:
        server.kill()


@by_http
def test_port_is_taken(place, command):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        code, printed = command("annotate", place / "corpus.jsonl", "--audio_base_path", place, "--annotator", "ama", "--out", place / "ama.jsonl", "--port", port)
    assert (code, printed) == (1, f"error: --port {port}: another program listens there. Give another one.\n")
    assert not list(place.glob("ama.jsonl*"))


def test_without_a_server(place, command, monkeypatch):
    monkeypatch.setattr("prosody_ser.annotate.find_spec", lambda name: None)
    code, printed = command("annotate", place / "corpus.jsonl", "--audio_base_path", place, "--annotator", "ama", "--out", place / "ama.jsonl")
    assert (code, printed) == (1, "error: annotate needs a web server: pip install 'prosody-ser[serve]'.\n") and not list(place.glob("ama.jsonl*"))


@by_http
@needs(SHARED / "data/twi/all.jsonl")
def test_twi(tmp_path, command):
    """Two listeners at once on real clips without labels, and what agreement tells of their files."""
    rows = [r for r in read(SHARED / "data/twi/all.jsonl") if 3 <= len(r["words"]) <= 6][:8]
    write(tmp_path / "twi.jsonl", rows)
    label = {r["audio_filepath"]: (["joy", "anger"][i % 2], [int(k == i % 3) for k in range(len(r["words"]))]) for i, r in enumerate(rows)}
    slips = {rows[0]["audio_filepath"]: ("anger", None), rows[3]["audio_filepath"]: (None, [1] * len(rows[3]["words"]))}
    where = tmp_path / "twi.jsonl", SHARED / "data/twi"
    names = "--emotions", "joy", "anger", "sadness"
    with annotating(*where, tmp_path / "ama.jsonl", "ama", *names) as ama, annotating(*where, tmp_path / "kofi.jsonl", "kofi", *names) as kofi:
        for address, name in ((ama, "ama"), (kofi, "kofi")):
            order = [k[0] for k in _Desk(AnnotateConfig(manifest=str(where[0]), audio_base_path=str(where[1]), annotator=name, out=str(tmp_path / "none"), emotions=["joy"])).order]
            for i, file in enumerate(order):
                shown, (emotion, marks) = ask(f"{address}/items/{i}")[2], label[file]
                other = slips.get(file, (None, None)) if name == "kofi" else (None, None)
                assert shown["words"] == next(r["words"] for r in rows if r["audio_filepath"] == file) and "problem" not in shown
                assert ask(f"{address}/items/{i}", answer(other[1] or marks, other[0] or emotion, shown["words"]))[0] == 200
    found = agreement(read_annotations([tmp_path / "ama.jsonl", tmp_path / "kofi.jsonl"]))
    from sklearn.metrics import cohen_kappa_score
    ours = [[e for e, _ in label.values()], [slips.get(f, (None,))[0] or e for f, (e, _) in label.items()]]
    assert found["emotion"]["pairs"][0]["kappa"] == pytest.approx(cohen_kappa_score(*ours)) and found["shared"] == 8
    marks = [[m for _, ms in label.values() for m in ms], [m for f, (_, ms) in label.items() for m in (slips.get(f, (0, None))[1] or ms)]]
    assert found["prominence"]["pairs"][0]["kappa"] == pytest.approx(cohen_kappa_score(*marks)) and found["annotators"]["ama"]["seconds"] == 3.0
    code, printed = command("agreement", tmp_path / "ama.jsonl", tmp_path / "kofi.jsonl")
    assert code == 0 and f"{cohen_kappa_score(*ours):.2f}" in printed


# ------------------------------------------------------------------------------------------------------------ in a browser

@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser, address, width=900, height=1000):
    """The page; it asks for nothing but at its own address, and no script of it fails."""
    page = browser.new_page(viewport=dict(width=width, height=height))
    page.set_default_timeout(15_000)
    asked, wrong = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.goto(address)
    page.wait_for_selector("#work[data-index]", state="attached")
    yield page
    assert not wrong and not [u for u in asked if not u.startswith((address, "data:", f"blob:{address}"))]
    page.close()


def at(page, index):
    page.wait_for_selector(f"#work[data-index='{index}']", state="attached")


def state(page):
    """What is pressed: words, emotions, unsure."""
    def pressed(where):
        return page.locator(f"{where}[aria-pressed=true]").all_inner_texts()
    return pressed(".toggle"), [e.split()[-1] for e in pressed("#emotions button")], bool(pressed("#unsure"))


def keys(page, *names):
    for name in names:
        page.keyboard.press(name)


def until(page, holds):
    """Wait until something holds (the page's own rules do not let Playwright wait for it there)."""
    end = time.time() + 15
    while not page.evaluate(holds):
        assert time.time() < end, holds
        page.wait_for_timeout(20)


@in_browser
def test_keyboard(browser, place):
    """From the keyboard alone: marks, emotions, play, repeat, speed, transcript, unsure, skip, undo, until all is done."""
    with annotating(place / "corpus.jsonl", place, place / "ama.jsonl", "ama", "--in_order") as address, opened(browser, address) as page:
        assert page.inner_text("#progress") == "ama: 1 of 6; 0 done" and state(page) == ([], [], False) and page.locator(".toggle").all_inner_texts() == WORDS
        assert page.locator("#suggests").is_hidden() and page.locator("#untimed").is_hidden() and "Rapid Prosody Transcription" in page.inner_text("details")
        page.evaluate("""() => { window.played = []; const play = HTMLMediaElement.prototype.play;
            HTMLMediaElement.prototype.play = function () { window.audio = this; played.push([this.currentTime, this.playbackRate]); return play.call(this); }; }""")
        keys(page, "n")
        page.wait_for_selector("#message:has-text('Choose an emotion (anger, joy), or skip it.')")
        keys(page, "ArrowRight", "Enter", "ArrowRight", "Enter", "Enter", "2")
        assert state(page) == (["rekɔ"], ["joy"], False)
        keys(page, " ")
        until(page, "!audio.paused && audio.currentTime > 0.1")
        keys(page, " ")
        assert page.evaluate("audio.paused") and abs(page.evaluate("audio.duration") - 1.0) < 0.01
        keys(page, "-", "-", "ArrowLeft", "l")                                # rekɔ: 0.3 to 0.6 s, again and again at 0.6 of its speed
        page.evaluate("() => { window.heard = []; window.timer = setInterval(() => heard.push(audio.currentTime), 10); }")
        until(page, "heard.filter((t, i) => i && t < heard[i - 1]).length >= 2")
        heard = page.evaluate("heard")
        assert 0.28 <= min(heard) and max(heard) < 0.75 and page.evaluate("played.at(-1)[1]") == 0.6 and page.inner_text("#rate") == "0.6 ×" and page.evaluate("audio.preservesPitch")
        keys(page, " ", "+", "+", "n")
        at(page, 1)
        assert page.inner_text("#rate") == "1 ×" and state(page) == ([], [], False)
        keys(page, "Enter", "ArrowRight", "ArrowRight", "Enter", "u", "1", "e")
        assert page.locator("#transcript").is_visible() and page.input_value("#text") == "me rekɔ fie"
        page.keyboard.press("Control+a")
        page.keyboard.type("ɛnnɛ me kɔ fie n 2")
        keys(page, "Enter")
        assert page.locator(".toggle").all_inner_texts() == ["ɛnnɛ", "me", "kɔ", "fie", "n", "2"] and state(page) == (["me", "fie"], ["anger"], True)
        keys(page, "e")
        page.keyboard.type(" and more")
        keys(page, "Escape")
        assert page.locator(".toggle").count() == 6
        keys(page, "n")
        at(page, 2)
        keys(page, "s")
        at(page, 3)
        assert page.inner_text("#progress").startswith("ama: 4 of 6; 3 done, ") and page.inner_text("#progress").endswith(" an hour")
        keys(page, "z")
        at(page, 2)
        keys(page, "z")
        at(page, 1)
        assert page.locator(".toggle").all_inner_texts() == ["ɛnnɛ", "me", "kɔ", "fie", "n", "2"] and state(page) == (["me", "fie"], ["anger"], True)
        keys(page, "ArrowRight", "Enter", "u", "n")
        at(page, 3)                                                           # on to what is not done
        for i in (3, 4):
            keys(page, "2", "n")
            at(page, i + 1)
        page.reload()
        at(page, 5)
        keys(page, "1", "n")
        page.wait_for_selector("#message:has-text('All done')")
        keys(page, " ", "l", "n", "s", "Enter", "z")
        at(page, 5)
        assert state(page) == ([], ["anger"], False)
    lines = read(place / "ama.jsonl")
    got = [(r["audio_filepath"][0], r["emotion"], r["words"], r["prosody_annotations"], r["unsure"], r["skipped"]) for r in lines]
    long = ["ɛnnɛ", "me", "kɔ", "fie", "n", "2"]
    assert got == [("0", "joy", WORDS, [0, 1, 0], False, False), ("1", "anger", long, [0, 1, 0, 1, 0, 0], True, False), ("2", None, WORDS, None, False, True), ("1", "anger", long, [0, 0, 0, 1, 0, 0], False, False),
                   ("3", "joy", WORDS, [0, 0, 0], False, False), ("4", "joy", WORDS, [0, 0, 0], False, False), ("5", "anger", WORDS, [0, 0, 0], False, False)]
    assert all(0 <= r["seconds"] < 60 for r in lines) and lines[0]["seconds"] > 0.5 and lines[3]["seconds"] >= lines[1]["seconds"] and "word_times" not in lines[1]


@in_browser
def test_suggestions_on_the_page(browser, place, model):
    """They are pressed already, the page says what they do, and words play where the model has placed them; other people's text is no HTML."""
    rows = read(place / "corpus.jsonl")
    write(place / "corpus.jsonl", [{k: v for k, v in r.items() if k != "word_times"} | dict(words=["me", "<b>fie"]) | dict(prosody_annotations=None) for r in rows])
    with annotating(place / "corpus.jsonl", place, place / "ama.jsonl", "ama", "--suggest", model, "--device", "cpu", "--emotions", "anger", "joy", "<i>x") as address, opened(browser, address, 390) as page:
        shown = ask(f"{address}/items/0")[2]
        assert page.locator("#suggests").is_visible() and "Suggestions bias" in page.inner_text("#suggests")
        assert state(page) == ([w for w, m in zip(shown["words"], shown["suggested"]["prosody_annotations"], strict=True) if m], [shown["suggested"]["emotion"]], False)
        assert page.locator(".toggle").all_inner_texts() == ["me", "<b>fie"] and page.locator("#emotions button").last.inner_text().endswith("<i>x")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        keys(page, "3", "n")
        at(page, 1)
    line, = read(place / "ama.jsonl")
    assert line["emotion"] == "<i>x" and line["suggested"] == shown["suggested"]


@in_browser
def test_what_goes_wrong_on_the_page(browser, place):
    """Without times all is played, and said; a recording that cannot be heard can only be skipped; a program that has gone is told, and nothing that was saved is lost."""
    write(place / "corpus.jsonl", [{k: v for k, v in r.items() if k != "word_times"} for r in read(place / "corpus.jsonl")])
    (place / "1_furious.wav").write_text("no sound")
    server, address, log = start(place / "corpus.jsonl", place, place / "ama.jsonl", "ama", "--in_order")
    try:
        with opened(browser, address) as page:
            assert "When each word is spoken is not known" in page.inner_text("#untimed")
            keys(page, "1", "n")
            at(page, 1)
            page.wait_for_selector("#message:has-text('cannot be decoded: text, not sound')")
            keys(page, "1", "n")
            page.wait_for_timeout(300)
            assert page.get_attribute("#work", "data-index") == "1" and len(read(place / "ama.jsonl")) == 1
            keys(page, "s")
            at(page, 2)
            server.kill()
            server.wait()
            keys(page, "Enter", "1", "n")
            page.wait_for_selector("#message:has-text('does not answer: start it again')")
            assert state(page) == (["me"], ["anger"], False) and len(read(place / "ama.jsonl")) == 2
    finally:
        server.kill()


@in_browser
@needs(SHARED / "data/twi/all.jsonl")
def test_picture(browser, tmp_path):
    """The page with a real clip; SCREENSHOTS=FOLDER keeps it."""
    rows = [r for r in read(SHARED / "data/twi/all.jsonl") if 5 <= len(r["words"]) <= 7][:8]
    write(tmp_path / "twi.jsonl", rows)
    names = "--emotions", "neutral", "anger", "joy", "sadness", "surprise", "fear"
    with annotating(tmp_path / "twi.jsonl", SHARED / "data/twi", tmp_path / "ama.jsonl", "ama", *names) as address, opened(browser, address, 820, 760) as page:
        keys(page, "1", "n")
        at(page, 1)
        keys(page, "ArrowRight", "Enter", "ArrowRight", "ArrowRight", "Enter", "3")
        assert len(state(page)[0]) == 2 and page.evaluate("document.querySelector('#wave').width") > 300
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "annotate.png")
