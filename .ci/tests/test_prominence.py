"""Marks from acoustics: known signals, what cannot be marked, and that nothing of the user's changes."""
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile as sf
from conftest import SHARED, needs, read, write

from prosody_ser.convert import convert
from prosody_ser.data import describe, read_manifest, row_utterance
from prosody_ser.evaluate import _notes
from prosody_ser.evaluation import score
from prosody_ser.prominence import (
    CUES,
    even_times,
    hear_words,
    mark_words,
    maxima_lines,
    p_scores,
    prominence_scores,
    wavelet_transform,
)
from prosody_ser.text import ManifestError

WORDS = ["me", "rekɔ", "fie", "seesei", "ara"]
DEFAULT = ("duration", "energy")
parselmouth = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('parselmouth')", reason="Praat is not installed")


def voice(loud=(), long=(), high=(), seed=0, level=1.0, base=120):
    """Five words with pauses between them, some of them louder, longer, higher; and where they are, (5, 2)."""
    rng, parts, spans, at = np.random.default_rng(seed), [], [], 0.1
    for i in range(5):
        seconds = 0.45 if i in long else 0.25
        t = np.arange(round(seconds * 16000)) / 16000
        phase = 2 * np.pi * base * (1.5 if i in high else 1) * t + 0.3 * np.sin(2 * np.pi * 3 * t)
        wave = sum(np.sin(k * phase) / k for k in range(1, 12)) * np.hanning(len(t)) ** 0.5
        parts += [wave * (0.2 if i in loud else 0.06) * level, np.zeros(800)]
        spans.append([round(at, 3), round(at + seconds, 3)])
        at += seconds + 0.05
    sound = np.concatenate([np.zeros(1600), *parts])
    return (sound + rng.normal(size=len(sound)) * 1e-4).astype(np.float32), spans


def scores_of(cues, method, **how):
    """The scores of an utterance among three plain ones of its speaker."""
    every = [hear_words(*voice(**how), cues)] + [hear_words(*voice(seed=s), cues) for s in (1, 2, 3)]
    return prominence_scores(every, ["ama"] * 4, method)[0]


@pytest.fixture
def corpus(tmp_path):
    """Four utterances of two speakers with word times; in the third nothing stands out."""
    rows = []
    for i, k in enumerate(([1], [3], [], [2])):
        samples, spans = voice(loud=k, long=k, seed=i, level=(1, 1, 0.2, 0.2)[i])
        sf.write(tmp_path / f"{i}.wav", samples, 16000)
        rows.append(dict(audio_filepath=f"{i}.wav", words=WORDS, speaker=["ama", "ama", "kofi", "kofi"][i], word_times=spans, film="x", id=i))
    write(tmp_path / "all.jsonl", rows)
    return tmp_path


def rows_of(folder, **more):
    """The corpus, with other fields."""
    return [row_utterance({k: v for k, v in (r | more).items() if v is not None}, f"all.jsonl:{i}", folder)
            for i, r in enumerate(read(folder / "all.jsonl"), 1)]


@pytest.mark.parametrize("method", ["linear", "wavelet"])
@pytest.mark.parametrize(("how", "cue"), [("loud", "energy"), ("long", "duration"), pytest.param("high", "f0", marks=parselmouth)])
@pytest.mark.parametrize("word", [0, 2, 4])
def test_a_word_that_stands_out_is_found(method, how, cue, word):
    scores = scores_of([cue], method, **{how: [word]})
    assert scores.argmax() == word and p_scores(scores, [cue], method)[word] > 0.5
    if method == "linear":                                    # for wavelets each of these words, which pauses part, is a bump
        assert sum(p_scores(scores, [cue], method) > 0.5) == 1


@pytest.mark.parametrize("method", ["linear", "wavelet"])
@parselmouth
def test_f0_counts_only_where_it_is_asked_for(method):
    plain, high = (scores_of(DEFAULT, method, high=h) for h in ([], [2]))
    assert np.abs(plain - high).max() < 0.1
    assert scores_of(CUES, method, high=[2]).argmax() == 2 and scores_of(CUES, method, high=[2])[2] - scores_of(CUES, method)[2] > 0.5


