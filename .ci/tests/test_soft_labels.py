"""Soft labels: an emotion as shares of its classes, a mark as the share of listeners, from the manifest to the scores."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read, write

from prosody_ser.audit import audit
from prosody_ser.batches import SpeechDataset, oversampling_counts
from prosody_ser.data import Utterance, describe, emotion_names, read_manifest, rows_digest, write_manifest
from prosody_ser.evaluate import card_html, write_report
from prosody_ser.evaluation import intervals, prosody_metrics, read_predictions, score, write_predictions
from prosody_ser.heads import class_weights, emotion_losses, log_prior
from prosody_ser.labels import emotion_ids, emotion_targets
from prosody_ser.model import Collator, _prominence_loss
from prosody_ser.selection import can_be_scored, floor_warnings
from prosody_ser.text import ManifestError

SOFT = [dict(audio_filepath="a.wav", words=["bra", "ha"], prosody_annotations=[0.25, 1], emotion={"anger": 0.6, "joy": 0.4}),
        dict(audio_filepath="b.wav", words=["aane"], prosody_annotations=[0.75], emotion="joy"),
        dict(audio_filepath="c.wav", emotion={"joy": 0.7, "fear": 0.3})]


def test_a_manifest_is_read_and_written_with_its_shares(tmp_path):
    rows = read_manifest(write(tmp_path / "m.jsonl", SOFT))
    assert [u.emotion for u in rows] == [r["emotion"] for r in SOFT] and [u.label for u in rows] == ["anger", "joy", "joy"]
    assert rows[0].prosody_annotations == [0.25, 1]
    write_manifest(rows, tmp_path / "again.jsonl")
    assert read(tmp_path / "again.jsonl") == SOFT and rows_digest(rows) == rows_digest(read_manifest(tmp_path / "again.jsonl"))
    assert rows_digest(rows) != rows_digest([*rows[:2], Utterance("c.wav", emotion={"joy": 0.6, "fear": 0.4})])


@pytest.mark.parametrize(("emotion", "told"), [
    ({"anger": 0.6, "joy": 0.3}, "add up to 0.9, not to 1"), ([60, 40], "a share of 60"), ({"anger": 1.2, "joy": -0.2}, "a share of 1.2"),
    ({"joy": 0.5, "Joy ": 0.5}, "names a class twice"), ({"nan": 1}, "no name"), ({}, "emotion must be"), ({"anger": "0.6", "joy": "0.4"}, "emotion must be")])
def test_wrong_shares_are_told_with_line_and_cure(tmp_path, emotion, told):
    file = write(tmp_path / "m.jsonl", [SOFT[1], dict(audio_filepath="x.wav", emotion=emotion)])
    with pytest.raises(ManifestError, match=rf"m\.jsonl:2: .*{told}.*Give each class its share"):
        read_manifest(file)


@pytest.mark.parametrize("marks", [[0.5, 1.1], [-0.1, 1], [float("nan"), 0], ["0.5", 1], [50, 100]])
def test_wrong_p_scores_are_told(tmp_path, marks):
    file = write(tmp_path / "m.jsonl", [dict(audio_filepath="x.wav", words=["a", "b"], prosody_annotations=marks)])
    with pytest.raises(ManifestError, match=r"m\.jsonl:1: prosody_annotations must be a list of 0 and 1, or shares between"):
        read_manifest(file)


def test_classes_and_targets():
    rows = [Utterance("a", emotion=r["emotion"], source=f"m:{i}") for i, r in enumerate(SOFT)] + [Utterance("d")]
    names = emotion_names(rows)
    assert names == ["anger", "fear", "joy"]                                   # also one that is nowhere the largest
    assert emotion_ids(rows, names) == [0, 2, 2, -100]
    assert np.allclose(emotion_targets(rows, names), [[0.6, 0, 0.4], [0, 0, 1], [0, 0.3, 0.7], [-100] * 3])
    assert emotion_targets(rows[1:2], names) == [2]                            # hard labels alone: classes, as ever
    by_order = [Utterance("a", emotion=[0.6, 0, 0.4]), Utterance("b", emotion={"2": 0.9, "0": 0.1}), Utterance("c", emotion=1)]
    assert emotion_names(by_order) == ["0", "1", "2"] and emotion_ids(by_order, names) == [0, 2, 1]
    with pytest.raises(ManifestError, match="m:0: unknown emotion 'anger'; the 2 classes are fear, joy"):
        emotion_ids(rows, ["fear", "joy"])
    with pytest.raises(ManifestError, match="m:7: emotion has 2 shares, but the 3 classes are"):
        emotion_ids([Utterance("a", emotion=[0.5, 0.5], source="m:7")], names)
    with pytest.raises(ManifestError, match="is an index while other rows use names"):
        emotion_names([*rows, by_order[0]])


@pytest.mark.parametrize("options", [{}, dict(weights=[0.5, 2.0, 1.0]), dict(shift=[-1.0, -0.5, -2.0]), dict(gamma=2.0), dict(weights=[0.5, 2.0, 1.0], shift=[-1.0, -0.5, -2.0], gamma=0.5)])
def test_the_soft_loss_is_the_expected_hard_loss(options):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    shares = torch.tensor([[0.6, 0.4, 0], [0, 0, 1], [0.2, 0.3, 0.5], [-100.0] * 3])
    found = emotion_losses(logits, shares, **options)
    every = torch.stack([emotion_losses(logits, torch.full((4,), c), **options) for c in range(3)], 1)
    assert torch.allclose(found, (shares.clamp(min=0) * every).sum(1), atol=1e-6) and found[3] == 0
    assert torch.allclose(found[1], emotion_losses(logits, torch.tensor([0, 2, 0, 0]), **options)[1], atol=1e-6)
    if not options:
        assert torch.allclose(found[:3], F.cross_entropy(logits[:3], shares[:3], reduction="none"), atol=1e-6)      # PyTorch's own
    found.sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[3] == 0).all()


def test_p_scores_reach_the_prominence_loss():
    rows = [dict(audio=np.zeros(1600, np.float32), words=["bra", "ha"], prosody=[0.25, 1], emotion=[0.6, 0.4], row=0),
            dict(audio=np.zeros(1600, np.float32), words=["aane"], prosody=None, emotion=[-100.0, -100.0], row=1)]
    batch = Collator()(rows)
    assert batch["prosody"].tolist() == [[0.25, 1], [-100, -100]] and batch["emotion"].shape == (2, 2)
    loss = _prominence_loss(logits := torch.tensor([[0.3, -1.0], [5.0, 5.0]]), batch["prosody"], 1.0)
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(logits[0], torch.tensor([0.25, 1.0])).item())


def test_classes_are_counted_by_their_shares(corpus):
    rows = [Utterance("train0.wav", emotion=r["emotion"]) for r in SOFT]
    data = SpeechDataset(rows, corpus, emotion_names(rows))
    assert np.allclose(data.class_counts, [0.6, 0.3, 2.1]) and data.emotions == [0, 2, 2]
    assert np.isclose(np.dot(class_weights(data.class_counts), data.class_counts), 3) and np.isclose(np.exp(log_prior([6, 3, 21])).sum(), 1)
    assert SpeechDataset(rows[1:2], corpus, ["fear", "joy"]).class_counts == [0, 1]


def test_scores_take_the_larger_part():
    hard, soft, p = [0, 1, 1], [0.25, 0.75, 1], [0.1, 0.9, 0.4]
    assert prosody_metrics(soft, p) == prosody_metrics(hard, p) == prosody_metrics([0.25, 0.75, 0.5, 1], [0.1, 0.9, 0.6, 0.4])
    assert prosody_metrics([0.5, 0.5], [0.1, 0.9]) == {}                       # nothing is left
    record = dict(id="a", emotion="joy", predicted_emotion="joy", words=["a"] * 4, prosody_annotations=[*soft, 0.5], prominence=[*p, 0.6], emotion_shares={"joy": 0.6, "fear": 0.4})
    found = score([record])
    assert found["ser/soft_n"] == 1 and found["prosody/soft_n"] == 2 and found["prosody/tied_n"] == 1 and found["ser/wa"] == 1 and found["prosody/n"] == 3
    plain = {k: v for k, v in record.items() if k != "emotion_shares"} | dict(words=["a"] * 3, prosody_annotations=hard, prominence=p)
    assert score([plain]) == {k: v for k, v in found.items() if not k.endswith(("soft_n", "tied_n"))}


TIE = {"anger": 0.5, "joy": 0.5}


def record(i, truth, predicted, **more):
    return dict(id=str(i), emotion=truth, predicted_emotion=predicted, speaker=f"s{i}", group=f"s{i}", probabilities={"anger": 0.6, "joy": 0.4}) | more


def test_ties_are_in_no_score_no_floor_and_no_interval(tmp_path):
    """Two listeners, half and half: neither answer is right, so the row counts nowhere, and the reader is told."""
    clear = [record(0, "joy", "joy"), record(1, "anger", "joy"), record(2, "joy", "joy"), record(3, "anger", "anger")]
    tied = [record(4 + i, None, p, emotion_shares=TIE) for i, p in enumerate(("anger", "joy", "joy"))]
    rest = {k: v for k, v in score(clear + tied).items() if k != "ser/tied_n"}
    assert rest == score(clear) and score(clear + tied)["ser/tied_n"] == 3 and score(clear)["ser/n"] == 4
    assert intervals(clear + tied)[0] == intervals(clear)[0] and score(tied) == {"ser/tied_n": 3}
    scores = write_report(tmp_path / "eval", clear + tied, ["anger", "joy"], {})
    assert "ties: 3 utterances have no single most frequent emotion: they are left out of the scores" in (tmp_path / "eval/summary.txt").read_text()
    rows = {r[0]: r[-1] for r in scores.tables["Emotions"][1]}
    assert rows == {"anger": "2", "joy": "2"} and "tie</span> heard as" in card_html(tied[0])
    write_predictions(tmp_path / "old.jsonl", [r | dict(emotion="anger") for r in tied])              # of an earlier version
    assert score(read_predictions(tmp_path / "old.jsonl")) == {"ser/tied_n": 3}


def test_marks_of_one_half_are_in_no_score():
    marks, p = [1, 0, 0.5, 1, 0.5], [0.9, 0.2, 0.9, 0.3, 0.1]
    def rows(keep):
        kept = [i for i in range(5) if keep(marks[i])]
        return [dict(id="a", emotion=None, words=["w"] * len(kept), prosody_annotations=[marks[i] for i in kept], prominence=[p[i] for i in kept])]
    whole, decided = rows(lambda m: True), rows(lambda m: m != 0.5)
    assert score(whole) == score(decided) | {"prosody/tied_n": 2} and intervals(whole)[0] == intervals(decided)[0]
    halves = rows(lambda m: m == 0.5)
    assert score(halves) == {"prosody/tied_n": 2} and intervals(halves)[0] == {} and intervals(whole + halves)[0] == intervals(decided)[0]


def test_the_cure_is_not_to_train_longer():
    """Where all scored rows are of one kind, no training can help."""
    none = dict(prosody_annotations=[0, 0.5, 0.5], prominence=[0.1, 0.2, 0.9], words=["a"] * 3, id="a", emotion=None)
    told, = floor_warnings(score([none]))
    assert "All scored words are not prominent, so no training can help" in told and "2 ties are left out" in told and "Train longer" not in told
    told, = floor_warnings(score([record(0, "joy", "joy"), record(1, "joy", "anger"), record(2, None, "joy", emotion_shares=TIE)]))
    assert "All scored utterances have one emotion" in told and "1 ties are left out" in told
    told, = floor_warnings(score([record(0, "joy", "joy"), record(1, "anger", "joy")]))
    assert "Train longer" in told


def test_a_tie_has_no_class_and_trains(corpus):
    rows = [Utterance("train0.wav", emotion=e, source="m:1") for e in (TIE, "joy", {"joy": 0.9, "anger": 0.1}, [0.5, 0.5], None)]
    rows[3].emotion = {"joy": 0.5, "anger": 0.5}
    assert [u.label for u in rows] == [None, "joy", "joy", None, None] and emotion_ids(rows, ["anger", "joy"]) == [-100, 1, 1, -100, -100]
    data = SpeechDataset(rows, corpus, ["anger", "joy"])
    assert data.targets[0] == data.targets[3] == [0.5, 0.5] and np.allclose(data.class_counts, [1.1, 2.9])
    assert oversampling_counts(data.emotions, targets=data.targets).min() == 1
    with pytest.raises(ManifestError, match="unknown emotion 'bliss'; the 2 classes are anger, joy. .*--emotion_map bliss=OURS"):
        emotion_ids([Utterance("a", emotion={"bliss": 0.5, "joy": 0.5})], ["anger", "joy"])
    with pytest.raises(ManifestError, match="is an index while other rows use names"):                # ties alone tell it, too
        emotion_names([Utterance("a", emotion=TIE), Utterance("b", emotion=[0.5, 0.5])])
    assert emotion_names([rows[0]]) == ["anger", "joy"] and not can_be_scored([rows[0]], "ser/ua")


def test_the_audit_counts_ties():
    words = dict(words=["a", "b"], prosody_annotations=[0.5, 1])
    train = [Utterance(f"{i}.wav", emotion=e, source=f"train:{i}", **words) for i, e in enumerate((TIE, TIE, "joy", "anger", {"fear": 0.5, "joy": 0.5}, {"fear": 0.5, "joy": 0.5}, None))]
    found = {f.check: f for f in audit(dict(train=train))}
    assert found["class counts"].examples == ["train: joy 1 (50 %), anger 1 (50 %); ties 4; without a label 1"] and found["class counts"].count == 6
    assert found["tied emotions"].count == 4 and "train:0: ['anger', 'joy'], with equal shares" in found["tied emotions"].examples
    assert found["tied words"].count == 7 and found["tied words"].examples[0] == "train:0: 1 of 2 words"
    assert "100.0 % of the words are prominent" in found["prominence"].examples[0]
    assert "rare classes" not in found                                         # fear has two halves
    table = describe({"train": train}, ["anger", "fear", "joy"])
    assert "(tie)" in table and "ties: 4 utterances have no single most frequent emotion, 7 words were marked by exactly half of the listeners: they train, and are left out of the scores" in table
    assert [line.split()[-1] for line in table.splitlines() if line.startswith(("(tie)", "(no emotion)"))] == ["4", "1"]


def test_describe_and_audit_know_them(corpus):
    rows = [Utterance("a.wav", r.get("words"), r.get("prosody_annotations"), r["emotion"]) for r in SOFT]
    table = describe({"train": rows}, emotion_names(rows))
    assert "67 %" in table and "2 soft labels: counted as the emotion with the largest share" in table
    val = [Utterance("v.wav", emotion={"joy": 0.9, "bliss": 0.1}, source="val:1")]
    assert any(f.check == "unknown labels" and "bliss" in str(f.examples) for f in audit(dict(train=rows, val=val)))


def test_a_training_learns_from_them(corpus, tmp_path, command):
    """From soft manifests to a report that says how it was scored, with every correction for rare classes."""
    for split in ("train", "val", "test"):
        rows = read(corpus / f"{split}.jsonl")
        for r in rows[::2]:
            r["emotion"] = {r["emotion"]: 0.8, ({"anger": "joy", "joy": "anger"})[r["emotion"]]: 0.2}
            r["prosody_annotations"] = [0.9 if m else 0.1 for m in r["prosody_annotations"]]
        write(tmp_path / f"{split}.jsonl", rows)
    given = [x for s in ("train", "val", "test") for x in (f"--{s}_jsonl", tmp_path / f"{s}.jsonl")]
    code, out = command("train", *given, "--audio_base_path", corpus, "--tokenizer_path", tmp_path / "run/tok.model", "--save_dir", tmp_path / "run", "--backbone", "tiny",
                        "--tokenizer_type", "char", "--vocab_size", 30, "--num_epochs", 2, "--batch_size", 4, "--gradient_accumulation_steps", 1, "--num_workers", 0,
                        "--class_weights", "balanced", "--focal_gamma", 1, "--balanced_sampling", 1, "--checkpoint_interval", 0)
    assert code == 0, out
    scores = json.loads((tmp_path / "run/test/test_metrics.json").read_text())
    assert scores["ser/soft_n"] == 3 and scores["prosody/soft_n"] > 0
    assert "soft labels: 3 utterances are scored by their largest share" in (tmp_path / "run/test/summary.txt").read_text()
    assert {"emotion_shares" in r for r in read(tmp_path / "run/test/predictions.jsonl")} == {True, False}


def halves(corpus, folder, tied):
    """The corpus where two listeners have heard each other thing: in rows for which tied holds."""
    for split in ("train", "val", "test"):
        rows = read(corpus / f"{split}.jsonl")
        for i, r in enumerate(rows):
            if tied(split, i):
                r["emotion"] = {"anger": 0.5, "joy": 0.5}
                r["prosody_annotations"] = [0.5] * len(r["words"])
        write(folder / f"{split}.jsonl", rows)
    given = [x for s in ("train", "val", "test") for x in (f"--{s}_jsonl", folder / f"{s}.jsonl")]
    return ["train", *given, "--audio_base_path", corpus, "--save_dir", folder / "run", "--backbone", "tiny", "--tokenizer_type", "char", "--vocab_size", 30,
            "--num_epochs", 1, "--batch_size", 4, "--gradient_accumulation_steps", 1, "--num_workers", 0, "--checkpoint_interval", 0]


def test_a_training_uses_ties_and_its_scores_do_not(corpus, tmp_path, command):
    given = halves(corpus, tmp_path, lambda split, i: i % 3 == 0)
    code, out = command(*given, "--class_weights", "balanced", "--balanced_sampling", 1, "--logit_adjustment", 1)
    assert code == 0, out
    scores, rows = json.loads((tmp_path / "run/test/test_metrics.json").read_text()), read(tmp_path / "run/test/predictions.jsonl")
    tied = [r for r in rows if r["emotion"] is None]
    assert scores["ser/tied_n"] == len(tied) > 0 and scores["ser/n"] == len(rows) - len(tied) and scores["prosody/tied_n"] == sum(len(r["words"]) for r in tied)
    assert "no single most frequent emotion" in out and "they train, and are left out of the scores" in out


def test_a_validation_of_ties_alone_is_refused(corpus, tmp_path, command):
    given = halves(corpus, tmp_path, lambda split, i: split == "val")
    code, out = command(*given)
    assert code and "val.jsonl: no score of the emotion head can be computed: all its labels are ties" in out, out


def test_a_class_that_nobody_chose_is_rare_and_a_row_is_counted_once():
    """A list names all classes, also those of share 0; a tie with an unknown name is wrong, not both wrong and a tie."""
    def findings(names=None, **splits):
        made = {s: [Utterance(f"{s}{i}.wav", emotion=e, source=f"{s}:{i}") for i, e in enumerate(rows)] for s, rows in splits.items()}
        return {f.check: f for f in audit(made, names=names)}
    found = findings(["a", "b", "c"], train=[[1, 0, 0], [0, 1, 0]] * 2, val=[[1, 0, 0], [0, 1, 0]])
    assert "train: no c" in found["rare classes"].examples
    found = findings(train=["anger", "joy"] * 4, val=[{"anger": .5, "joyy": .5}, "joy"])["class counts"]
    assert (found.count, found.total) == (10, 10) and not any("-1" in line for line in found.examples), found
