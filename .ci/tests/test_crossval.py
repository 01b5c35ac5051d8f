"""Cross-validation: what is doubtful about its folds is told before it trains, and each score stands beside its own floor."""
import json

import pytest
from conftest import write

from prosody_ser.ablation import _shared_classes, _summarise_folds, crossval_table, given_folds, make_folds
from prosody_ser.config import TrainConfig
from prosody_ser.text import ManifestError


def _rows(n=12, **more):
    return [dict(audio_filepath=f"{i}.wav", emotion=("anger", "joy")[i % 2], speaker=f"spk{i // 2 % 4}") | {k: v(i) for k, v in more.items()} for i in range(n)]


def test_rows_without_a_speaker_are_told(tmp_path, capsys):
    """How many, where the first one is, and the cure; by folds that are made, and by folds that are given."""
    rows = _rows(speaker=lambda i: None if i in (3, 7) else f"spk{i // 2 % 4}")
    folds = make_folds([write(tmp_path / "all.jsonl", rows)], tmp_path / "folds", 3)
    text = capsys.readouterr().out
    assert f"beware: 2 of 12 rows have no speaker, while others have (first {tmp_path}/all.jsonl:4)" in text and text.count("beware") == 1 and "leave them out" in text
    given_folds(folds[0].parent)
    assert "beware: 2 of 12 rows have no speaker" in capsys.readouterr().out
    make_folds([write(tmp_path / "named.jsonl", _rows())], tmp_path / "others")
    assert "beware" not in capsys.readouterr().out


def _fold(folder, splits):
    for s, rows in splits.items():
        (folder / "0").mkdir(parents=True, exist_ok=True)
        write(folder / "0" / f"{s}.jsonl", rows)
    return folder


def test_films_in_two_splits_of_a_fold(tmp_path, capsys):
    """Films that are cut by start and end within one folder are refused, whoever they are of; a dialogue whose speakers are divided is told."""
    cut = [dict(audio_filepath=f"audio/film{i % 4}.wav", emotion="joy", start=10 * i, end=10 * i + 3) for i in range(12)]
    with pytest.raises(ManifestError, match="0: audio/film0.wav, .* in two splits. Folds are disjoint by speaker"):
        given_folds(_fold(tmp_path / "shuffled", dict(train=cut[:4], val=cut[4:8], test=cut[8:])))
    by_film = [sorted(cut, key=lambda r: r["audio_filepath"])[i:j] for i, j in ((0, 6), (6, 9), (9, 12))]
    assert len(given_folds(_fold(tmp_path / "whole", dict(zip(("train", "val", "test"), by_film, strict=True))))) == 1
    assert "beware" not in capsys.readouterr().out
    talks = [r | dict(speaker=f"spk{i // 4}") for i, r in enumerate(cut)]
    given_folds(_fold(tmp_path / "dialogues", dict(train=talks[:4], val=talks[4:8], test=talks[8:])))
    assert "beware: 4 recordings have rows in two splits of a fold (such as audio/film0.wav)" in capsys.readouterr().out


def test_a_recording_in_which_somebody_is_named(tmp_path, capsys):
    """A few rows of it without a speaker are told, in any order of the rows, and do not stop folds by speaker."""
    rows = [dict(audio_filepath=f"ep{i % 4}.wav", emotion=("anger", "joy")[i % 2], speaker=None if i in (5, 11) else f"s{i % 4}", start=10 * i, end=10 * i + 3)
            for i in range(16)]
    for name, order in dict(forth=rows, back=rows[::-1]).items():
        assert len(make_folds([write(tmp_path / f"{name}.jsonl", order)], tmp_path / name)) > 1
        text = capsys.readouterr().out
        assert "beware: 2 of 16 rows have no speaker" in text and "recordings have rows in two splits of a fold" in text


def test_classes_are_compared_by_name(tmp_path, capsys):
    """FEAR and fear are one class; a class that a fold lacks is named."""
    def told(name, rows):
        folds = make_folds([write(tmp_path / f"{name}.jsonl", rows)], tmp_path / name)
        return _shared_classes(TrainConfig("", "-", "-"), folds).emotion_names, capsys.readouterr().out
    names, text = told("spelt", _rows(speaker=lambda i: f"spk{i % 4}", emotion=lambda i: ("FEAR" if i == 0 else "fear") if i < 8 else "joy"))
    assert names == ["fear", "joy"] and "beware" not in text
    names, text = told("lost", _rows(emotion=lambda i: "Sad" if i == 0 else "joy"))
    assert names == ["Sad", "joy"] and "beware: no training row of fold 0 is Sad; no training row of fold 3 is Sad. A model cannot learn" in text


def test_each_score_beside_its_floor():
    """The mean over folds has the mean of the folds' floors, the pooled score that of all rows."""
    def record(fold, i):
        true = ("anger", "joy")[(i % 4 == 0) if fold else (i % 2)]
        return dict(audio_filepath=f"{fold}{i}.wav", speaker=f"spk{fold}{i % 2}", emotion=true, predicted_emotion=true, probabilities={"anger": 0.5, "joy": 0.5})
    from prosody_ser.evaluation import score
    records = [[record(f, i) for i in range(8)] for f in (0, 1)]
    table, _ = _summarise_folds([dict(fold=f, seed=0, metrics=score(rs), records=rs) for f, rs in enumerate(records)])
    assert table["ser/wa"]["folds"]["floor"] == pytest.approx((0.5 + 0.75) / 2) and table["ser/wa"]["floor"] == pytest.approx(10 / 16)
    unequal = [records[0], records[1][:4]]
    table, _ = _summarise_folds([dict(fold=f, seed=0, metrics=score(rs), records=rs) for f, rs in enumerate(unequal)])
    assert table["ser/wa"]["floor"] == pytest.approx(7 / 12)
    head, _, *lines = crossval_table(table).splitlines()
    line = next(x for x in lines if "accuracy" in x or "WA" in x)
    assert head == "|  | mean over folds | mean floor | pooled | 95 % interval | floor |" and "| 0.625 | 1.000 |" in line and line.endswith("| 0.583 |")
    old = json.loads(json.dumps(table))
    for r in old.values():
        del r["folds"]["floor"]
    assert "|  | 1.000" in crossval_table(old)                                         # crossval.json of an earlier version
