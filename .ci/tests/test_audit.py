"""The audit on the real manifests, and on manifests that training refuses."""
import warnings

import pytest
from conftest import SHARED, needs, read, write

from prosody_ser import audit as audit_module
from prosody_ser.audit import audit_manifests, exit_code, fix_manifest, report
from prosody_ser.data import read_manifest
from prosody_ser.tokenizer import SentencePieceTokenizer

AKAN, EMODB = SHARED / "data" / "akan", SHARED / "data" / "emodb2s"


@pytest.fixture(scope="module")
def akan():
    """Findings on the Akan manifests, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = SentencePieceTokenizer(model_path=AKAN / "akan_mtl_tokenizer.model", vocab_size=16000).load_tokenizer()
    _, findings = audit_manifests([AKAN / "train.jsonl", AKAN / "val.jsonl"], tokenizer=tokenizer, names=["akan"])
    return {f.check: f for f in findings}


@needs(AKAN)
def test_akan_lengths_and_overlap(akan):
    """Median lengths, rows over 30 s and overlapping neighbours are those of the files' names."""
    train, val = akan["durations"].examples[:2]
    assert train.startswith("train: 4483 utterances") and "median 3.5 s" in train
    assert val.startswith("val: 931 utterances") and "median 5.5 s" in val
    long = {s: sum(_seconds(u) > 30 for u in read_manifest(AKAN / f"{s}.jsonl")) for s in ("train", "val")}
    assert akan["long"].count == sum(long.values()) and "short" not in akan
    assert "train 77 %" in akan["overlap"].what and "overlap across splits" not in akan


def _seconds(u):
    """Length by the file's name, counted apart from the audit."""
    start, end = u.audio_filepath.removesuffix(".wav").split("_")[-2:]
    return (int(end) - int(start)) / 1000


@needs(AKAN)
def test_akan_labels(akan):
    """Half of training is neutral, confusion and frustration have one row, a third of the words is prominent."""
    counts, rates = akan["class counts"].examples, akan["prominence"].examples
    assert "neutral 2239 (50 %)" in counts[0] and "confusion 1 " in counts[0] and "frustration 1 " in counts[0]
    assert sorted(e.rsplit(" ", 1)[1] for e in akan["rare classes"].examples) == ["confusion", "frustration"]
    assert rates[0].startswith("train: 32.0 %") and "label shift" in akan


@needs(AKAN)
def test_akan_words_and_leaks(akan):
    """Marks in words, more pieces than words, sequels on two sides."""
    assert akan["annotation marks"].count == 19
    assert akan["vocabulary"].total == 16000 and "for 6459 different words" in akan["vocabulary"].examples[0]
    assert akan["sequels"].count == 2 and "nti_bosom_wo_nkwa_2" in akan["sequels"].examples[1] and "obi_nteasea_part_4" in akan["sequels"].examples[0]
    assert not {"straddling groups", "same audio across splits", "repeated rows"} & set(akan)
    if (AKAN / "test.jsonl").exists():
        findings = {f.check: f for f in audit_manifests([AKAN / f"{s}.jsonl" for s in ("train", "val", "test")], names=["akan"])[1]}
        assert "test: 725 utterances" in findings["durations"].examples[2] and "anger" in findings["label shift"].examples[-1]


@needs(AKAN)
def test_akan_fixed(akan, tmp_path):
    """The fixes leave no mark, no stand-in and no white space, and every row and prominence mark that was not an empty word."""
    before = {s: read_manifest(AKAN / f"{s}.jsonl") for s in ("train", "val")}
    for s in before:
        fix_manifest(AKAN / f"{s}.jsonl", tmp_path / f"{s}.jsonl", [u for us in before.values() for u in us])
    splits, findings = audit_manifests([tmp_path / "train.jsonl", tmp_path / "val.jsonl"], names=["akan"])
    assert not {"annotation marks", "confusable letters", "white space"} & {f.check for f in findings}
    for s, rows in before.items():
        assert [(u.audio_filepath, u.prosody_annotations) for u in rows] == [(u.audio_filepath, u.prosody_annotations) for u in splits[s]]


@needs(EMODB)
def test_emodb_is_speaker_disjoint():
    """The Berlin splits share sentences and no speaker."""
    found = {f.check: f for f in audit_manifests([EMODB / f"{s}.jsonl" for s in ("train", "val", "test")], names=["emodb"])[1]}
    assert not {"straddling groups", "sequels", "overlap", "unknown groups"} & set(found)
    assert found["same text across splits"].count > 50


def test_wrong_rows_do_not_stop_the_audit(corpus, tmp_path):
    """Every wrong row is named, the others are audited, and the fix copies wrong rows as they are."""
    rows = read(corpus / "train.jsonl")
    rows[3]["prosody_annotations"], rows[5]["words"] = [1], "bra"
    manifest = write(tmp_path / "train.jsonl", rows)
    splits, findings = audit_manifests([manifest, corpus / "val.jsonl"], audio_base_path=corpus)
    found = {f.check: f for f in findings}
    assert [len(us) for us in splits.values()] == [10, 6] and exit_code(findings) == 1
    assert found["length mismatch"].examples[0].startswith(f"{manifest}:4") and found["rows: words"].examples[0].startswith(f"{manifest}:6")
    assert "audio" not in found and f"{manifest}:4" in report(findings)
    assert fix_manifest(manifest, tmp_path / "fixed.jsonl") == {"wrong rows left": 2}
    assert read(tmp_path / "fixed.jsonl") == rows