@pytest.mark.parametrize("method", ["linear", "wavelet"])
def test_level_and_liveliness_of_a_speaker_do_not_count(method):
    parts, names = [], []
    for who, level in (("ama", 1), ("kofi", 0.05)):
        parts += [hear_words(*voice(loud=[s % 5], seed=s, level=level), ["energy"]) for s in range(8)]
        names += [who] * 8
    found = prominence_scores(parts, names, method)
    for a, b in zip(found[:8], found[8:], strict=True):
        np.testing.assert_allclose(a, b, atol=0.15)
    shouted = [h._replace(values=dict(energy=h.values["energy"] * 3), tracks=dict(energy=h.tracks["energy"] * 3)) for h in parts[8:]]
    flat, lively = (prominence_scores([*parts[:8], *shouted], n, method) for n in ([""] * 16, names))
    def ratio(found):
        return max(found[8]) / max(found[0])
    assert ratio(lively) < 0.75 * ratio(flat)                 # three times as lively counts less where it is the speaker's habit


def test_wavelet_finds_a_bump_at_its_place_and_scale():
    scales = 4 * 2 ** np.arange(0, 4, 0.5)
    for width in (8, 16, 32):
        bump = np.exp(-0.5 * ((np.arange(600) - 250) / width) ** 2)
        transform = wavelet_transform(bump, scales)
        assert transform.max(0).argmax() == 250
        assert transform[list(scales).index(width), 250] == pytest.approx(np.pi ** 0.5 / 2, abs=0.01)
        assert max(maxima_lines(transform, scales), key=lambda line: line[1])[0] == 250
    assert wavelet_transform(np.ones(3), scales).shape == (8, 3)
    assert maxima_lines(np.zeros((4, 0)), [1, 2, 3, 4]) == []


def test_numbers_are_finite(corpus):
    rng = np.random.default_rng(0)
    for samples in (np.zeros(1600), np.ones(1600), rng.normal(size=170), rng.normal(size=16000), np.full(16000, 1e-30)):
        for n in (1, 2, 40):
            heard = [hear_words(samples, even_times(["a"] * n, len(samples) / 16000), DEFAULT)] * 2
            for method in ("linear", "wavelet"):
                assert all(np.isfinite(s).all() and len(s) == n for s in prominence_scores(heard, [None, "a"], method))
    assert prominence_scores([], [], "linear") == prominence_scores([], [], "wavelet") == []
    assert ((p := p_scores([-1e9, 0, 1e9])) >= 0).all() and (p <= 1).all()


@pytest.mark.parametrize("method", ["linear", "wavelet"])
def test_the_command(corpus, command, method):
    code, out = command("prominence", corpus / "all.jsonl", "--audio_base_path", corpus, "--out", corpus / "new" / "m.jsonl", "--method", method)
    rows = read(corpus / "new" / "m.jsonl")
    assert code == 0 and "4 of 4 utterances marked" in out and "4 by given times" in out and "EmoDB" in out
    assert [r["prosody_annotations"] for r in rows] == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0] * 5, [0, 0, 1, 0, 0]]
    assert {r["prosody_source"] for r in rows} == {"acoustic"} and [r["film"] for r in rows] == ["x"] * 4
    assert [{k: v for k, v in r.items() if k[:8] != "prosody_"} for r in rows] == read(corpus / "all.jsonl")
    before = (corpus / "new" / "m.jsonl").read_bytes()
    code, out = command("prominence", corpus / "all.jsonl", "--audio_base_path", corpus, "--out", corpus / "new" / "m.jsonl")
    assert code == 1 and "nothing is written over" in out and before == (corpus / "new" / "m.jsonl").read_bytes()
    code, out = command("prominence", corpus / "all.jsonl", "--audio_base_path", corpus, "--out", corpus / "all.jsonl")
    assert code == 1 and "prosody_source" not in (corpus / "all.jsonl").read_text()


