"""Prediction in bulk: the same answer alone and in any batch, names of all kinds, folders that may be interrupted, formats that other programs read."""
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from itertools import combinations
from pathlib import Path
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, read, write
from forge import forge, python
from test_numerics import SMALL, noise, small_model

from prosody_ser.audio import load_audio
from prosody_ser.cli import main
from prosody_ser.formats import FORMATS, tiers_of, to_audacity, to_csv, to_eaf, to_srt, to_textgrid
from prosody_ser.inference import Predictor
from prosody_ser.model import create_model
from prosody_ser.text import ManifestError
from prosody_ser.tokenizer import SentencePieceTokenizer

torch.set_num_threads(1)
GREEDY = ["--decode_method", "greedy", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("predict")
    return folder, SentencePieceTokenizer(40, folder / "tok", model_type="char").train_tokenizer(["me kɔ fie", "bra ha"] * 9)


def ready(model):
    """The model as if its transcript head had learned to place words."""
    model.asr_nats.fill_(0.0)
    return model.eval()


@pytest.fixture(scope="module")
def saved(made):
    """The folder of a tiny model that places words."""
    torch.manual_seed(0)
    ready(create_model(["anger", "joy"], made[1])).save_pretrained(made[0] / "model")
    return made[0] / "model"


def speech(path, seconds=0.8, seed=0, rate=16000, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.random.default_rng(seed).normal(size=round(rate * seconds)) * 0.1, rate, **more)
    return path


@pytest.fixture
def talks(tmp_path):
    """A folder with three recordings and a note."""
    folder = tmp_path / "talks"
    for i, name in enumerate(["b/1.wav", "a/1.wav", "ɔkɔ.flac"]):
        speech(folder / name, 0.6 + i / 5, i)
    (folder / "note.txt").write_text("no sound")
    return folder


def run(capsys, *argv):
    """Exit code, standard output and standard error of the command."""
    code = 0
    try:
        main([*map(str, argv)])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    out, err = capsys.readouterr()
    return code, out, err


def same(one, other, eps=1e-3):
    """Two answers are the same: words, times and emotion exactly, probabilities but for rounding in the last digits."""
    assert list(one) == list(other)
    for k in one.keys() - {"probabilities", "words", "alignment_score"}:
        assert one[k] == other[k], k
    for p, q in ((one.probabilities or {}, other.probabilities or {}), *zip(one.words or [], other.words or [], strict=True)):
        assert p.keys() == q.keys()
        for k in p:
            assert p[k] == pytest.approx(q[k], abs=eps) if isinstance(p[k], float) else p[k] == q[k], k
    assert (one.get("alignment_score") is None) == (other.get("alignment_score") is None)


# ------------------------------------------------------------------------------------------------- alone and in a batch

@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("decode", ["greedy", "beam"])
def test_alone_as_in_any_batch(made, backbone, decode):
    """Ragged lengths, in several orders and batch sizes: what a recording is answered depends on nothing beside it."""
    predictor = Predictor(ready(small_model(made, backbone)), "cpu", decode)
    clips = [noise(s, i).astype(np.float32) for i, s in enumerate((0.06, 1.3, 0.5, 2.1, 0.5, 0.9, 1.3))]
    alone = [predictor(c) for c in clips]
    for order, size in ((range(7), 16), (range(6, -1, -1), 3), ([3, 0, 3, 1], 4)):
        together = list(predictor.many([clips[i] for i in order], batch_size=size))
        for i, answer in zip(order, together, strict=True):
            same(alone[i], answer)
            assert len(answer.samples) == len(clips[i])


def test_long_one_beside_short(made):
    """A recording that is heard in chunks, among others."""
    model = ready(small_model(made, "tiny", max_seconds=4.0))
    clips = [noise(s, i).astype(np.float32) for i, s in enumerate((9.3, 0.7, 3.9, 5.1))]
    predictor = Predictor(model, "cpu", "greedy")
    for clip, answer in zip(clips, predictor.many(clips), strict=True):
        same(predictor(clip), answer)


@pytest.mark.parametrize("tasks", [t for n in (1, 2, 3) for t in combinations(("ser", "asr", "prosody"), n)], ids="+".join)
def test_heads(made, tasks, tmp_path, capsys):
    """Each combination of heads: what is there is answered, in every format; nothing else is."""
    torch.manual_seed(0)
    model = create_model(["anger", "joy"] if "ser" in tasks else None, made[1] if "asr" in tasks else None, tasks=tasks)
    predictor = Predictor(ready(model), "cpu", "greedy")
    clips = [noise(s).astype(np.float32) for s in (0.7, 1.1)]
    words = {"transcript", "aligned", "alignment_score", "words"} if "asr" in tasks else set()
    for clip, answer in zip(clips, predictor.many(clips), strict=True):
        same(predictor(clip), answer)
        assert set(answer) == {"seconds", "unusual"} | ({"emotion", "probabilities"} if "ser" in tasks else set()) | words
        assert all(("prominence" in w) == ("prosody" in tasks) for w in answer.words or [])
        assert answer._repr_html_() and answer.to_textgrid() and type(answer.to_dict()) is dict
    given = predictor(clips[0], words="me kɔ fie")                      # words that are given are marked without a transcript head
    assert [w["word"] for w in given.words] == ["me", "kɔ", "fie"] and ("prominence" in given.words[0]) == ("prosody" in tasks)
    model.save_pretrained(tmp_path / "m")
    speech(tmp_path / "a.wav")
    for form in ("jsonl", "csv", *FORMATS):
        assert run(capsys, "predict", tmp_path / "m", tmp_path / "a.wav", "--format", form, *GREEDY)[0] == 0
    assert run(capsys, "predict", tmp_path / "m", tmp_path / "a.wav", "--table", *GREEDY)[1].count("\n") == 2


def test_errors_in_their_place(saved, talks):
    predictor = Predictor(saved, "cpu", "greedy")
    files = [talks / "a/1.wav", "gone.wav", np.zeros(3), talks / "b/1.wav"]
    kinds = [type(x).__name__ for x in predictor.many(files, keep_errors=True, batch_size=2)]
    assert kinds == ["Prediction", "ManifestError", "ValueError", "Prediction"]
    answers = predictor.many(files)
    assert next(answers)["emotion"]
    with pytest.raises(ManifestError, match="gone.wav"):
        next(answers)


# ---------------------------------------------------------------------------------------------------------- the command

def test_old_command(saved, talks, tmp_path, capsys):
    """As it always was: a JSON object a line, in order, a picture each, a bad file told, the exit code."""
    files = [talks / "b/1.wav", tmp_path / "gone.wav", talks / "ɔkɔ.flac", talks / "a/1.wav"]
    code, out, err = run(capsys, "predict", "--checkpoint_path", saved, *files, "--plot_dir", tmp_path / "P", *GREEDY)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [a["audio_filepath"] for a in answers] == [str(f) for i, f in enumerate(files) if i != 1]
    assert list(answers[0])[:4] == ["audio_filepath", "seconds", "emotion", "probabilities"] and "gone.wav: no such" in err and "1 of 4" in err
    assert len(list((tmp_path / "P").glob("*.png"))) == 3
    predictor = Predictor(saved, "cpu", "greedy")
    for answer in answers:
        alone = predictor(answer["audio_filepath"])
        assert alone.emotion == answer["emotion"] and alone.transcript == answer["transcript"]


def test_model_first(saved, talks, capsys, tmp_path):
    one, other = (run(capsys, "predict", *model, talks / "a/1.wav", *GREEDY) for model in ([saved], ["--checkpoint_path", saved]))
    assert one == other and one[0] == 0
    code, _, err = run(capsys, "predict", talks, talks / "a/1.wav")
    assert code == 2 and "name the model" in err and f"{talks} is no model (you are in {os.getcwd()})" in err


@pytest.mark.parametrize("names, found", [
    (["talks"], ["talks/ɔkɔ.flac", "talks/a/1.wav", "talks/b/1.wav"]), (["talks/*/1.wav"], ["talks/a/1.wav", "talks/b/1.wav"]),
    (["talks/**/*.wav", "talks/ɔkɔ.flac"], ["talks/a/1.wav", "talks/b/1.wav", "talks/ɔkɔ.flac"]), (["rows"], ["talks/b/1.wav", "talks/b/1.wav"]),
    (["array.json"], ["talks/a/1.wav"])])
def test_names(saved, talks, tmp_path, capsys, monkeypatch, names, found):
    """Folders, patterns and manifests (by content), in order."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows", [dict(audio_filepath="talks/b/1.wav", start=0.1, end=0.5), dict(audio_filepath="talks/b/1.wav", id="x")])
    (tmp_path / "array.json").write_text('[\n{"audio_filepath":\n"talks/a/1.wav"}]')
    code, out, _ = run(capsys, "predict", saved, *names, *GREEDY)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [a["audio_filepath"] for a in answers] == found
    if names == ["rows"]:
        assert [(a["id"], a["start"], a["end"], a["seconds"]) for a in answers] == [(None, 0.1, 0.5, 0.4), ("x", None, None, 0.6)]


@pytest.mark.parametrize("form", ["lines", "nul", "sound", "silence", "nothing"])
def test_standard_input(saved, talks, tmp_path, form):
    """A list, or one recording; one is not taken for the other."""
    quiet = io.BytesIO()
    sf.write(quiet, np.zeros(8000), 8000, format="WAV")                  # all its bytes could be text
    data = {"lines": f"{talks / 'a/1.wav'}\r\n\n{talks / 'ɔkɔ.flac'}\n".encode(), "nul": f"{talks / 'a/1.wav'}\0{talks / 'ɔkɔ.flac'}\0".encode(),
            "sound": (talks / "b/1.wav").read_bytes(), "silence": quiet.getvalue(), "nothing": b""}[form]
    for names in ([], ["-"]):
        done = python("-m", "prosody_ser.cli", "predict", saved, *names, *GREEDY, data=data)
        out, err = [json.loads(x) for x in done.stdout.splitlines()], done.stderr
        assert "Traceback" not in err
        if names:
            assert [a["audio_filepath"] for a in out] == ["-"] * (form in ("sound", "silence")) and (done.returncode == 0) == (form in ("sound", "silence"))
            assert form != "nothing" or "-: cannot be decoded: empty" in err
        elif form in ("lines", "nul"):
            assert [Path(a["audio_filepath"]).name for a in out] == ["1.wav", "ɔkɔ.flac"] and done.returncode == 0
        else:
            assert not out and (form == "nothing" or "named by a dash" in err)


def test_odd_recordings(saved, tmp_path, capsys):
    """mp3, 8 kHz mu-law, stereo at 48 kHz, 24 bit, m4a without ffmpeg, a corrupt and an empty one: the answer or the sentence for each."""
    folder = tmp_path / "odd"
    speech(folder / "a.mp3", 1, format="MP3")
    speech(folder / "b.wav", 1, rate=8000, subtype="ULAW")
    sf.write(folder / "c.wav", np.random.default_rng(0).normal(size=(48000, 2)) * 0.1, 48000)
    speech(folder / "d.wav", 1, subtype="PCM_24")
    (folder / "e.m4a").write_bytes(b"\0\0\0\x0cftypM4A \0\0\0\x10mdat12345678")
    (folder / "f.wav").write_bytes((folder / "d.wav").read_bytes()[:9000])
    (folder / "g.wav").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        code, out, err = run(capsys, "predict", saved, folder, *GREEDY)
    assert code == 1 and [Path(json.loads(x)["audio_filepath"]).name for x in out.splitlines()] == ["a.mp3", "b.wav", "c.wav", "d.wav"]
    assert "e.m4a: cannot be decoded: MP4" in err and "or install ffmpeg" in err and "f.wav: the file is cut off" in err and "g.wav: cannot be decoded: empty" in err
    assert "3 of 7" in err


def test_ffmpeg(saved, tmp_path, capsys, monkeypatch):
    """What libsndfile does not read goes through ffmpeg: an argument list with the file's own name, whatever that looks like; its errors are told."""
    tools, wav = tmp_path / "tools", speech(tmp_path / "sound.wav", 1)
    tools.mkdir()
    data = wav.read_bytes()
    (tmp_path / "piped").write_bytes(data[:4] + b"\xff" * 4 + data[8:40] + b"\xff" * 4 + data[44:])     # as a pipe leaves it
    (tools / "ffmpeg").write_text(f"""#!{sys.executable}
import sys, os
name = sys.argv[sys.argv.index("-i") + 1]
if "bad" in name: sys.exit("Invalid data found when processing input")
assert os.path.isfile(name.removeprefix("file:")) and "-xerror" in sys.argv
os.write(1, open({str(tmp_path / 'piped')!r}, "rb").read())
if "odd" in name: sys.stderr.write("a packet is damaged\\n")""")
    (tools / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    film = b"\0\0\0\x0cftypM4A \0\0\0\x10mdat12345678"
    names = ["-i; rm -rf x.m4a", "bad.m4a", "odd.webm", "cut.m4a", "concat:a|b.m4a"]
    for name in names:
        (tmp_path / name).write_bytes({"odd.webm": b"\x1aE\xdf\xa3\1", "cut.m4a": film[:-3]}.get(name, film))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code, out, err = run(capsys, "predict", "--checkpoint_path", saved, *(f"./{n}" for n in names), *GREEDY)
        np.testing.assert_array_equal(load_audio("concat:a|b.m4a"), load_audio(wav))
    assert code == 1 and [json.loads(x)["seconds"] for x in out.splitlines()] == [1.0] * 3
    assert "bad.m4a: cannot be decoded: MP4 (M4A, AAC). Convert it" in err and "Invalid data found" in err and "cut.m4a: the file is cut off" in err
    assert any("odd.webm: ffmpeg says: a packet is damaged" in str(w.message) for w in told)


# ---------------------------------------------------------------------------------------------------------------- resume

def test_resume(saved, talks, tmp_path, capsys):
    """Done is done; half a line is not; a changed file and another model are predicted anew; a corrected file stays."""
    out = tmp_path / "out"
    command = ["predict", saved, talks, "--out", out, *GREEDY]
    assert run(capsys, *command, "--format", "textgrid")[0] == 0
    before = (out / "predictions.jsonl").read_bytes()
    code, _, err = run(capsys, *command)
    assert code == 1 and "Go on with it by --resume" in err and (out / "predictions.jsonl").read_bytes() == before
    (out / "predictions.jsonl").write_bytes(before[:-20])
    hand = next(out.glob("*ɔkɔ*.TextGrid"))
    hand.write_text("by hand")
    shutil.move(talks / "b/1.wav", tmp_path / "away.wav")               # its line stays
    speech(talks / "a/1.wav", 1.1, 9)
    assert run(capsys, *command, "--format", "textgrid", "--resume")[0] == 0
    lines = {Path(r["audio_filepath"]).relative_to(talks).as_posix(): r for r in read(out / "predictions.jsonl")}
    assert hand.read_text() == "by hand" and lines["a/1.wav"]["seconds"] == 1.1
    assert lines["ɔkɔ.flac"] == json.loads(before.decode().splitlines()[0])
    shutil.move(tmp_path / "away.wav", talks / "b/1.wav")
    run(capsys, *command, "--resume", "--plot", "--format", "csv")
    rows = read(out / "predictions.jsonl")
    assert len(rows) == 3 and len(list(out.glob("*.png"))) == 3
    table = list(csv.DictReader(io.StringIO((out / "predictions.csv").read_text())))
    assert [r["emotion"] for r in table] == [r["emotion"] for r in rows] and {"p_anger", "p_joy", "transcript", "prominent_words"} <= table[0].keys()
    stamp = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.suffix != ".csv"}
    assert run(capsys, "predict", saved, talks, "--out", out, "--resume", "--plot", *GREEDY)[0] == 0
    assert stamp == {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.suffix != ".csv"}
    run(capsys, "predict", saved, talks, "--out", out, "--resume", "--decode_method", "beam", "--device", "cpu")
    assert len(read(out / "predictions.jsonl")) == 3 and not {r["key"] for r in rows} & {r["key"] for r in read(out / "predictions.jsonl")}


def test_what_changes_nothing_and_what_stays_is_told(saved, talks, tmp_path, capsys, monkeypatch):
    """A setting of timelines without one; nothing to predict; answers to recordings that were not named again."""
    out = tmp_path / "out"
    code, _, err = run(capsys, "predict", saved, talks, "--out", out, "--max_seconds", 5, *GREEDY)
    assert code == 0 and "without effect, since there is no --timeline: --max_seconds" in err
    code, printed, err = run(capsys, "predict", saved, talks / "a/1.wav", "--out", out, "--resume", "--decode_method", "beam", "--device", "cpu")
    assert code == 0 and "3 answers in" in printed and "2 of them left as they were" in printed and "max_seconds" not in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    code, printed, err = run(capsys, "predict", saved)
    assert (code, printed) == (0, "") and "nothing was named" in err


@pytest.mark.parametrize("name, form", [("1.TextGrid", "textgrid"), ("1.txt", "audacity"), ("1.png", "jsonl"), ("predictions.csv", "csv"), ("predictions.jsonl", "jsonl")])
def test_nothing_of_the_user_is_written_over(saved, tmp_path, capsys, name, form):
    audio, out = speech(tmp_path / "1.wav"), tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}\n')
    for more in ([], ["--resume"]):
        code, _, err = run(capsys, "predict", saved, audio, "--out", out, "--format", form, "--plot", *GREEDY, *more)
        if (name, more) == ("predictions.csv", ["--resume"]):
            continue
        assert code == 1 and "error:" in err and (out / name).read_text() == '{"mine": 1}\n' and [p.name for p in out.iterdir()] == [name]