def test_speakers_from_names(corpus, tmp_path):
    """Speakers in file names alone are found in two splits, and written down."""
    from prosody_ser.cli import main
    for s in ("train", "val"):
        rows = [{k: v for k, v in u.items() if k != "speaker"} | dict(audio_filepath=f"spk{i % 2}_{s}{i}.wav") for i, u in enumerate(read(corpus / f"{s}.jsonl"))]
        write(tmp_path / f"{s}.jsonl", rows)
    files = [str(tmp_path / f"{s}.jsonl") for s in ("train", "val")]
    silent, told = ({f.check: f for f in audit_manifests(files, speaker=pattern)[1]} for pattern in (None, "(?P<speaker>spk[0-9])_"))
    assert "unknown groups" in silent and "straddling groups" not in silent
    assert told["straddling groups"].count == 2 and "speaker spk0 is also in train" in told["straddling groups"].examples[0]
    with pytest.raises(SystemExit):
        main(["audit", *files, "--speaker", "(?P<speaker>spk[0-9])_", "--fix", str(tmp_path / "out")])
    assert {u.speaker for u in read_manifest(tmp_path / "out/train.jsonl")} == {"spk0", "spk1"}


def _said(*splits):
    """Findings of splits of (path, more fields), and what the card says of them."""
    from prosody_ser.data import Utterance
    from prosody_ser.hub import _disjoint
    named = {s: [Utterance(path, source=f"{s}:{i}", **more) for i, (path, more) in enumerate(rows, 1)] for s, rows in zip(("train", "val", "test"), splits, strict=False)}
    return {f.check: f for f in audit_module.audit(named)}, _disjoint(named)


def test_some_rows_without_a_speaker():
    """Rows without a speaker beside rows with one are told by the audit and by the card, in one folder and without any."""
    for folder in ("", "wav/"):
        splits = [[(f"{folder}{s}{i}.wav", dict(speaker=None if i == 0 else f"{s}{i}")) for i in range(4)] for s in ("a", "b", "c")]
        found, card = _said(*splits)
        lost = found["unknown speakers"]
        assert (lost.severity, lost.count, lost.total) == ("warning", 3, 12) and "train 25 %, val 25 %" in lost.what and "--speaker" in lost.cure
        assert lost.examples[0] == "train:1: no speaker" and not {"straddling groups", "unknown groups"} & set(found)
        assert card.startswith("Of 3 of 12 rows the speaker is not known") and "Of the others: no speaker or film stands in two splits." in card
    whole = [[(path, dict(speaker="x" + path)) for path, _ in rows] for rows in splits]
    found, card = _said(*whole)
    assert "unknown speakers" not in found and card == "No speaker or film stands in two splits."
    found, card = _said([("a.wav", {}), ("b.wav", {})], [("c.wav", {})])
    assert found["unknown groups"].count == 3 and "unknown speakers" not in found and "stands in two splits" not in card and card.startswith("Of 3 of 3 rows")


def test_the_card_knows_the_films_that_the_audit_knows():
    """Recordings that are cut by start and end, or by the names of their files, are films: audit and card agree."""
    by_fields = [[(f"audio/film{i % 4}.wav", dict(start=10. * (4 * s + i), end=10. * (4 * s + i) + 3)) for i in range(8)] for s in range(2)]
    by_names = [[(f"audio/film{i % 4}_{100000 * s + 4000 * i}_{100000 * s + 4000 * i + 3000}.wav", {}) for i in range(8)] for s in range(2)]
    for splits in (by_fields, by_names):
        found, card = _said(*splits)
        assert (found["straddling groups"].count, found["straddling groups"].total) == (4, 4) and "**Beware**: 4 speakers or films stand in two splits" in card
        disjoint = [[row for rows in splits for row in rows if ("film0" in row[0]) == first] for first in (True, False)]
        found, card = _said(*disjoint)
        assert "straddling groups" not in found and card == "The manifests name no speakers; no film (recording, or folder) stands in two splits."


def test_films_of_two_corpora():
    """The only folder of a corpus is no film, whatever the other corpus has; films of one name in two corpora are two."""
    flat = [(f"{c}/wav/{i}.wav", dict(corpus=c)) for c in "ab" for i in range(4)]
    found, card = _said(flat[::2], flat[1::2])
    assert "straddling groups" not in found and found["unknown groups"].count == 8 and card.startswith("Of 8 of 8 rows")
    kae = [(f"{c}/kae_{i}000_{i}900.wav", dict(corpus=c)) for c in "ab" for i in range(4)]
    found, card = _said(kae[:4], kae[4:])
    assert not {"straddling groups", "overlap across splits"} & set(found) and "no film" in card
