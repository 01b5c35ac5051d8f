"""Long recordings: cut at pauses and nowhere else, in memory that does not grow, each utterance answered as if it were alone, in formats that other programs read."""
import csv
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import read
from forge import python
from test_predict import ANSWER, read_srt, run, same, shifted

from prosody_ser.audio import AudioStream, load_audio
from prosody_ser.config import ConfigError
from prosody_ser.data import Utterance
from prosody_ser.formats import tiers_of, to_eaf, to_srt, to_textgrid
from prosody_ser.inference import Predictor
from prosody_ser.model import create_model
from prosody_ser.text import ManifestError
from prosody_ser.timeline import Timeline, cut_at_pauses
from prosody_ser.tokenizer import SentencePieceTokenizer

torch.set_num_threads(1)
RATE = 16000
GREEDY = ["--decode_method", "greedy", "--device", "cpu"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny model that places words."""
    folder = tmp_path_factory.mktemp("timeline")
    tokenizer = SentencePieceTokenizer(40, folder / "tok", model_type="char").train_tokenizer(["me kɔ fie", "bra ha"] * 9)
    torch.manual_seed(0)
    model = create_model(["anger", "joy"], tokenizer)
    model.asr_nats.fill_(0.0)
    model.save_pretrained(folder / "model")
    return folder / "model"


def word(seconds, rng, rate=RATE):
    """A voiced sound that begins and ends softly. Float (S,)."""
    t = np.arange(round(seconds * rate)) / rate
    pitch = rng.uniform(120, 260)
    return 0.2 * sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 12)) * np.hanning(len(t)) ** .5


def talk(pauses, words=3, noise=.002, rate=RATE, seed=0):
    """Utterances of some words with pauses before them: samples (S,), and the times of the words of each (N, words, 2)."""
    rng, parts, times, at = np.random.default_rng(seed), [], [], 0.0
    for pause in pauses:
        parts.append(np.zeros(round(pause * rate)))
        at += len(parts[-1]) / rate
        times.append([])
        for _ in range(words):
            sound = word(rng.uniform(.25, .6), rng, rate)
            parts += [sound, np.zeros(round(.08 * rate))]
            times[-1].append((at, at + len(sound) / rate))
            at += (len(sound) + len(parts[-1])) / rate
    x = np.concatenate([*parts, np.zeros(rate)])
    return (x + noise * rng.normal(size=len(x))).astype("float32"), times


def ends(parts):
    return [(start, start + len(x) / RATE) for start, x in parts]


# -------------------------------------------------------------------------------------------------------------- the cuts

@pytest.mark.parametrize("noise", [0, .0005, .005, .02])
@pytest.mark.parametrize("seed", range(3))
def test_cuts_lie_in_the_pauses(noise, seed):
    """Every pause is found, no word is cut, all speech is covered, and no pause of more than its edges is."""
    pauses = np.random.default_rng(seed).choice([.6, .9, 1.5, 4], 25)
    x, times = talk(pauses, noise=noise, seed=seed)
    found = ends(cut_at_pauses([x]))
    assert len(found) == len(times)
    for (a, b), words in zip(found, times, strict=True):
        assert words[0][0] - .35 <= a <= words[0][0] + .06 and words[-1][1] - .06 <= b <= words[-1][1] + .35


def test_blocks_and_loudness_change_nothing():
    x, _ = talk([.7] * 12, noise=.003)
    whole = list(cut_at_pauses([x]))
    for blocks in (np.array_split(x, 400), [x[:7], x[7:]], np.split(x, [160000, 160001])):
        for (a, s), (b, r) in zip(whole, cut_at_pauses(blocks), strict=True):
            assert a == b
            np.testing.assert_array_equal(s, r)
    for gain in (.1, 3):
        assert ends(cut_at_pauses([gain * x])) == ends(whole)


def test_a_noise_that_grows():
    """The threshold follows the room: a quiet one, then an air conditioner."""
    quiet, first = talk([1.0] * 20, noise=.0005)
    loud, then = talk([1.0] * 20, noise=.02, seed=1)
    found = ends(cut_at_pauses([np.concatenate([quiet, loud])]))
    middles = [(w[0][0] + w[-1][1]) / 2 for w in first] + [(w[0][0] + w[-1][1]) / 2 + len(quiet) / RATE for w in then]
    apart = sum(sum(a <= m <= b for m in middles) == 1 for a, b in found)
    assert apart >= 37 and all(any(a <= m <= b for a, b in found) for m in middles)


@pytest.mark.parametrize("most", [4, 5.5, 12])
def test_speech_without_a_pause(most):
    """It is cut where it is quietest, here between words, into parts that leave nothing out."""
    x, times = talk([.15] * 60, words=2)
    parts = list(cut_at_pauses([x], most))
    found = ends(parts)
    assert max(b - a for a, b in found) <= most + 1e-6
    assert all(round(a[1], 3) == round(b[0], 3) for a, b in zip(found, found[1:], strict=False)) and found[0][0] <= .2 and found[-1][1] >= times[-1][-1][1]
    words = [w for u in times for w in u]
    assert not [c for c, _ in found[1:] for a, b in words if a + .04 < c < b - .04]


def test_no_speech():
    rng = np.random.default_rng(0)
    tone = .1 * np.sin(np.arange(30 * RATE) / 5)
    for x in ([], np.zeros(0), np.zeros(50 * RATE), .01 * rng.normal(size=50 * RATE), np.full(RATE, .5), tone):
        assert list(cut_at_pauses([np.asarray(x, np.float32)])) == []
    with pytest.raises(ConfigError, match="max_seconds 1 is too little"):
        cut_at_pauses([], 1)


# ------------------------------------------------------------------------------------------------------ files in blocks

def test_stereo_at_48_kHz(tmp_path, saved):
    """Times are those of the file, channels that cancel out are told, and blocks give the samples that a file gives as a whole."""
    x, times = talk([.8] * 12, rate=48000)
    file = tmp_path / "film.flac"
    sf.write(file, np.stack([x, -x], 1) + .05, 48000)
    predict = Predictor(saved, "cpu", "greedy")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = predict.timeline(file)
    assert sorted(str(w.message).split(": ")[1][:9] for w in told) == ["an offset", "its chann"] and all("film.flac" in str(w.message) for w in told)
    assert len(found) == 12 and all(abs(u.start - w[0][0]) < .35 and abs(u.end - w[-1][1]) < .35 for u, w in zip(found, times, strict=True))
    with warnings.catch_warnings(action="ignore"):
        np.testing.assert_allclose(np.concatenate(list(AudioStream(file))), load_audio(file), atol=1e-6)
        part = Predictor(saved, "cpu", "greedy").timeline(Utterance("film.flac", audio_base_path=tmp_path, start=times[3][0][0] - .4, end=times[7][-1][1] + .4))
    assert [round(u.start, 1) for u in part] == [round(u.start, 1) for u in found[3:8]] and part.start == pytest.approx(times[3][0][0] - .4, abs=1e-3)


@pytest.mark.parametrize("kind, why", [("empty", "empty"), ("cut", "cut off"), ("nan", "NaN"), ("gone", "no such"), ("short", "the least")])
def test_bad_files(tmp_path, saved, capsys, kind, why):
    x, _ = talk([.8] * 4)
    file = tmp_path / "a.wav"
    if kind == "nan":
        x[-9] = np.nan
    if kind != "gone":
        sf.write(file, x[:300] if kind == "short" else x, RATE, subtype="FLOAT")
        file.write_bytes(file.read_bytes()[:{"empty": 0, "cut": 90000}.get(kind)])
    with pytest.raises(ManifestError, match=why):
        Timeline.of(Predictor(saved, "cpu", "greedy"), file)
    sf.write(tmp_path / "b.wav", talk([.8] * 2)[0], RATE)
    code, out, err = run(capsys, "predict", saved, file, tmp_path / "b.wav", "--timeline", *GREEDY)
    assert code == 1 and why in err and "1 of 2" in err and len(json.loads(out)["utterances"]) == 2


# --------------------------------------------------------------------------------------------------------- the answers

@pytest.mark.parametrize("decode", ["greedy", "beam"])
def test_each_as_if_alone(saved, decode):
    x, _ = talk([.6, .9, .6, 2, .7, .8], words=4)
    predictor = Predictor(saved, "cpu", decode)
    parts = list(cut_at_pauses([x]))
    for size in (1, 4, 16):
        found = predictor.timeline(x, batch_size=size)
        for u, (start, samples) in zip(found, parts, strict=True):
            assert (u.start, u.end) == (pytest.approx(start), pytest.approx(start + len(samples) / RATE))
            np.testing.assert_array_equal(u.samples, samples)
            same(predictor(samples), type(predictor(samples))({k: v for k, v in u.items() if k not in ("start", "end")}, samples))


def test_summary_and_views(saved):
    x, _ = talk([.8] * 6)
    found = Predictor(saved, "cpu", "greedy").timeline(x)
    about, spoken = found.summary, sum(u.seconds for u in found)
    assert about["utterances"] == 6 and about["speech"] == pytest.approx(spoken / (len(x) / RATE), abs=1e-3)
    for name in ("anger", "joy"):
        assert about["emotions"][name] == pytest.approx(sum(u.seconds for u in found if u.emotion == name) / spoken, abs=1e-3)
    assert about["words"] == sum(len(u.words) for u in found) and sum(about["emotions"].values()) == pytest.approx(1, abs=1e-3)
    assert json.loads(json.dumps(found.to_dict()))["utterances"][2]["start"] == found[2].start
    html = found._repr_html_()
    assert "<audio" in html and "data:image/png" in html and html.count("<tr>") == 2 + 7
    assert len(found.plot().axes) == 2 * -(-len(x) // (15 * RATE)) and len(found.plot(3, 9).axes) == 2
    low, high = found.envelope.low, found.envelope.high
    assert low.min() == x.min() and high.max() == x.max()
    with pytest.warns(UserWarning, match="no speech is found"):
        nothing = Predictor(saved, "cpu", "greedy").timeline(np.zeros(70 * RATE, np.float32))
    assert nothing == [] and nothing.summary["speech"] == 0 and nothing.plot() and "<audio" not in nothing._repr_html_() and 'size = ' not in nothing.to_textgrid()


# --------------------------------------------------------------------------------------------------- command and formats

@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two recordings of five and three utterances of some 5 s, and one of nothing."""
    folder = tmp_path_factory.mktemp("films")
    for name, n in (("a", 5), ("b", 3)):
        sf.write(folder / f"{name}.wav", talk([1.0] * n, words=9, seed=n)[0], RATE)
    sf.write(folder / "silence.wav", np.zeros(5 * RATE), RATE)
    return folder


def drawn(minutes, unsure=False):
    """The timeline of so many minutes, an utterance of 4 s every 5 s with words of a letter to twelve, and its picture."""
    from prosody_ser.timeline import Timeline, _Envelope, _Part
    parts = []
    for k in range(12 * minutes):
        words = [dict(word="abcdefghijkl"[:1 + (k + i) % 12], start=i * 0.4, end=i * 0.4 + 0.4, prominent=not i % 3) for i in range(10)]
        chances = dict(anger=0.7, joy=0.3) if k % 2 else dict(anger=0.2, joy=0.8)
        answer = dict(seconds=4.0, emotion="unsure" if unsure else max(chances, key=chances.get), probabilities=chances, aligned=True, words=words)
        parts.append(_Part(5.0 * k, answer, None))
    sound = np.random.default_rng(0).normal(size=60 * RATE).astype("float32") * 0.1
    envelope = _Envelope(60.0 * minutes)
    for _ in envelope.watch([sound] * minutes):
        pass
    timeline = Timeline(parts, 0.0, 60.0 * minutes, envelope, lambda a, b: np.zeros(round((b - a) * RATE), "float32"))
    return timeline, timeline.plot()


@pytest.mark.parametrize("minutes, line", [(1, 15), (3, 30), (10, 60), (60, 300), (120, 600)])
def test_a_picture_is_a_page(minutes, line):
    """Lines of some minutes, at most twelve; all utterances are in it; times as m:ss; words only where they can be read."""
    timeline, figure = drawn(minutes)
    waves, strips = figure.axes[::2], figure.axes[1::2]
    assert len(strips) == 60 * minutes / line <= 12 and figure.get_figheight() < 26
    assert [ax.get_xlim() for ax in strips] == [(k * line, (k + 1) * line) for k in range(len(strips))]
    bars = {round(bar.get_x(), 3) for ax in strips for bar in ax.patches if bar.get_width() == 4}
    assert bars == {u.start for u in timeline}
    labels = [t.get_text() for ax in strips for t in ax.get_xticklabels()]
    assert labels[0] == "0:00" and labels[-1] == f"{minutes}:00" and max(len(ax.get_xticks()) for ax in strips) <= 16
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["anger", "joy"] and strips[-1].get_xlabel() == "minutes:seconds"
    for ax in waves:                                        # what is heard is seen, at the right time
        x = ax.collections[0].get_paths()[0].vertices[:, 0]
        assert x.min() >= ax.get_xlim()[0] - 1 and x.max() <= ax.get_xlim()[1] + 1
    words = [t for ax in waves for t in ax.texts]
    assert bool(words) == (line <= 30)
    figure.canvas.draw()
    for ax in waves if line <= 30 else ():
        boxes = [(t.get_position()[1], t.get_window_extent().x0, t.get_window_extent().x1) for t in ax.texts]
        assert not [(a, b) for a in boxes for b in boxes if a[0] == b[0] and a[1] < b[1] < a[2]]


def test_a_picture_where_the_model_is_unsure():
    """The likeliest has its number beside the word unsure."""
    _, figure = drawn(1, unsure=True)
    assert "unsure 0.80" in [t.get_text() for ax in figure.axes[1::2] for t in ax.texts]


def test_command(saved, films, capsys):
    code, out, err = run(capsys, "predict", saved, films, "--timeline", *GREEDY)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [len(r["utterances"]) for r in records] == [5, 3, 0]
    predictor = Predictor(saved, "cpu", "greedy")
    assert records[0] | dict(audio_filepath=0) == json.loads(json.dumps(dict(audio_filepath=0) | predictor.timeline(films / "a.wav").to_dict()))
    rows = list(csv.DictReader(io.StringIO(run(capsys, "predict", saved, films / "silence.wav", films, "--timeline", "--format", "csv", *GREEDY)[1])))
    assert [Path(r["audio_filepath"]).name for r in rows] == ["silence.wav"] + ["a.wav"] * 5 + ["b.wav"] * 3 + ["silence.wav"]
    assert rows[0]["start"] == rows[-1]["start"] == "" and [float(r["start"]) for r in rows[1:-1]] == [u["start"] for r in records for u in r["utterances"]] and {"end", "emotion", "p_anger", "transcript"} <= rows[0].keys()
    alone = run(capsys, "predict", saved, films / "silence.wav", "--timeline", "--format", "csv", *GREEDY)[1].splitlines()
    assert alone == ["audio_filepath", str(films / "silence.wav")]                       # nothing shows the other columns
    lines = run(capsys, "predict", saved, films / "silence.wav", films, "--timeline", "--table", *GREEDY)[1].splitlines()
    assert [line.startswith("recording ") for line in lines].count(True) == 1 and lines[0].startswith("recording ")
    lines = run(capsys, "predict", saved, films, "--timeline", "--table", *GREEDY)[1].splitlines()
    assert len(lines) == 1 + 6 + 4 + 1 and "5 utterances" in lines[6] and "0 utterances, 0 % speech" in lines[-1]
    shorter = json.loads(run(capsys, "predict", saved, films / "a.wav", "--timeline", "--max_seconds", "4", *GREEDY)[1])
    assert len(shorter["utterances"]) > 5 and all(u["seconds"] <= 4 for u in shorter["utterances"])
    code, _, err = run(capsys, "predict", saved, films, "--timeline", "--max_seconds", "1")
    assert code != 0 and "max_seconds 1.0 is out of range" in err


def test_resume(saved, films, tmp_path, capsys):
    """What an interrupted call has written is kept; a timeline and plain answers are not taken for each other."""
    out = tmp_path / "out"
    command = ["predict", saved, films, "--timeline", "--out", out, "--format", "textgrid", "--plot", *GREEDY]
    assert run(capsys, *command)[0] == 0
    whole = (out / "predictions.jsonl").read_bytes()
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == ["a.TextGrid", "a.png", "b.TextGrid", "b.png", "predictions.jsonl", "silence.TextGrid", "silence.png"]
    first = whole.splitlines(keepends=True)[0]
    (out / "predictions.jsonl").write_bytes(whole[:len(first) + 300])           # killed within the second line
    for name in ("b.TextGrid", "b.png", "silence.TextGrid", "silence.png"):
        (out / name).unlink()
    stamp = (out / "a.TextGrid").stat().st_mtime_ns
    assert run(capsys, *command, "--resume")[0] == 0
    assert (out / "predictions.jsonl").read_bytes() == whole and (out / "a.TextGrid").stat().st_mtime_ns == stamp
    assert run(capsys, *command[:3], "--out", out, "--resume", *GREEDY)[0] == 0                      # without --timeline
    assert all("utterances" not in r for r in read(out / "predictions.jsonl"))
    assert run(capsys, *command, "--resume", "--max_seconds", "4")[0] == 0
    assert all(u["seconds"] <= 4 for r in read(out / "predictions.jsonl") for u in r["utterances"])


def test_formats_are_read_back(saved, films, tmp_path):
    textgrid, elan = pytest.importorskip("praatio.textgrid"), pytest.importorskip("pympi.Elan")
    found = Predictor(saved, "cpu", "greedy").timeline(films / "a.wav")
    times = [(u.start, u.end, u.emotion) for u in found]
    (tmp_path / "a.TextGrid").write_text(found.to_textgrid(), encoding="utf-8")
    grid = textgrid.openTextgrid(str(tmp_path / "a.TextGrid"), includeEmptyIntervals=False, reportingMode="error")
    assert [tuple(e) for e in grid.getTier("emotion").entries] == [(pytest.approx(a), pytest.approx(b), e) for a, b, e in times]
    assert grid.maxTimestamp == pytest.approx(found.seconds, abs=1e-3)
    long = dict(seconds=20.0, utterances=[dict(start=t) | ANSWER for t in (1.0, 9.5)])
    (tmp_path / "b.TextGrid").write_text(to_textgrid(long), encoding="utf-8")
    grid = textgrid.openTextgrid(str(tmp_path / "b.TextGrid"), includeEmptyIntervals=False, reportingMode="error")
    assert [tuple(e) for e in grid.getTier("words").entries] == [(pytest.approx(a), pytest.approx(b), w) for w, a, b in shifted(1.0) + shifted(9.5)]
    assert grid.maxTimestamp == 20 and "in 2 of 2 utterances, such as: 1 of 4 words" in tiers_of(long).left_out
    (tmp_path / "a.eaf").write_text(to_eaf(found.to_dict(), films / "a.wav"), encoding="utf-8")
    read_back = elan.Eaf(str(tmp_path / "a.eaf")).get_annotation_data_for_tier("emotion")
    assert sorted(x[:3] for x in read_back) == [(round(1000 * a), round(1000 * b), e) for a, b, e in times]
    cues = read_srt(to_srt(found.to_dict()))
    assert sum(t.startswith("[") for *_, t in cues) == 5 and all(a < b for a, b, _ in cues) and all(x[1] <= y[0] for x, y in zip(cues, cues[1:], strict=False))


# --------------------------------------------------------------------------------------------------------------- memory

SCRIPT = """import resource, sys
import prosody_ser.timeline as t
from prosody_ser.inference import Predictor
predictor = Predictor(sys.argv[1], "cpu", "greedy")
predictor.timeline(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = predictor.timeline(sys.argv[3])
print(len(found), before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""


def test_memory_does_not_grow(saved, tmp_path):
    """Ten minutes of stereo at 44.1 kHz, which are 210 MB as samples and 38 MB at 16 kHz, take hardly more than one."""
    for minutes in (2, 12):
        with sf.SoundFile(tmp_path / f"{minutes}.wav", "w", 44100, 2) as file:
            for i in range(minutes):
                x = talk([1.0] * 24, rate=44100, seed=i)[0]
                file.write(np.stack([x, x], 1))
    done = subprocess.run([sys.executable, "-c", SCRIPT, saved, tmp_path / "2.wav", tmp_path / "12.wav"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n, before, after = map(int, done.stdout.split())
    assert n == 12 * 24 and (after - before) / 1024 < 40


def test_benchmark_runs(tmp_path):
    """Each part of benchmarks/predict.py, on a small scale: two in processes of their own, one alone."""
    script, rows = Path(__file__).parents[2] / "benchmarks/predict.py", {}
    for parts in (["start", "long"], ["throughput"]):
        done = python(script, *parts, "--quick", "--json", tmp_path / "rows.json")
        assert done.returncode == 0, done.stderr
        rows |= json.loads((tmp_path / "rows.json").read_text())
    assert {part: len(found) for part, found in rows.items()} == dict(start=2, throughput=10, long=2)
    assert all(r["times_the_pipeline"] > 0 for r in rows["throughput"]) and all(r["peak_mb"] > 0 for r in rows["long"])