@pytest.mark.parametrize("method", ["linear", "wavelet"])
def test_a_dash_is_never_prominent(corpus, method):
    """A word without a letter or a digit has no mark above 0, however loud and long its stretch is; 3 and ɛ are words."""
    for words in (["me", "—", "fie", "«?»", "ara"], ["me", "3", "fie", "'ɛ", "ara"]):
        marks, _ = mark_words(rows_of(corpus, words=words), method=method)
        assert [m[1] > .5 for m in marks][0] == (words[1] == "3") and [m[3] > .5 for m in marks][1] == (words[3] == "'ɛ")
        assert all((m[[1, 3]] == 0).all() == (words[1] == "—") for m in marks) and all((m[[0, 2, 4]] > 0).all() for m in marks)


def test_scores_threshold_and_cues_change_what_is_written(corpus, command):
    def marks(*flags):
        out = corpus / f"{len(list(corpus.glob('*.jsonl')))}.jsonl"
        code, told = command("prominence", corpus / "all.jsonl", "--audio_base_path", corpus, "--out", out, *flags)
        assert code == 0, told
        return [r["prosody_annotations"] for r in read(out)]
    hard, soft = marks(), marks("--scores")
    assert all(0 < p < 1 for row in soft for p in row) and [[int(p > 0.5) for p in row] for row in soft] == hard
    assert marks("--threshold", "99") == [[0] * 5] * 4 and marks("--threshold", "-99") == [[1] * 5] * 4
    for _ in range(2):
        assert marks("--cues", "duration", "--scores") != marks("--cues", "energy", "--scores") != soft
    assert marks("--cues", "energy", "duration", "duration") == hard


def test_marks_that_are_there_stay(corpus, command):
    rows = read(corpus / "all.jsonl")
    rows[0] |= dict(prosody_annotations=[0, 0, 0, 0.5, 1])
    rows[1] |= dict(prosody_annotations=[1, 0, 0, 0, 0], prosody_source="listeners")
    write(corpus / "some.jsonl", rows)
    code, out = command("prominence", corpus / "some.jsonl", "--audio_base_path", corpus, "--out", corpus / "m.jsonl")
    made = read(corpus / "m.jsonl")
    assert code == 0 and made[:2] == rows[:2] and made[2]["prosody_source"] == "acoustic" and "2 utterances have marks already" in out
    assert "prominence of 2 utterances is acoustic, of 2 by ear" in describe({"all": read_manifest(corpus / "m.jsonl")}, None)
    code, out = command("audit", corpus / "m.jsonl")
    assert "marks of 2 utterances are acoustic, not by ear" in out
    code, out = command("prominence", corpus / "some.jsonl", "--audio_base_path", corpus, "--out", corpus / "r.jsonl", "--replace")
    assert [r["prosody_annotations"] for r in read(corpus / "r.jsonl")[:2]] == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert {r["prosody_source"] for r in read(corpus / "r.jsonl")} == {"acoustic"} and "have marks already" not in out


def test_what_cannot_be_marked_is_told(corpus, command):
    sf.write(corpus / "silence.wav", np.zeros(16000), 16000)
    sf.write(corpus / "hiss.wav", np.random.default_rng(0).normal(size=16000) * 0.1, 16000)
    times = [[0.1, 0.4], [0.5, 0.9]]
    rows = [dict(audio_filepath="silence.wav", words=["a", "b"], word_times=times), dict(audio_filepath="0.wav", words=["me"]),
            dict(audio_filepath="0.wav", emotion="joy"), dict(audio_filepath="hiss.wav", words=["a", "b"], word_times=[[0.1, 0.5], [0.5, 0.9]]),
            dict(audio_filepath="0.wav", text="me rekɔ fie seesei ara", word_times=read(corpus / "all.jsonl")[0]["word_times"])]
    write(corpus / "odd.jsonl", rows)
    code, out = command("prominence", corpus / "odd.jsonl", "--audio_base_path", corpus, "--out", corpus / "m.jsonl")
    made = read(corpus / "m.jsonl")
    assert code == 0 and made[:3] == rows[:3] and all(x in out for x in ("1 silent", "1 with one word", "1 without words"))
    assert made[3]["prosody_annotations"] == [0, 0]                       # hiss: no word stands out
    assert made[4]["prosody_annotations"] == [0, 1, 0, 0, 0] and made[4]["words"] == WORDS
    assert len(read_manifest(corpus / "m.jsonl")) == 5