def test_killed_between(saved, talks, tmp_path):
    """A process that is killed leaves whole lines, and the next one does the rest."""
    for i in range(30):
        speech(talks / f"more/{i:02}.wav", 0.5, i)
    command = ["-m", "prosody_ser.cli", "predict", saved, talks, "--out", tmp_path / "out", "--batch_size", "1", *GREEDY]
    file = tmp_path / "out/predictions.jsonl"
    job = forge().begin(command, ROOT, os.environ, tmp_path / "log.txt")
    while not (file.exists() and file.read_bytes().count(b"\n") >= 3) and not job.is_zombie():
        pass
    job.signal(signal.SIGKILL).end()
    first = file.read_bytes().splitlines(keepends=True)
    assert 3 <= len(first) and python(*command, "--resume").returncode == 0
    rows = read(file)
    assert len(rows) == 33 and file.read_bytes().startswith(b"".join(x for x in first if x.endswith(b"\n")))


# --------------------------------------------------------------------------------------------------------------- formats

ANSWER = dict(audio_filepath="ɔ.wav", seconds=3.25, emotion='jo"y', probabilities={"anger": 0.2, 'jo"y': 0.8}, transcript='ɔkɔ "fie" <b> a', aligned=True, alignment_score=-0.1, words=[
    dict(word="ɔkɔ", start=0.0, end=0.5, prominence=0.1, prominent=False), dict(word='"fie"', start=0.75, end=1.2, prominence=0.9, prominent=True),
    dict(word="", start=1.2, end=1.3, prominence=0.5, prominent=False), dict(word="<b>&", start=1.1, end=2.0, prominence=0.501, prominent=True), dict(word="a", start=2, end=2)])
