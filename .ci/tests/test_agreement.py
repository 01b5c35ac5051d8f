"""Agreement of annotators: kappa against other people's code, and what two files make together."""
import json
import os

import numpy as np
import pytest
from conftest import read, write
from sklearn.metrics import cohen_kappa_score

from prosody_ser.agreement import agreement, agreement_text, cohen_kappa, fleiss_kappa, merge_file, plot_agreement, read_annotations
from prosody_ser.data import read_manifest
from prosody_ser.folder import FolderError
from prosody_ser.text import ManifestError

WORDS = ["me", "rekɔ", "fie"]


def file(folder, name, labels, **more):
    """An annotation file: labels are (emotion, marks) of each row, or dicts of fields."""
    rows = []
    for i, x in enumerate(labels):
        fields = x if isinstance(x, dict) else dict(emotion=x[0], prosody_annotations=x[1])
        rows.append(dict(audio_filepath=f"{i}.wav", words=WORDS, annotator=name, film="x") | more | fields)
    return write(folder / f"{name}.jsonl", rows)


@pytest.fixture
def files(tmp_path):
    """Ama and Kofi nearly agree, Esi does not; one tie of three."""
    return [file(tmp_path, "ama", [("joy", [1, 0, 0]), ("anger", [0, 1, 0]), ("fear", [0, 0, 1]), ("joy", [1, 0, 0])]),
            file(tmp_path, "kofi", [("joy", [1, 0, 0]), ("anger", [0, 1, 0]), ("joy", [0, 0, 1]), ("joy", [1, 1, 0])]),
            file(tmp_path, "esi", [("joy", [1, 0, 0]), ("fear", [1, 0, 0]), ("anger", [0, 1, 0]), ("fear", [1, 0, 0])])]


@pytest.mark.parametrize("classes", [2, 5])
def test_cohen_is_scikit_learns(classes):
    rng = np.random.default_rng(classes)
    for n in (5, 40, 300):
        one = rng.integers(classes, size=n)
        other = np.where(rng.random(n) < 0.6, one, rng.integers(classes, size=n))
        table = np.zeros((classes, classes))
        np.add.at(table, (one, other), 1)
        assert cohen_kappa(table) == pytest.approx(cohen_kappa_score(one, other, labels=range(classes)), abs=1e-12)


@pytest.mark.parametrize(("classes", "raters"), [(2, 3), (5, 2), (4, 14)])
def test_fleiss_is_statsmodels(classes, raters):
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    rng = np.random.default_rng(raters)
    table = rng.multinomial(raters, rng.dirichlet([0.3] * classes), size=50) + 0
    table[::2] = rng.multinomial(raters, [1 / classes] * classes, size=25)
    assert fleiss_kappa(table) == pytest.approx(inter_rater.fleiss_kappa(table), abs=1e-12)
    two = rng.integers(9, size=(classes, classes)) + 1
    assert cohen_kappa(two) == pytest.approx(inter_rater.cohens_kappa(two).kappa, abs=1e-12)


def test_known_tables():
    patients = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    assert fleiss_kappa(patients) == pytest.approx(0.2099, abs=1e-4)            # Fleiss 1971
    assert cohen_kappa([[20, 5], [10, 15]]) == pytest.approx(0.4)               # .7 seen, .5 by chance
    assert cohen_kappa([[45, 15], [25, 15]]) == pytest.approx(0.1304, abs=1e-4)
    assert np.isnan(fleiss_kappa([[2, 0], [2, 0]])) and np.isnan(cohen_kappa([[7, 0], [0, 0]])) and np.isnan(fleiss_kappa([[1, 0]]))
    gaps = [[2, 0], [0, 3], [1, 1], [1, 0]]                                     # by hand: P = 1, 1, 0; shares 1, 0, .5
    assert fleiss_kappa(gaps) == pytest.approx((2 / 3 - 0.5) / 0.5)