def test_words_without_times(corpus):
    with pytest.warns(UserWarning, match="4 of 4 utterances: nobody knows where their words are.*duration counts for nothing"):
        marks, counts = mark_words(rows_of(corpus, word_times=None))
    with warnings.catch_warnings(record=True):
        same, _ = mark_words(rows_of(corpus, word_times=None), ["energy"])
    assert counts["an even split"] == 4 and all(np.allclose(a, b) for a, b in zip(marks, same, strict=True))
    marks, counts = mark_words(rows_of(corpus, word_times=None), ["duration"])
    assert marks == [None] * 4 and counts == {"without word times, which duration needs": 4}
    np.testing.assert_allclose(even_times(["a", "bbb"], 2), [[0, 0.5], [0.5, 2]])


def test_a_model_places_the_words(corpus):
    given = {tuple(u.words): np.array(u.word_times) for u in rows_of(corpus)[:1]}
    right, _ = mark_words(rows_of(corpus)[:1])
    found, counts = mark_words(rows_of(corpus, word_times=None)[:1], aligner=lambda samples, words: given[tuple(words)])
    assert counts == {"CTC": 1, "marked": 1} and np.allclose(found[0], right[0])


def test_an_alignment_that_is_not_to_be_trusted_is_not_used(corpus, command, tmp_path_factory):
    """A model whose pieces are whole words, or that has learned nothing, places no words; one without a transcript head is refused."""
    from prosody_ser.model import create_model
    from prosody_ser.tokenizer import SentencePieceTokenizer
    folder = tmp_path_factory.mktemp("model")
    tokenizer = SentencePieceTokenizer(30, str(folder / "tok"), model_type="char").train_tokenizer(text_data=[" ".join(WORDS)])
    def saved(name, *parts):
        create_model(*parts, tasks=[name]).save_pretrained(folder / name)
        return folder / name
    rows = [{k: v for k, v in r.items() if k != "word_times"} for r in read(corpus / "all.jsonl")]
    write(corpus / "bare.jsonl", rows)
    with pytest.warns(UserWarning, match="nobody knows where their words are"):
        code, out = command("prominence", corpus / "bare.jsonl", "--audio_base_path", corpus, "--out", corpus / "m.jsonl", "--model", saved("asr", None, tokenizer))
    assert code == 0 and "4 by an even split" in out and "by an even split: linear, energy; threshold 0.3 (" in out
    code, out = command("prominence", corpus / "bare.jsonl", "--audio_base_path", corpus, "--out", corpus / "n.jsonl", "--model", saved("ser", ["joy", "anger"]))
    assert code == 1 and "no transcript head" in out and not (corpus / "n.jsonl").exists()


@pytest.mark.parametrize(("times", "told"), [
    ([[0, 0.1]] * 4, "5 words"), ([[0.2, 0.1]] * 5, "start < end"), ("x", "word_times are not"), ([[0, None]] * 5, "word_times are not"),
    ([[1, 1.2], [0, 0.2], [2, 3], [3, 4], [4, 5]], "in the order"), ([[9 + i, 10 + i] for i in range(5)], "within")])
def test_wrong_times_are_one_sentence(corpus, command, times, told):
    rows = read(corpus / "all.jsonl")
    rows[2]["word_times"] = times
    write(corpus / "bad.jsonl", rows)
    code, out = command("prominence", corpus / "bad.jsonl", "--audio_base_path", corpus, "--out", corpus / "m.jsonl")
    error = [line for line in out.splitlines() if line.startswith("error")]
    assert code == 1 and len(error) == 1 and "bad.jsonl:3: word_times" in error[0] and told in error[0] and not (corpus / "m.jsonl").exists()