ANSWER["words"][-1] |= dict(prominence=0.2, prominent=False)
PLACED = [("ɔkɔ", 0.0, 0.5), ('"fie"', 0.75, 1.2), ("<b>&", 1.2, 2.0)]
UNPLACED = ANSWER | dict(aligned=False)


def shifted(start):
    return [(w, a + start, b + start) for w, a, b in PLACED]


@pytest.mark.parametrize("start", [0, 61.5])
def test_textgrid_is_read_by_praatio(tmp_path, start):
    textgrid = pytest.importorskip("praatio.textgrid")
    (tmp_path / "x.TextGrid").write_text(to_textgrid(ANSWER | dict(start=start)), encoding="utf-8")
    found = textgrid.openTextgrid(str(tmp_path / "x.TextGrid"), includeEmptyIntervals=False, reportingMode="error")
    assert sorted(found.tierNames) == ["emotion", "prominence", "words"] and found.maxTimestamp == 3.25 + start
    for (word, a, b), e in zip(shifted(start), found.getTier("words").entries, strict=True):
        assert (e.label, e.start, e.end) == (word, pytest.approx(a), pytest.approx(b))
    assert [e.label for e in found.getTier("prominence").entries] == ["0.10", "0.90", "0.50"]
    assert [tuple(e) for e in found.getTier("emotion").entries] == [(start, 3.25 + start, 'jo"y')]
    full = textgrid.openTextgrid(str(tmp_path / "x.TextGrid"), includeEmptyIntervals=True).getTier("words").entries
    assert full[0].start == 0 and full[-1].end == 3.25 + start and all(a.end == b.start for a, b in zip(full, full[1:], strict=False))


