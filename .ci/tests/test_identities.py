"""The same speaker, emotion or file in another spelling is the same; what other tools call otherwise is read; an index is no name."""
import json
import math
import warnings

import numpy as np
import pytest
import soundfile as sf

from prosody_ser.audio import load_utterance
from prosody_ser.data import (
    ManifestError,
    emotion_names,
    groups_of,
    read_manifest,
    read_rows,
    split_by_group,
    straddling_groups,
)
from prosody_ser.labels import emotion_ids


def manifest(folder, name, rows):
    """Rows as a file, NaN as pandas writes it."""
    (folder / name).write_text("".join(json.dumps({"audio_filepath": f"{i}.wav"} | r) + "\n" for i, r in enumerate(rows)), encoding="utf-8")
    return read_manifest(folder / name)


@pytest.mark.parametrize("one, other", [(1.0, 1), (1.0, "1"), ("Ama", "ama"), ("ama ", "ama"), ("A\u0301ma", "\u00c1ma"), ("a  b", "a b"), (7, "7")])
def test_a_speaker_in_two_spellings_is_one(tmp_path, one, other):
    train, test = (manifest(tmp_path, f"{i}.jsonl", [{"speaker": s}]) for i, s in enumerate((one, other)))
    assert len(straddling_groups(dict(train=train, test=test))) == 1


@pytest.mark.parametrize("nothing", [math.nan, None, "", " "])
def test_an_empty_cell_is_no_speaker(tmp_path, nothing):
    rows = manifest(tmp_path, "m.jsonl", [{"speaker": nothing}] * 2)
    assert [u.speaker for u in rows] == [None, None] and groups_of(rows) == [None, None]


def test_a_spreadsheet_s_row_is_read(tmp_path):
    row, = manifest(tmp_path, "m.jsonl", [dict(emotion=2.0, speaker=3.0, start=math.nan, end=math.nan, words=["a"], prosody_annotations=math.nan)])
    assert (row.emotion, row.speaker, row.start, row.end, row.prosody_annotations) == (2, "3", None, None, None)
    assert type(row.emotion) is int
    assert manifest(tmp_path, "n.jsonl", [dict(emotion=math.nan)])[0].emotion is None


def test_an_emotion_in_several_spellings_is_one_class(tmp_path):
    rows = manifest(tmp_path, "m.jsonl", [{"emotion": e} for e in ("joy", "Joy", "joy ", "a\u0301nger", "\u00e1nger")])
    names = emotion_names(rows)
    assert names == ["joy", "\u00e1nger"] and emotion_ids(rows, names) == [0, 0, 0, 1, 1]
    assert emotion_ids(rows, ["\u00c1NGER", "JOY"]) == [1, 1, 1, 0, 0]           # names that were given keep their place


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_index_beside_names_is_refused_before_training(corpus, tmp_path, split):
    from prosody_ser.config import TrainConfig
    from prosody_ser.train import load_splits
    files = {s: corpus / f"{s}.jsonl" for s in ("train", "val", "test")}
    names = sorted({u.emotion for u in read_manifest(files["train"])})
    rows = [json.loads(line) for line in files[split].read_text(encoding="utf-8").splitlines()]
    numbered = tmp_path / "numbered.jsonl"
    numbered.write_text("".join(json.dumps(r | dict(emotion=names.index(r["emotion"]))) + "\n" for r in rows), encoding="utf-8")
    manifests = {f"{s}_jsonl": str(f) for s, f in (files | {split: numbered}).items()}
    with pytest.raises(ManifestError, match="numbered.jsonl:.* is an index while other rows use names such as"):
        load_splits(TrainConfig(str(corpus), **manifests, backbone="tiny", save_dir=str(tmp_path)))
    given = TrainConfig(str(corpus), **manifests, backbone="tiny", save_dir=str(tmp_path), emotion_names=names)
    assert load_splits(given)[split].emotions == [names.index(r["emotion"]) for r in rows]