def test_files_to_kappas(files):
    """Cohen's kappa of each pair over the labels that both gave; Fleiss' over all; words as items, utterances as draws."""
    found = agreement(read_annotations(files), resamples=200)
    rows = {name: read(f) for name, f in zip(("ama", "kofi", "esi"), files, strict=True)}
    for p in found["emotion"]["pairs"]:
        one, other = ([r["emotion"] for r in rows[p[k]]] for k in ("first", "second"))
        assert p["kappa"] == pytest.approx(cohen_kappa_score(one, other)) and p["items"] == 4
    for p in found["prominence"]["pairs"]:
        one, other = ([m for r in rows[p[k]] for m in r["prosody_annotations"]] for k in ("first", "second"))
        assert p["kappa"] == pytest.approx(cohen_kappa_score(one, other)) and p["items"] == 12
    emotion, prominence = found["emotion"], found["prominence"]
    assert emotion["classes"] == ["anger", "fear", "joy"] and emotion["confusion"] == [[1, 3, 1], [3, 0, 3], [1, 3, 4]]
    assert emotion["fleiss"] == pytest.approx(fleiss_kappa([[0, 0, 3], [2, 1, 0], [1, 1, 1], [0, 1, 2]]))
    assert emotion["fleiss_low"] <= emotion["fleiss"] <= emotion["fleiss_high"] and prominence["items"] == 12
    assert emotion["against_rest"]["esi"]["mean_kappa"] < emotion["against_rest"]["ama"]["mean_kappa"]
    assert emotion["against_rest"]["esi"]["fleiss_without"] == pytest.approx(emotion["pairs"][0]["kappa"], abs=0.05)
    assert [r["audio_filepath"] for r in found["discuss"]] == ["2.wav", "1.wav", "3.wav"]
    assert found == agreement(read_annotations(files), resamples=200)           # the same seed, the same intervals
    text = agreement_text(found)
    assert "resamples of the utterances, words with them" in text and "    esi: anger | me *rekɔ* fie" in text


def test_words_of_one_utterance_are_drawn_together(tmp_path):
    """Forty equal words in each of ten utterances are ten draws, not four hundred."""
    rng = np.random.default_rng(0)
    right = rng.random(10) < 0.7
    marks = [[int(m)] * 40 for m in rng.random(10) < 0.5]
    other = [m if ok else [1 - m[0]] * 40 for m, ok in zip(marks, right, strict=True)]
    words = dict(words=[f"w{i}" for i in range(40)])
    found = agreement(read_annotations([file(tmp_path, n, [dict(prosody_annotations=m) for m in ms], **words) for n, ms in (("a", marks), ("b", other))]))
    p = found["prominence"]["pairs"][0]
    assert p["items"] == 400 and p["kappa_high"] - p["kappa_low"] > 0.5 and not found["emotion"]


def test_who_does_not_listen_stands_out(tmp_path):
    rng, emotions = np.random.default_rng(1), np.array(["anger", "joy", "neutral"])
    truth = rng.choice(emotions, 80)
    def heard(slips):
        return [dict(emotion=str(e)) for e in np.where(rng.random(80) < slips, rng.choice(emotions, 80), truth)]
    found = agreement(read_annotations([file(tmp_path, n, heard(s)) for n, s in (("ama", 0.1), ("kofi", 0.1), ("esi", 0.1), ("yaw", 0.9))]))
    rest = found["emotion"]["against_rest"]
    assert [n for n, r in rest.items() if r["stands_out"]] == ["yaw"] and rest["yaw"]["gain_low"] > 0
    assert "they disagree with the rest" in next(x for x in agreement_text(found).splitlines() if x.strip().startswith("yaw  ") and "mean" in x)


def test_what_is_skipped_unsure_repeated_or_missing(tmp_path):
    a = file(tmp_path, "a", [("joy", [1, 0, 0]), dict(emotion="joy", skipped=True), dict(unsure=True, emotion="fear", seconds=4)])
    b = file(tmp_path, "b", [("anger", [1, 0, 0]), ("joy", [0, 0, 1]), ("fear", [0, 0, 1])])
    with b.open("a", encoding="utf-8") as f:                                    # the annotator came back to 0.wav
        f.write(json.dumps(dict(audio_filepath="./0.wav", words=WORDS, annotator="B", emotion="Joy", prosody_annotations=[0, 0, 0])) + "\n")
    found = agreement(read_annotations([a, b]), resamples=20)
    assert found["emotion"]["items"] == 2 and found["emotion"]["pairs"][0]["kappa"] == 1
    assert found["annotators"]["a"] == dict(utterances=3, skipped=1, unsure=1, seconds=4, marked=pytest.approx(1 / 3)) and found["prominence"]["items"] == 3
    assert found["annotators"]["b"]["utterances"] == 3