def test_eaf_is_read_by_pympi(tmp_path):
    elan = pytest.importorskip("pympi.Elan")
    audio = tmp_path / "ɔ 1.wav"
    (tmp_path / "x.eaf").write_text(to_eaf(ANSWER, audio), encoding="utf-8")
    found = elan.Eaf(str(tmp_path / "x.eaf"))
    assert [x[:3] for x in sorted(found.get_annotation_data_for_tier("words"))] == [(round(1000 * a), round(1000 * b), w) for w, a, b in PLACED]
    assert found.get_annotation_data_for_tier("emotion")[0][:3] == (0, 3250, 'jo"y') and len(found.get_annotation_data_for_tier("prominence")) == 3
    assert unquote(urlparse(found.get_linked_files()[0]["MEDIA_URL"]).path) == str(audio)


def read_srt(text):
    """(start, end, text) of each cue."""
    def seconds(clock):
        h, m, s = clock.replace(",", ".").split(":")
        return 3600 * int(h) + 60 * int(m) + float(s)
    blocks = [b.split("\n", 2) for b in text.strip().split("\n\n") if b]
    assert [int(b[0]) for b in blocks] == list(range(1, len(blocks) + 1))
    return [(*map(seconds, re.fullmatch(r"(\d\d:\d\d:\d\d,\d{3}) --> (\d\d:\d\d:\d\d,\d{3})", b[1]).groups()), b[2]) for b in blocks]


