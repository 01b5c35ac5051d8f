"""The record and the study of rules: their rows, and their arithmetic on predictions whose scores are known."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import record  # noqa: E402
import selection  # noqa: E402

CORPORA, BACKBONES = dict.fromkeys(["emodb", "nemo", "ravdess"], Path("-")), ["whisper-tiny", "whisper-base"]
ROWS = [r for part in record.PARTS.values() for r in part(CORPORA, BACKBONES)]


def test_every_row_can_be_made():
    """Each has a name of its own, settings that training takes, and is compared with rows that there are."""
    from prosody_ser.config import TrainConfig
    names = [r.id for r in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        assert set(row.against) <= set(names), row.id
        if row.kind != "svm":
            TrainConfig("-", "-", "-", **(record.PLAIN | row.settings))


def test_rows_with_the_same_settings_share_their_runs():
    places = {}
    for row in ROWS:
        places.setdefault(row.place(Path("out")), []).append(row)
    for rows in places.values():
        assert len({json.dumps([r.corpus, r.backbone, r.kind, r.trained_on, r.settings], sort_keys=True) for r in rows}) == 1
    shared = [sorted(r.id for r in rows) for rows in places.values() if len(rows) > 1]
    assert ["paper/nemo/whisper-tiny/our heads/α 0.1", "table/nemo/whisper-tiny/fine-tuned/with transcript"] in shared


def answers(seed, wrong_every, n=120):
    """Two emotions by six speakers; every so many answers are wrong, at other places with another seed."""
    names = "joy", "anger"
    return [dict(id=i, seed=seed, emotion=names[i % 2], predicted_emotion=names[(i % 2) ^ ((i + seed) % wrong_every < 1)],
                 speaker=f"s{i % 6}", group=f"s{i % 6}") for i in range(n)]


def test_a_row_and_a_difference():
    worse, better = ([r for s in range(3) for r in answers(s, k)] for k in (4, 12))
    found = record.scores_of(better)["ser/ua"]
    assert found["mean"] == pytest.approx(11 / 12, abs=.02) and found["low"] < found["mean"] < found["high"]
    gained = record.difference(better, worse)["ser/ua"]
    assert gained["mean"] == pytest.approx(1 / 4 - 1 / 12, abs=.02) and gained["low"] > 0 and gained["seeds"] == 3
    lost = record.difference(worse, better)["ser/ua"]
    assert lost["mean"] == pytest.approx(-gained["mean"]) and lost["low"] == pytest.approx(-gained["high"], abs=1e-6)
    single = record.difference(better, answers(0, 4))["ser/ua"]                # a row of one seed is held against each
    assert single["seeds"] == 3 and single["mean"] == pytest.approx(gained["mean"], abs=.03)


def epoch(ua_wrong, wer_wrong, loss, n=40):
    """A scored split of an epoch: answers of which some are wrong, transcripts of four words of which some are."""
    names = "joy", "anger"
    rows = [dict(speaker="a", ser=[names[i % 2], names[(i % 2) ^ (i // 2 < ua_wrong)]], asr=[wer_wrong, 0, 0, 4]) for i in range(n)]
    return dict(loss=loss, rows=rows)


def test_rules_take_what_they_say(tmp_path):
    """A lucky early epoch without a transcript, a late one as good within its error, a last one that is worse."""
    val = {"1": epoch(1, 4, 3.), "2": epoch(2, 1, 2.), "3": epoch(2, 1, 1.), "4": epoch(12, 1, 4.)}
    run = dict(val=val, test={k: v | dict(rows=[r | dict(speaker="b") for r in v["rows"]]) for k, v in val.items()})
    (tmp_path / "fold_0_seed_0.json").write_text(json.dumps(run))
    (tmp_path / "fold_1_seed_0.json").write_text(json.dumps(run))
    taken = {r["rule"].split(" (")[0]: r["epochs"][0] for r in selection.rule_table(sorted(tmp_path.glob("fold_*")))}
    assert taken["best emotion macro-F1"] == "1" and taken["best skill"] == "2"
    assert taken["skill, one standard error, last"] == taken["lowest loss"] == "3" and taken["no choice: last epoch"] == "4"
    scores = selection.scores(val["2"])
    assert float(np.ravel(scores["ser/ua"])[0]) == pytest.approx(.9) and float(np.ravel(scores["asr/wer"])[0]) == .25
    assert float(np.ravel(scores["skill"])[0]) == pytest.approx((.8 + .75) / 2)