@pytest.mark.parametrize("how", ["majority", "soft"])
def test_merged_labels_train(files, tmp_path, how):
    told = merge_file(read_annotations(files), tmp_path / "m.jsonl", how)
    rows = read(tmp_path / "m.jsonl")
    third = 1 / 3
    if how == "majority":
        assert [r.get("emotion") for r in rows] == ["joy", "anger", None, "joy"] and [r["prosody_annotations"] for r in rows] == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
        assert "1 without an emotion; 1 of these because of a tie" in told
    else:
        assert rows[0]["emotion"] == "joy" and rows[2]["emotion"] == {"fear": 0.3333, "joy": 0.3333, "anger": 0.3333}
        assert np.allclose(rows[3]["prosody_annotations"], [1, third, 0], atol=1e-4)
        assert "1 with a tie of emotions. Ties train, and scores leave them out: one more listener decides most of them; --labels majority" in told
    assert all(r["film"] == "x" and not {"annotator", "seconds"} & r.keys() for r in rows) and len(read_manifest(tmp_path / "m.jsonl")) == 4
    (tmp_path / "other.jsonl").write_text("mine\n")
    with pytest.raises(FolderError, match="nothing is written over"):
        merge_file(read_annotations(files), tmp_path / "other.jsonl", how)


def test_less_than_chance_is_seen(tmp_path):
    """A negative kappa is red, with a number that can be read; the same distance from 0 is as strong a colour; no pair is grey."""
    a = file(tmp_path, "a", [("joy", [1, 0, 0]), ("anger", [0, 1, 0])] * 6)
    b = file(tmp_path, "b", [("anger", [0, 1, 1]), ("joy", [1, 0, 1])] * 6)
    ax = plot_agreement(agreement(read_annotations([a, b]), 20)).axes[0]
    image, = ax.images
    red, green, blue, alpha = image.cmap(image.norm(image.get_array()))[0, 1]
    assert [t.get_text() for t in ax.texts] == ["-1.00"] * 2 and red > green + .3 and red > blue + .1 and alpha == 1
    assert ax.texts[0].get_color() == "w" and image.cmap(image.norm(-1.0)) != image.cmap(image.norm(0.0))
    assert image.get_array().mask[0, 0] and ax.get_facecolor()[0] < 1


def test_two_listeners_leave_ties_and_are_told_so(tmp_path):
    a = file(tmp_path, "a", [("joy", [1, 0, 0]), ("anger", [0, 1, 0]), ("joy", [0, 0, 1])])
    b = file(tmp_path, "b", [("joy", [1, 0, 0]), ("joy", [1, 1, 0]), ("joy", [0, 0, 1])])
    found = read_annotations([a, b])
    told = merge_file(found, tmp_path / "soft.jsonl", "soft")
    assert "1 with a tie of emotions; 1 words that exactly half of the listeners marked" in told and "one more listener" in told
    soft = read_manifest(tmp_path / "soft.jsonl")
    assert [u.label for u in soft] == ["joy", None, "joy"] and soft[1].prosody_annotations == [0.5, 1, 0]
    told = merge_file(found, tmp_path / "hard.jsonl", "majority")
    assert "1 of these because of a tie; 1 words that exactly half of the listeners marked are not prominent. One more listener" in told
    hard = read(tmp_path / "hard.jsonl")
    assert "emotion" not in hard[1] and hard[1]["prosody_annotations"] == [0, 1, 0]
    c = file(tmp_path, "c", [("joy", [1, 0, 0]), ("anger", [0, 1, 0]), ("joy", [0, 0, 1])])
    assert "more listener" not in merge_file(read_annotations([a, b, c]), tmp_path / "three.jsonl", "soft")
    tied = [dict(emotion={"joy": 0.5, "anger": 0.5}, prosody_annotations=[0.5, 1, 0])] * 3            # a file that was merged before
    found = agreement(read_annotations([a, file(tmp_path, "d", tied)]), 20)
    assert not found["emotion"] and found["prominence"]["items"] == 6 and "d: tie | me *rek" in agreement_text(found)