def test_srt():
    assert read_srt(to_srt(ANSWER)) == [(0.0, 2.0, '[jo"y] ɔkɔ <b>"fie"</b> <b><b>&</b>')]
    assert read_srt(to_srt(UNPLACED | dict(start=3600))) == [(3600, 3603.25, '[jo"y] ɔkɔ "fie" <b> a')]
    many = dict(seconds=60.0, transcript="", aligned=True, words=[dict(word=f"w{i}", start=i, end=i + 0.9) for i in range(60)])
    cues = read_srt(to_srt(many))
    assert all(b - a <= 6 and len(t) <= 42 for a, b, t in cues) and " ".join(t for *_, t in cues) == " ".join(f"w{i}" for i in range(60))


def test_audacity():
    rows = [line.split("\t") for line in to_audacity(ANSWER).splitlines()]
    assert [(float(a), float(b), t) for a, b, t in rows] == [(0, 3.25, 'jo"y'), (0, 0.5, "ɔkɔ"), (0.75, 1.2, '"fie"*'), (1.2, 2, "<b>&*")]


def test_csv_is_read_back():
    rows = list(csv.DictReader(io.StringIO(to_csv([ANSWER, UNPLACED]))))
    assert [r["transcript"] for r in rows] == ['ɔkɔ "fie" <b> a'] * 2 and [r["aligned"] for r in rows] == ["True", "False"]
    assert float(rows[0]['p_jo"y']) == 0.8 and rows[0]["prominent_words"] == '"fie" <b>&'


