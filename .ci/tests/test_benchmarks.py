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


def test_the_usual_weight_decay():
    """A frozen row differs from its twin in the decay of the classifier alone, and is held against it."""
    frozen = [r for r in ROWS if r.part == "table" and r.way == "frozen" and not r.variant.endswith("split evenly")]
    twins = {r.id: r for r in ROWS if r.way == record.USUAL_DECAY}
    assert len(frozen) == len(twins) == 10
    for row in frozen:
        twin = twins[row.id.replace("/frozen/", f"/{record.USUAL_DECAY}/")]
        assert row.settings == twin.settings | dict(ser_weight_decay=3.0) and "ser_weight_decay" not in twin.settings
        assert [i for i in row.against if i in twins] == [twin.id] and not set(twin.against) & {r.id for r in frozen}


def test_words_split_evenly():
    """Such a row differs from the one that it is held against in the places of words alone; only rows with prominence have one."""
    evenly = [r for r in ROWS if r.variant.endswith("split evenly")]
    assert [r.corpus for r in evenly] == ["emodb", "emodb"]
    for row in evenly:
        other, = [r for r in ROWS if r.id in row.against]
        assert row.settings == other.settings | dict(prosody_alignment="uniform") and "prosody_alignment" not in other.settings


def test_a_rule_that_hears_nothing(tmp_path):
    """Folds are counted together, and each has only its own training rows."""
    from prosody_ser.data import Utterance, write_manifest
    for fold, (mark, true) in enumerate(((1, 1), (0, 1), (1, 0))):
        rows = [Utterance("a.wav", ["kɔ", "fie"], [m, 0]) for m in (mark, true)]
        for split, u in zip(("train", "test"), rows, strict=True):
            write_manifest([u, Utterance("b.wav")], tmp_path / "folds" / str(fold) / f"{split}.jsonl")
    (tmp_path / "folds/note.txt").touch()
    assert record.by_text(tmp_path) == 2 * 1 / (2 * 1 + 1 + 1)


def test_a_row_that_was_renamed(tmp_path):
    """What was published under another name is that of the row with its settings."""
    row = next(r for r in ROWS if r.way == record.USUAL_DECAY and r.against[1:])
    old = dict(id="old", part=row.part, corpus=row.corpus, backbone=row.backbone, way="w", variant="v", settings=row.settings)
    other = dict(id="other", settings={}, against={"old": 1, "far": 2})
    record.write_json(tmp_path / "r.json", dict(rows=[old, other]))
    found = record.published(tmp_path / "r.json", ROWS)
    assert set(found) == {row.id, "other"} and found[row.id]["way"] == row.way
    assert found["other"]["against"] == {row.id: 1, "far": 2}