@pytest.mark.parametrize("fields", [dict(offset=.5, duration=.25), dict(start_time=.5, end_time=.75), dict(begin=.5, stop=.75), dict(onset=.5, end=.75)])
def test_a_segment_by_another_name_is_heard_alone(tmp_path, fields):
    sf.write(tmp_path / "0.wav", np.linspace(-.5, .5, 16000), 16000)
    row, = manifest(tmp_path, "m.jsonl", [fields])
    assert (row.start, row.end) == (.5, .75) and len(load_utterance(row, tmp_path)) == 4000
    both, = manifest(tmp_path, "n.jsonl", [fields | dict(start=.1, end=.2)])       # our own names win
    assert (both.start, both.end) == (.1, .2)


TIMES = {                                                # fields -> what is heard; the file has 20 s
    "start and duration": (dict(start=10, duration=2), (10, 12)),
    "of other tools": (dict(start_time=10.0, duration=2.0), (10, 12)),
    "begin": (dict(begin=10, duration=2), (10, 12)),
    "onset and duration": (dict(onset=10, duration=2), (10, 12)),
    "onset and offset": (dict(onset=10, offset=12), (10, 12)),
    "all three": (dict(onset=10, offset=12, duration=2), (10, 12)),
    "onset of nothing": (dict(onset=None, offset=12), (None, 12)),
    "offset twice": (dict(start=10, offset=10), (10, None)),
    "a text": (dict(offset=10, duration="2.0"), (10, 12)),
    "a text after start": (dict(start=0, duration="2.0"), (0, 2)),
    "no end": (dict(start=0, end=None, duration=2.0), (0, 2)),
    "an end of a spreadsheet": (dict(start=10, end=math.nan, duration=2.0), (10, 12)),
    "a start of a spreadsheet": (dict(start=math.nan, offset=10, duration=2.0), (10, 12)),
    "a duration of a spreadsheet": (dict(start=10, duration=math.nan), (10, None)),
    "rounded": (dict(start=1.23, end=3.46, duration=2.2), (1.23, 3.46)),
    "length of the file": (dict(duration=20.0), (None, None)),
    "no offset": (dict(offset=None, duration=20.0), (None, None)),
    "length of the file as a text": (dict(duration="0:20"), (None, None)),
    "a word beside both": (dict(start=1, end=3, duration="2 s"), (1, 3))}