def test_merged_indices_and_corrected_words(tmp_path):
    a = file(tmp_path, "a", [dict(emotion=3, prosody_annotations=[1, 0, 0], word_times=[[0, 1], [1, 2], [2, 3]]), dict(label=2)])
    b = file(tmp_path, "b", [dict(emotion=0, words=["me", "fie"], prosody_annotations=[0, 1]), dict(emotion=1)])
    c = file(tmp_path, "c", [dict(emotion=3, words=["me", "fie"], prosody_annotations=[1, 1]), dict(emotion=2)])
    found = read_annotations([a, b, c])
    assert "1 utterances have transcripts that differ" in agreement_text(agreement(found, 20))
    merge_file(found, tmp_path / "soft.jsonl", "soft")
    merge_file(found, tmp_path / "hard.jsonl")
    soft, hard = read_manifest(tmp_path / "soft.jsonl"), read_manifest(tmp_path / "hard.jsonl")
    assert soft[0].emotion == {"3": 0.6667, "0": 0.3333} and [u.label for u in soft] == [u.emotion for u in hard] == [3, 2]
    assert soft[0].words == ["me", "fie"] and soft[0].prosody_annotations == [0.5, 1] and soft[0].word_times is None and hard[0].prosody_annotations == [0, 1]


def test_wrong_files(files, tmp_path):
    def told(*given, match):
        with pytest.raises(ManifestError, match=match):
            read_annotations(given)
    told(files[0], files[0], match=r"ama\.jsonl is given twice")
    os.symlink(files[0], tmp_path / "link.jsonl")
    told(files[0], tmp_path / "link.jsonl", match="is given twice")
    write(tmp_path / "copy.jsonl", [r | dict(annotator="Ama") for r in read(files[0])])
    told(files[0], files[1], tmp_path / "copy.jsonl", match=r"'Ama' is the annotator of .*ama\.jsonl and of .*copy\.jsonl\. Rename one")
    write(tmp_path / "alien.jsonl", [r | dict(audio_filepath=f"else/{i}.wav", annotator="yaw") for i, r in enumerate(read(files[0]))])
    told(*files, tmp_path / "alien.jsonl", match=r"alien\.jsonl has no utterance in common with the other files: it is of another manifest \(it has else/0\.wav\)")
    told(files[0], match="1 annotator. Agreement needs two")
    told(files[0], write(tmp_path / "none.jsonl", [dict(audio_filepath="0.wav")]), match=r"none\.jsonl:1: no annotator\. Add")
    for fields in (dict(unsure="no"), dict(skipped=1.5), dict(seconds=-1), dict(seconds="4")):
        told(files[0], write(tmp_path / "bad.jsonl", [dict(audio_filepath="0.wav", annotator="y") | fields]), match=r"bad\.jsonl:1: " + next(iter(fields)))
    mixed = write(tmp_path / "mixed.jsonl", [dict(audio_filepath="0.wav", annotator="yaw", emotion=3)])
    with pytest.raises(ManifestError, match="is an index while other rows use names"):
        agreement(read_annotations([files[0], mixed]))


def test_the_command(files, tmp_path, command):
    code, out = command("agreement", *files, "--merge", tmp_path / "m.jsonl", "--labels", "soft", "--plot", tmp_path / "a.png", "--show", 1)
    assert code == 0 and "emotion: Fleiss' kappa" in out and "4 utterances, soft labels" in out and (tmp_path / "a.png").stat().st_size > 1000
    assert out.count("esi: ") == 1
    code, out = command("agreement", *files, "--json")
    assert code == 0 and json.loads(out)["utterances"] == 4
    code, out = command("agreement", files[0], files[0])
    assert code == 1 and "is given twice" in out and "Traceback" not in out