def test_bad_input(corpus, command, monkeypatch):
    def run(*flags, rows=None):
        write(corpus / "bad.jsonl", rows or read(corpus / "all.jsonl"))
        code, out = command("prominence", corpus / "bad.jsonl", "--audio_base_path", corpus, "--out", corpus / "m.jsonl", *flags)
        assert code and "Traceback" not in out and not (corpus / "m.jsonl").exists()
        return out
    lost = [*read(corpus / "all.jsonl"), dict(audio_filepath="gone.wav", words=WORDS)]
    assert "1 of 5 utterances have no usable audio" in (out := run(rows=lost)) and "bad.jsonl:5" in out
    assert "pitch" in run("--cues", "pitch") and "sum" in run("--method", "sum")
    assert "prosody_source must be a text" in run(rows=[dict(audio_filepath="0.wav", prosody_source=1)])
    monkeypatch.setitem(sys.modules, "parselmouth", None)
    assert "pip install 'prosody-ser[prominence]'" in run("--cues", "f0")


def test_praat_is_not_imported_without_f0(corpus, command):
    code = ("import sys; from prosody_ser.cli import main; main(); "
            "sys.exit(3 if 'parselmouth' in sys.modules else 0)")
    flags = ["prominence", corpus / "all.jsonl", "--audio_base_path", corpus, "--out", corpus / "m.jsonl"]
    assert subprocess.run([sys.executable, "-c", code, *map(str, flags)], capture_output=True).returncode == 0


def test_the_source_goes_with_predictions():
    rows = [dict(id=i, emotion=None, words=["a", "b"], prosody_annotations=[1, 0], prominence=[0.9, 0.2]) | more
            for i, more in enumerate([{}, dict(prosody_source="acoustic"), dict(prosody_source="ear")])]
    assert {k: v for k, v in score(rows).items() if k.endswith("rows")} == {"prosody/acoustic_rows": 1, "prosody/rows": 3}
    assert not [k for k in score(rows[::2]) if k.endswith("rows")]
    assert any("computed from the sound in 1 of 3 utterances" in n for n in _notes(score(rows), {}))


@needs(SHARED / "data" / "emodb2s")
def test_real_speech_is_marked_better_than_by_chance():
    from sklearn.metrics import roc_auc_score
    folder = SHARED / "data" / "emodb2s"
    rows = [u for u in read_manifest(folder / "train.jsonl", folder) if u.prosody_annotations][::3]
    truth = np.concatenate([u.prosody_annotations for u in rows])
    with pytest.warns(UserWarning, match="nobody knows"):
        marks, _ = mark_words(rows, ["energy"], "linear", replace=True)
    assert roc_auc_score(truth, np.concatenate(marks)) > 0.58


def test_a_mark_is_not_lost_by_reading(corpus):
    with pytest.raises(ManifestError, match="prosody_source must be a text"):
        row_utterance(dict(audio_filepath="a.wav", prosody_source=["acoustic"]), "m:1")
    assert row_utterance(dict(audio_filepath="a.wav", prosody_source="Acoustic"), "m:1").prosody_source == "Acoustic"


@pytest.mark.parametrize("marks", [[0, 1], [0.5, 0.25]])
def test_shares_and_their_source_go_through_parquet(corpus, marks):
    """A share is not cut to a whole number, and a row still tells where its marks are from."""
    pytest.importorskip("pyarrow")
    write(corpus / "m.jsonl", [dict(audio_filepath="0.wav", words=["a", "b"], prosody_annotations=marks, prosody_source="acoustic")])
    convert(corpus / "m.jsonl", corpus / "parquet", to="parquet", audio_base_path=corpus)
    convert(corpus / "parquet", corpus / "back")
    row, = read(corpus / "back" / "train.jsonl")
    assert row["prosody_annotations"] == marks and row["prosody_source"] == "acoustic"