@pytest.mark.parametrize("how", TIMES)
def test_a_duration_says_where_an_utterance_ends(tmp_path, how):
    fields, (start, end) = TIMES[how]
    sf.write(tmp_path / "0.wav", np.random.default_rng(0).normal(size=20 * 1000) * .1, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row, = rows = manifest(tmp_path, "m.jsonl", [fields])
    assert (row.start, row.end) == (start, end) and rows.unread == []
    assert len(load_utterance(row, tmp_path)) == pytest.approx(16000 * ((20 if end is None else end) - (start or 0)), abs=20)


@pytest.mark.parametrize(("fields", "told"), [
    (dict(start=10, duration="2 s"), r"duration '2 s' is no length in seconds. Give"),
    (dict(begin=10, duration=True), r"duration True is no length"),
    (dict(offset=10, duration=[2]), r"duration \[2\] is no length"),
    (dict(start=10, duration="nan"), r"duration 'nan' is no length"),
    (dict(start=10, duration=0), r"duration 0 is no length"),
    (dict(start=10, duration=-2.0), r"duration -2.0 is no length"),
    (dict(offset=10.5, duration=10**400), r"duration 1000.* is no length"),
    (dict(onset=10, offset="later"), r"start 10, end 'later' is not a stretch"),
    (dict(onset=10, offset=9), r"start 10, end 9 is not a stretch"),
    (dict(start="later", duration=2), r"start 'later', end None is not a stretch"),
    (dict(start=10, offset=12), r"start 10 and offset 12, but no end. Give start and end")])
def test_times_that_say_nothing_are_refused(tmp_path, fields, told):
    with pytest.raises(ManifestError, match=rf"m.jsonl:2: {told}"):
        manifest(tmp_path, "m.jsonl", [dict(start=1, end=2), fields])


def test_a_duration_that_contradicts_the_end_is_told(tmp_path):
    rows = [dict(start=10, end=12, duration=2), dict(begin=10, end_time=12, duration=5.0), dict(end=12, duration="2"), dict(onset=1, offset=3, duration=9)]
    with pytest.warns(UserWarning, match=r"m.jsonl:2: duration 5.0, but start and end are 2 s apart \(and 2 more\).*end counts") as warned:
        found = manifest(tmp_path, "m.jsonl", rows)
    assert len(warned) == 1 and [(u.start, u.end) for u in found] == [(10, 12), (10, 12), (None, 12), (1, 3)]


def test_other_names_of_fields(tmp_path):
    row, = manifest(tmp_path, "m.jsonl", [dict(spk="a", label="joy", text="me  kɔ fie")])
    assert (row.speaker, row.emotion, row.words) == ("a", "joy", ["me", "kɔ", "fie"])
    rows, problems = read_rows(tmp_path / "m.jsonl")
    assert rows.unread == [] and problems == []
    kept, = manifest(tmp_path, "n.jsonl", [dict(actor="b", speaker="a", words=["x"], text="y z", film="f", duration=3.)])
    assert (kept.speaker, kept.words, kept.end) == ("a", ["x"], None)
    assert read_rows(tmp_path / "n.jsonl")[0].unread == ["film"]
    with pytest.raises(ManifestError, match="w.jsonl:1: start"):
        manifest(tmp_path, "w.jsonl", [dict(offset="0.5", duration=.2)])


def test_films_are_not_their_last_folder(tmp_path):
    """film/wav/file and reader/chapter/file: every group in one split."""
    for pattern in ("film{}/wav/{}.wav", "./reader{}/{}/x.wav", "corpus/en/{}/chapter{}/x.wav"):
        rows = manifest(tmp_path, "m.jsonl", [dict(audio_filepath=pattern.format(g, i)) for g in range(4) for i in range(3)])
        splits = split_by_group(rows, (2, 1, 1))
        assert len(set(groups_of(rows))) == 4 and sorted(map(len, splits)) == [3, 3, 6]
        assert straddling_groups(dict(zip("abc", splits, strict=True))) == []


def test_a_file_in_two_spellings_is_one(tmp_path):
    from prosody_ser.data import duplicate_rows
    spellings = ["a/b.wav", "./a/b.wav", "a//b.wav", "a/x/../b.wav", "e\u0301.wav", "\u00e9.wav"]
    rows = manifest(tmp_path, "m.jsonl", [dict(audio_filepath=p) for p in spellings])
    assert [len(same) for same in duplicate_rows(rows)] == [4, 2]


def test_an_index_is_refused_by_a_model_of_names(corpus, tmp_path):
    """Names in training, indices in the test set: the order of the names was nobody's."""
    from prosody_ser.evaluate import evaluate_model
    from prosody_ser.model import create_model
    rows = read_manifest(corpus / "test.jsonl", corpus)
    names = sorted({u.emotion for u in rows})
    numbered = [type(u)(**{f: getattr(u, f) for f in u.__slots__} | dict(emotion=names.index(u.emotion))) for u in rows]
    for meant in (False, True):
        model = create_model(names, tasks=["ser"], emotion_indices=meant)
        if meant:
            plain, given = (evaluate_model(model, us, corpus, device="cpu") for us in (rows, numbered))
            assert dict(plain) == dict(given)
        else:
            with pytest.raises(ManifestError, match="is an index, but the model was trained on names"):
                evaluate_model(model, numbered, corpus, device="cpu")
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["emotion_indices"] is True


def test_runs_of_other_rows_are_not_averaged(corpus, tmp_path):
    """One name of a manifest, other rows in it: two lines of the table, with a word; the same rows are seeds of one."""
    import prosody_ser as ps
    train = tmp_path / "train.jsonl"
    lines = (corpus / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, n, seed in (("a", 12, 0), ("b", 12, 1), ("c", 8, 2)):
        train.write_text("".join(lines[:n]), encoding="utf-8")
        ps.train(train, corpus / "val.jsonl", audio_base_path=str(corpus), backbone="tiny", vocab_size=25, num_epochs=1, num_workers=0, seed=seed,
                 tokenizer_path=str(tmp_path / "tok.model"), save_dir=str(tmp_path / "runs" / name))
    table = ps.runs(tmp_path / "runs")
    assert sorted(table.frame["runs"]) == [1, 2] and "rows" in table.settings
    assert "other data (rows)" in table._repr_html_()