def answers(seed, wrong_every, n=120):
    """Two emotions by six speakers; every so many answers are wrong, at other places with another seed."""
    names = "joy", "anger"
    return [dict(id=i, seed=seed, emotion=names[i % 2], predicted_emotion=names[(i % 2) ^ ((i // 5 + seed) % wrong_every < 1)],
                 predicted_speaker_norm=names[(i % 2) ^ ((i // 5 + seed) % (2 * wrong_every) < 1)], speaker=f"s{i % 6}", group=f"s{i % 6}") for i in range(n)]


def test_a_row_and_a_difference():
    worse, better = (record.sums_of([r for s in range(3) for r in answers(s, k)]) for k in (4, 12))
    found = record.scores_of(better)["ser/ua"]
    assert found["mean"] == pytest.approx(11 / 12, abs=.02) and found["low"] < found["mean"] < found["high"]
    gained = record.difference(better, worse)["ser/ua"]
    assert gained["mean"] == pytest.approx(1 / 4 - 1 / 12, abs=.02) and gained["low"] > 0 and gained["seeds"] == 3
    lost = record.difference(worse, better)["ser/ua"]
    assert lost["mean"] == pytest.approx(-gained["mean"]) and lost["low"] == pytest.approx(-gained["high"], abs=1e-6)
    norm = record.speaker_norm_gain(worse)
    assert norm["mean"] == pytest.approx(1 / 4 - 1 / 8, abs=.02) and norm["low"] > 0 and norm["seeds"] == 3
    assert record.speaker_norm_gain(record.sums_of([{k: v for k, v in r.items() if "norm" not in k} for r in answers(0, 4)])) is None
    old = {k: v if k == "2" else {who: {t: c for t, c in own.items() if "norm" not in t} for who, own in v.items()} for k, v in worse["seeds"].items()}
    found, part = record.scores_of(worse | dict(seeds=old)), record.scores_of(record.sums_of(answers(2, 4)))
    assert found["ser/ua"]["seeds"] == 3 and found["ser/ua_speaker_norm"] == part["ser/ua_speaker_norm"]     # over the seeds that have it
    assert record.difference(better, worse | dict(seeds=old))["ser/ua_speaker_norm"]["seeds"] == 1
    single = record.difference(better, record.sums_of(answers(0, 4)))["ser/ua"]        # a row of one seed is held against each
    assert single["seeds"] == 3 and single["mean"] == pytest.approx(gained["mean"], abs=.03)


def test_seeds_count_by_what_they_differ():
    """Speakers who are all alike leave the standard error of the mean over seeds, .1414 / √2; Student's t is of six speakers."""
    two = record.over_seeds([(.5, np.full(1000, .5)), (.7, np.full(1000, .7))], 10 ** 6)
    assert two["mean"] == pytest.approx(.6) and two["se"] == pytest.approx(.1, abs=.002) and two["sd"] == pytest.approx(.1414, abs=1e-3)
    spread = np.linspace(.4, .6, 1001)
    one, clipped = (record.over_seeds([(.5, spread)], 6, within) for within in ((0, 1), (.4, .55)))
    assert one["high"] - .5 == pytest.approx(.095 * 2.571 / 1.96 * (6 / 5) ** .5, abs=1e-3) and one["low"] == pytest.approx(1 - one["high"])
    assert (clipped["low"], clipped["high"]) == (.4, .55)


def test_sums_give_the_scores_of_the_predictions():
    """All tasks, through JSON: the sums of a seed hold what `score` says of its predictions."""
    from prosody_ser.evaluation import score
    said, heard = ["oh no not that", "go", "well  then"], ["oh no that", "go go", "well then"]
    marks, p = [[1, 0, .5, 1], [0], [1, 0]], [[.9, .6, .2, .4], [.1], [.7, .3]]
    health = dict(blank_rate=.5, tokens=3, reference_tokens=3, feasible=True)
    rows = [r | health | dict(text=said[i % 3], hypothesis=heard[i % 3], prosody_annotations=marks[i % 3], prominence=p[i % 3])
            for i, r in enumerate(answers(0, 5))]
    sums = json.loads(json.dumps(record.sums_of(rows)))
    found, true = record.values(sums["seeds"]["0"]), score(rows)
    for k in record.SHOWN:
        assert found[k] == pytest.approx(true[k]), k
        assert found[f"{k}_floor"] == pytest.approx(true[f"{k}_floor"]), k


def test_a_record_goes_on_where_another_machine_stopped(tmp_path):
    """Seeds that were published are neither made again nor lost; rows without sums stand until they are made anew."""
    from types import SimpleNamespace
    svm = next(r for r in ROWS if r.kind == "svm")
    tiny = next(r for r in ROWS if r.id == "table/nemo/whisper-tiny/frozen/emotion alone")
    file = tmp_path / "record.json"
    made = {"0": dict(commits=["abc"], machines=["theirs"], minutes=2.0, gradients={})}
    old = dict(id=tiny.id, settings=tiny.settings, sums=record.sums_of(answers(0, 4)), made=made)
    stale = dict(id=svm.id, settings=svm.settings, scores={"ser/ua": dict(mean=.5)})
    other = dict(id="table/theirs", settings={}, scores={})
    record.write_json(file, dict(rows=[old, stale, old | dict(id=ROWS[5].id, settings={}), other]))
    args = SimpleNamespace(published=record.published(file, ROWS), out=tmp_path / "runs", publish=file, seeds=2)
    assert set(args.published) == {svm.id, tiny.id, other["id"]}       # a row of other settings is not that row
    assert [(r.id, s) for r, s in record.missing([svm, tiny], args)] == [(svm.id, 0), (tiny.id, 1)]
    place = tiny.place(args.out)
    for fold in range(2):
        run = place / f"fold_{fold}" / "seed_1"
        (place / "folds" / str(fold)).mkdir(parents=True)
        (place / "folds" / str(fold) / "test.jsonl").touch()
        rows = [r for r in answers(1, 4) if int(r["speaker"][1]) % 2 == fold]
        run.mkdir(parents=True)
        (run / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert not record.is_whole(place, 1)
        record.write_json(place / "made" / "begun.json", dict(commit="def", machine="ours", seed=0, runs=1, minutes=9.0))
        assert record.told(tiny, ROWS, args)["made"] == made           # a seed that is not whole here was made there
        (run / "test_results.json").write_text("{}")
    record.write_json(place / "made" / "log.json", dict(commit="def", machine="ours", seed=1, runs=2, minutes=3.0))
    found = record.told(tiny, ROWS, args)
    assert found["seeds"] == 2 and found["commits"] == ["abc", "def"] and found["minutes"] == 5.0
    assert found["scores"]["ser/ua"]["mean"] == pytest.approx(np.mean([record.values(found["sums"]["seeds"][s])["ser/ua"] for s in "01"]))
    assert record.told(svm, ROWS, args) == stale
    args.cpu_bf16, args.read_only = False, True
    record.publish([tiny], args)                                       # rows that are not asked for stay
    assert {r["id"] for r in record.read_json(file)["rows"]} == {svm.id, tiny.id, other["id"]}
    assert not [s for r, s in record.missing([tiny], args)]


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


def test_whole_corpora_take_the_place_of_parts(tmp_path):
    """`prosody-ser prepare` writes all.jsonl; the part that the record is of has a name of its own."""
    nemo = record.CORPORA["nemo"]
    (tmp_path / "all.jsonl").write_text("")
    assert nemo.files(tmp_path) == [tmp_path / "all.jsonl"]
    (tmp_path / "small.jsonl").write_text("")
    assert nemo.files(tmp_path) == [tmp_path / "small.jsonl"]