def test_what_is_left_out_is_said():
    assert tiers_of(ANSWER).left_out.endswith(": a") and "1 of 4 words" in tiers_of(ANSWER).left_out
    assert list(tiers_of(UNPLACED)) == ["emotion", "transcript"] and "could not be placed" in tiers_of(UNPLACED).left_out
    assert tiers_of(ANSWER | dict(words=ANSWER["words"][:2])).left_out == ""
    for _, write_ in FORMATS.values():
        assert "fie" in write_(UNPLACED, None)
        assert write_(dict(seconds=1.0), None) is not None
        control = write_(ANSWER | dict(words=[dict(word="a\x00\x1f\nb", start=0.0, end=9.0)]), None)
        assert "\0" not in control
    ET.fromstring(to_eaf(ANSWER | dict(words=[dict(word="a\x00\ud800b", start=0.0, end=9.0)])).encode())


# ---------------------------------------------------------------------------------------------------------- a lean process

@pytest.mark.parametrize("backbone", SMALL)
def test_lean_process_answers_the_same(made, backbone, tmp_path):
    """The command's own process, which leaves out parts of its libraries, says what this one says, pictures and all."""
    ready(small_model(made, backbone)).save_pretrained(tmp_path / "m")
    files = [speech(tmp_path / f"{i}.wav", 0.5 + i / 3, i) for i in range(3)]
    done = subprocess.run([sys.executable, "-m", "prosody_ser.cli", "predict", tmp_path / "m", *files, "--plot_dir", tmp_path / "p", *GREEDY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file, line in zip(files, done.stdout.splitlines(), strict=True):
        here, there = Predictor(tmp_path / "m", "cpu", "greedy")(file), json.loads(line)
        assert (here.emotion, here.transcript) == (there["emotion"], there["transcript"])
        assert there["probabilities"] == pytest.approx(here.probabilities, abs=1e-3)


def predicts(script, model, file):
    """What a fresh process prints that predicts and then runs a script."""
    argv = [sys.executable, "-c", f"import sys\nfrom prosody_ser.cli import main\n{script}", "predict", model, file, *GREEDY]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()


def test_what_is_not_needed_is_not_imported(saved, talks):
    heavy = "sklearn", "accelerate", "matplotlib", "pandas", "scipy", "torch._dynamo.trace_rules", "torch.distributed.tensor"
    assert predicts(f"main()\nprint([m for m in {heavy} if sys.modules.get(m)])", saved, talks / "a/1.wav")[-1] == "[]"


def test_libraries_that_do_not_bear_it(saved, talks):
    """A process whose imports fail begins anew with all of them."""
    broken = "import prosody_ser.predict as p\np._leave_out = lambda: sys.modules.update({'transformers.modeling_utils': None})\nmain()"
    wanted = predicts("main()", saved, talks / "a/1.wav")
    assert predicts(broken + "\nimport os\nprint(os.environ.get('PROSODY_SER_IMPORT_ALL'))", saved, talks / "a/1.wav") == [*wanted, "1"]


def test_one_answer_for_a_long_recording_is_told(saved, tmp_path, capsys, monkeypatch):
    """The hint comes before the work; and none comes for a minute or less."""
    speech(tmp_path / "long.wav", 61.0, 0)
    speech(tmp_path / "short.wav", 60.0, 0)
    answers, before = Predictor._answers, []

    def watched(self, samples, given):
        before.append(capsys.readouterr().err)
        return answers(self, samples, given)

    monkeypatch.setattr(Predictor, "_answers", watched)
    main(["predict", str(saved), str(tmp_path / "long.wav"), str(tmp_path / "short.wav"), *GREEDY])
    said = capsys.readouterr()
    assert before[0].count("--timeline") == 1 and "long.wav: one answer for 61 s; --timeline" in before[0]
    assert "--timeline" not in said.err + before[1] and len(said.out.splitlines()) == 1


def test_progress_of_a_long_recording(saved, tmp_path, capsys, monkeypatch):
    """The bar says what is done now and how far it is, and later goes back to its own name; what is printed beside it stays whole."""
    import tqdm.auto
    told, described = [], tqdm.auto.tqdm.set_description
    monkeypatch.setattr(tqdm.auto.tqdm, "set_description", lambda self, desc=None, refresh=True: (told.append(desc), described(self, desc, refresh)))
    for name, seconds in (("a", 100.0), ("b", 2.0)):
        speech(tmp_path / f"{name}.wav", seconds, 0)
    main(["predict", str(saved), str(tmp_path / "a.wav"), str(tmp_path / "b.wav"), *GREEDY])
    assert told[0] == "reading 100 s" and "encoding 100 s" in told and told[-1] == "predicting"
    parts = [float(t.split()[1]) for t in told if t.startswith("encoding, ")]
    assert len(parts) >= 3 and parts == sorted(parts) and parts[-1] == 100
    assert [t for t in told if t.startswith(("decoding", "aligning"))] == ["decoding 100 s", "aligning words of 100 s"]
    assert [json.loads(line)["seconds"] for line in capsys.readouterr().out.splitlines()] == [100.0, 2.0]


def test_a_format_without_a_place_is_refused(saved, talks, tmp_path, command):
    """A table and a format cannot both be standard output: neither is left out in silence."""
    for form in ("csv", "textgrid"):
        code, text = command("predict", saved, talks / "a/1.wav", *GREEDY, "--table", "--format", form)
        assert code == 1 and f"--table and --format {form} would both go to standard output" in text
    code, text = command("predict", saved, talks / "a/1.wav", *GREEDY, "--table", "--format", "csv", "--out", tmp_path / "out")
    assert code == 0 and "transcript, *prominent*" in text and (tmp_path / "out/predictions.csv").is_file()


@pytest.mark.parametrize("more, told", [([], "Of the answers only what was printed is kept. With --out FOLDER"), (["--out", "answers"], "the same command with --resume goes on"), (["--out", "answers", "--resume"], "the same command goes on")])
def test_interrupted(saved, talks, tmp_path, command, monkeypatch, more, told):
    """Ctrl-C is answered by what is true of predictions, and the cure works; no word of a training."""
    monkeypatch.chdir(tmp_path)
    answers = Predictor._answers
    calls = []

    def interrupted(self, samples, given):
        if calls: raise KeyboardInterrupt
        calls.append(1)
        return answers(self, samples, given)

    monkeypatch.setattr(Predictor, "_answers", interrupted)
    code, text = command("predict", saved, talks, *GREEDY, "--batch_size", 1, *more)
    assert code == 130 and f"stopped. {told}" in " ".join(text.split()).replace("Answers that were finished are in answers; ", "") and "training" not in text
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    if more:
        code, text = command("predict", saved, talks, *GREEDY, "--batch_size", 1, "--out", "answers", "--resume")
        assert code == 0 and "1 of them from before" in text


def test_an_onnx_folder_is_named(tmp_path, command):
    """A folder of an export is no model for PyTorch: the sentence names what reads it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/onnx.json").write_text("{}")
    for name in ("predict", "serve"):
        code, text = command(name, tmp_path / "out", *["x.wav"] * (name == "predict"))
        assert code == 1 and "an ONNX export, which prosody_ser.onnx.OnnxPredictor(" in text and "Traceback" not in text
    with pytest.raises(ValueError, match="OnnxPredictor"):
        Predictor(tmp_path / "out")


def test_a_timeline_without_speech_has_its_row():
    silent = dict(audio_filepath="b.wav", seconds=9.0, summary=dict(utterances=0), utterances=[])
    spoken = dict(audio_filepath="a.wav", utterances=[dict(start=0.5, end=2.0, emotion="joy")])
    assert to_csv([spoken, silent]).splitlines() == ["audio_filepath,start,end,emotion", "a.wav,0.5,2.0,joy", "b.wav,,,"]
