"""Several corpora in one run: rows, speakers and paths of each are its own, scores are told apart, one manifest is as it ever was."""
import json
import re
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from conftest import read, write, write_corpus

from prosody_ser.audit import audit_manifests
from prosody_ser.batches import SpeechDataset, corpus_places, drawn_counts, groups_of_splits, train_batches
from prosody_ser.config import ConfigError, EvaluateConfig, TrainConfig
from prosody_ser.corpora import corpora_text, corpus_name, corpus_scores, names_apart, own_map, read_splits, row_digests
from prosody_ser.data import Utterance, groups_of, read_manifest, rows_digest, speaker_folds, straddling_groups
from prosody_ser.evaluate import players
from prosody_ser.evaluation import intervals, paired_difference, score
from prosody_ser.run import Run
from prosody_ser.text import ManifestError
from prosody_ser.train import _emotion_loss_options, build_model, run_training, train

SPLITS = "train", "val", "test"
SMALL = dict(backbone="tiny", tokenizer_type="char", vocab_size=30, num_epochs=2, batch_size=4, gradient_accumulation_steps=1, num_workers=0, checkpoint_interval=0)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two corpora with files, ids and speakers of the same names; the second says angry, and has no word marked."""
    root = tmp_path_factory.mktemp("two")
    for name in ("akan", "emodb"):
        write_corpus(root / name)
    for split in SPLITS:
        rows = read(root / f"emodb/{split}.jsonl")
        for r in rows:
            r["emotion"] = r["emotion"].replace("anger", "angry")
            del r["prosody_annotations"]
        write(root / f"emodb/{split}.jsonl", rows)
    return root


def settings(two, **more):
    """Of a run on both."""
    given = {f"{s}_jsonl": [str(two / f"{c}/{s}.jsonl") for c in ("akan", "emodb")] for s in SPLITS}
    return given | dict(audio_base_path=[str(two / "akan"), str(two / "emodb")], emotion_map="angry=anger") | more


@pytest.mark.parametrize(("path", "name"), [("emodb_train.jsonl", "emodb"), ("emodb/train.jsonl", "emodb"), ("emodb/Dev.jsonl", "emodb"), ("test-emodb.v2.jsonl", "emodb_v2"), ("emo-db.jsonl", "emo-db"), ("x/emodb.jsonl", "emodb")])
def test_the_name_of_a_corpus_is_the_same_in_all_splits(path, name):
    assert corpus_name(path) == name


def test_rows_speakers_and_paths_of_each(two):
    splits = read_splits(TrainConfig(**settings(two)))
    rows = splits["train"]
    assert [u.corpus for u in rows] == ["akan"] * 12 + ["emodb"] * 12 and {u.emotion for u in rows} == {"anger", "joy"}
    assert {u.speaker for u in rows} == {"akan/train0", "akan/train1", "emodb/train0", "emodb/train1"}
    assert rows[0].audio_filepath == str(two / "akan/train0.wav") and rows[12].audio_filepath == str(two / "emodb/train0.wav")
    assert straddling_groups(splits) == []
    own = [r | dict(corpus="mine") for r in read(two / "akan/train.jsonl")]
    mine = write(two / "akan/x_train.jsonl", own)
    found = read_splits(TrainConfig(**settings(two, train_jsonl=[str(mine), str(two / "emodb/train.jsonl")])))["train"]
    assert {u.corpus for u in found} == {"mine", "emodb"} and found[0].speaker == "mine/train0"


def test_a_leak_within_a_corpus_is_still_one(two):
    """The same person under one name in two splits of one corpus; the manifest of one split alone is read by the same rule."""
    test = write(two / "akan_test.jsonl", [r | dict(speaker="train0") for r in read(two / "akan/test.jsonl")])
    splits = read_splits(TrainConfig(**settings(two, test_jsonl=str(test), audio_base_path=str(two))))
    assert straddling_groups(splits) == ["akan/train0"]
    other = write(two / "ravdess.jsonl", read(two / "akan/test.jsonl"))
    splits = read_splits(TrainConfig(**settings(two, test_jsonl=str(other), audio_base_path=str(two))))
    assert "beware: nothing of the corpus ravdess (test) is trained on" in corpora_text(splits)


def test_one_manifest_is_as_it_ever_was(two):
    """No corpus, no prefix, the same digest; and a list of one is that one."""
    config = TrainConfig(**{f"{s}_jsonl": [str(two / f"akan/{s}.jsonl")] for s in SPLITS}, audio_base_path=[str(two / "akan")])
    assert config.train_jsonl == str(two / "akan/train.jsonl") and config.audio_base_path == str(two / "akan")
    rows = read_splits(config)["train"]
    assert rows == read_manifest(two / "akan/train.jsonl") and rows[0].speaker == "train0" and rows[0].corpus is None
    assert set(row_digests(config, dict(train=rows))) == {"the rows of train_jsonl", "the audio files of train_jsonl"}
    assert rows_digest([Utterance("a.wav", corpus="x")]) == rows_digest([Utterance("a.wav")])


def test_what_cannot_be_meant(two, tmp_path):
    """One sentence each with the cure."""
    def told(error, **more):
        with pytest.raises(error) as e:
            read_splits(TrainConfig(**settings(two, **more)))
        return str(e.value)
    assert "names 3 folders, --train_jsonl 2 manifests" in told(ConfigError, audio_base_path=["a", "b", "c"])
    assert "--val_jsonl 1 manifests" in told(ConfigError, val_jsonl=str(two / "akan/val.jsonl"))
    assert "twice. Name it once" in told(ConfigError, train_jsonl=[str(two / "akan/train.jsonl")] * 2)
    assert "--stage_dir copies what is in one folder" in told(ConfigError, stage_dir=str(tmp_path))
    assert "no row has the emotion 'sad'" in told(ManifestError, emotion_map="sad=sadness")
    twin = write(tmp_path / "akan_train.jsonl", read(two / "akan/train.jsonl"))
    assert "would both be the corpus 'akan', but their audio lies in two folders" in told(ConfigError, train_jsonl=[str(two / "akan/train.jsonl"), str(twin)])
    numbers = [write(tmp_path / f"{c}.jsonl", [r | dict(emotion=1) for r in read(two / f"{c}/train.jsonl")]) for c in ("akan", "emodb")]
    more = dict(train_jsonl=[*map(str, numbers)], emotion_map=None)
    assert "is an index, and corpora may number their emotions each in its way" in told(ManifestError, **more)
    assert read_splits(TrainConfig(**settings(two, **more, emotion_names=["anger", "joy"])))
    mixed = dict(train_jsonl=[str(numbers[0]), str(two / "emodb/train.jsonl")])
    assert "is an index" in told(ManifestError, **mixed)


def test_films_are_told_apart_within_each_corpus():
    """Speakerless rows of two corpora: a film is a folder within its corpus, and a corpus in one folder has none."""
    films = [Utterance(f"/x/{c}/{f}/{i}.wav", corpus=c) for c in "ab" for f in ("one", "two") for i in range(2)]
    assert groups_of(films) == ["a: one"] * 2 + ["a: two"] * 2 + ["b: one"] * 2 + ["b: two"] * 2
    assert groups_of(films[:4]) == ["one"] * 2 + ["two"] * 2
    flat = [Utterance(f"/x/{c}/{i}.wav", corpus=c) for c in "ab" for i in range(4)]
    assert straddling_groups(dict(train=flat[::2], test=flat[1::2])) == []
    assert straddling_groups(dict(train=films[::2], test=flat[4:6] + films[1:2])) == ["a: one"]


@pytest.fixture(scope="module")
def run(two, tmp_path_factory):
    """A run on both."""
    given = settings(two)
    splits = [[Path(p) for p in given.pop(f"{s}_jsonl")] for s in SPLITS]
    return train(*splits, save_dir=tmp_path_factory.mktemp("run") / "both", **given, **SMALL)


def test_a_run_tells_the_scores_of_each(run):
    records = run.predictions()
    assert [r["corpus"] for r in records] == ["akan"] * 6 + ["emodb"] * 6 and records[0]["speaker"] == "akan/test0"
    found = json.loads((run.test_folder / "eval_config.json").read_text())["corpora"]
    assert list(found) == ["akan", "emodb"] and found["akan"]["n"] == 6 and "prosody/f1" not in found["emodb"]
    assert found == json.loads(json.dumps(corpus_scores(records))) and "ser/ua_low" in found["akan"]
    summary = (run.test_folder / "summary.txt").read_text()
    assert re.search(r"\nemodb +6 ", summary) and f"(floor {found['emodb']['ser/ua_floor']:.3f})" in summary
    assert "<h2>Corpora</h2>" in (run.test_folder / "report.html").read_text()
    assert all("<audio" in html for html in players(records, run.audio_folder))           # the sound of both is found


def test_it_is_resumed_and_read(run, two, tmp_path):
    """The settings stand in the folder as they were given; other rows are noticed; audio may move."""
    kept = json.loads(run.settings_file.read_text())
    assert kept["train_jsonl"] == settings(two)["train_jsonl"] and kept["emotion_map"] == "angry=anger"
    config = Run(run.folder).config
    assert run.is_finished_with(config) and run.changed_settings(config) == []
    (tmp_path / "moved").symlink_to(two)
    assert run.changed_inputs(TrainConfig(**vars(config) | dict(audio_base_path=[str(tmp_path / "moved" / c) for c in ("akan", "emodb")]))) == []
    others = [str(two / "emodb/train.jsonl"), str(two / "akan/train.jsonl")]
    assert "the rows of train_jsonl" in run.changed_inputs(TrainConfig(**vars(config) | dict(train_jsonl=others, audio_base_path=settings(two)["audio_base_path"][::-1], val_jsonl=config.val_jsonl[::-1], test_jsonl=config.test_jsonl[::-1])))
    with pytest.raises(ConfigError, match="trained on several corpora: give audio_base_path"):
        run.evaluate(two / "akan/test.jsonl")


def test_a_run_is_evaluated_on_several(run, two, tmp_path):
    """Files with a folder each, under the run's own emotion_map; the same scores as of the test after training. Rows get names, too, and stay as they were."""
    given = settings(two)
    found = run.evaluate(given["test_jsonl"], given["audio_base_path"], tmp_path / "report", device="cpu")
    known = json.loads((run.test_folder / "test_metrics.json").read_text())
    assert found["ser/ua"] == known["ser/ua"] and set(found.settings["corpora"]) == {"akan", "emodb"}
    foreign = read_manifest(two / "emodb/test.jsonl")
    alone = run.evaluate(foreign, two / "emodb", tmp_path / "alone", device="cpu")
    assert alone["ser/ua"] == found.settings["corpora"]["emodb"]["ser/ua"] and {u.emotion for u in foreign} == {"angry", "joy"}
    with pytest.raises(ManifestError, match="angry"):
        run.evaluate(foreign, two / "emodb", tmp_path / "no", device="cpu", emotion_map="")


def test_evaluate_renames(run, two, tmp_path, command):
    """Without --emotion_map the run's own holds, and is told; away from its run, or without it, the foreign name is refused."""
    how = ["--test_jsonl", two / "emodb/test.jsonl", "--audio_base_path", two / "emodb", "--device", "cpu", "--output_dir"]
    base = ["evaluate", "--checkpoint_path", run.best_model, *how]
    code, out = command(*base, tmp_path / "a")
    assert code == 0 and "emotions renamed as in the run's training: angry=anger" in out, out
    code, out = command(*base, tmp_path / "b", "--emotion_map", "angry=anger")
    assert code == 0 and "as in the run's training" not in out, out
    assert (tmp_path / "a/test_metrics.json").read_text() == (tmp_path / "b/test_metrics.json").read_text()
    code, out = command(*base, tmp_path / "c", "--emotion_map", "")
    assert code and "unknown emotion 'angry'" in out and "--emotion_map angry=OURS" in out
    copytree(run.best_model, tmp_path / "alone/best_model")
    code, out = command("evaluate", "--checkpoint_path", tmp_path / "alone/best_model", *how, tmp_path / "d")
    assert code and "--emotion_map angry=OURS" in out


def test_a_run_renames_only_what_its_model_does_not_know(two, tmp_path):
    """A class of the model keeps its name, also where the run's map would change it: anger stays anger."""
    (tmp_path / "train_config.json").write_text(json.dumps(dict(emotion_map="anger=joy,angry=anger,bored=,sad=joy")))
    rows = [Utterance("a", emotion=e) for e in ("anger", "Angry", {"bored": 0.5, "joy": 0.5})]
    config = EvaluateConfig(checkpoint_path=str(tmp_path / "best_model"), audio_base_path="", test_jsonl="")
    assert own_map(config, rows, ["anger", "joy"])[0] == "angry=anger,bored="
    assert own_map(config, rows[:1], ["anger", "joy"]) == (None, {}) and own_map(config, rows, ()) == (None, {})
    config.emotion_map = ""
    assert own_map(config, rows, ["anger", "joy"]) == ("", {})


def test_corpora_with_no_name_in_common_are_told(two, tmp_path, command):
    """Before training and by the audit, with the flag that mends it; not with it, and not where one name is shared."""
    from prosody_ser.train import load_splits
    files = [two / f"{c}/{s}.jsonl" for s in SPLITS for c in ("akan", "emodb")]
    for f in files:
        rows = read(f)
        (tmp_path / f.relative_to(two)).parent.mkdir(exist_ok=True)
        write(tmp_path / f.relative_to(two), [r | dict(emotion={"joy": "happy"}.get(r["emotion"], r["emotion"])) if "emodb" in str(f) else r for r in rows])
    files = [tmp_path / f.relative_to(two) for f in files]
    bases = [two / "akan", two / "emodb"]
    command_line = ["audit", *files, "--audio_base_path", *bases * 3]
    code, out = command(*command_line)
    assert "emotions named apart: 1 of 1 pairs of corpora" in out and "akan (anger, joy) and emodb (angry, happy)" in out and "--emotion_map angry=anger,happy=joy" in out
    code, out = command(*command_line, "--emotion_map", "angry=anger,happy=joy")
    assert "emotions named apart" not in out and "emotion_map" not in out
    code, out = command(*command_line, "--emotion_map", "sad=anger")
    assert code and "--emotion_map sad=anger: no row has the emotion 'sad'" in out
    given = {f"{s}_jsonl": [str(tmp_path / f"{c}/{s}.jsonl") for c in ("akan", "emodb")] for s in SPLITS}
    config = TrainConfig(**settings(two, **given, emotion_map=None), save_dir=str(tmp_path / "run"))
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prosody_ser.train.log_main", told.append)
        load_splits(config)
    assert any("warning: emotions named apart: 1 of 1 pairs" in t for t in told)
    assert names_apart(read_splits(TrainConfig(**settings(two)))["train"]) == ([], 1)


def test_names_that_begin_alike_are_told_although_others_are_shared():
    """neutral in both corpora does not hide that one says anger and the other angry."""
    def rows(**corpora):
        return [Utterance("a.wav", emotion=e, corpus=c) for c, names in corpora.items() for e in names.split()]
    pairs, n = names_apart(rows(nemo="neutral anger sadness", ravdess="neutral angry calm"))
    assert n == 1 and pairs == ["nemo (anger, neutral, sadness) and ravdess (angry, calm, neutral)"]
    assert names_apart(rows(nemo="neutral anger", ravdess="neutral anger calm")) == ([], 1)


def test_a_foreign_name_in_a_split_is_told_with_the_right_cure(two, tmp_path, command):
    files = two / "akan/train.jsonl", two / "emodb/val.jsonl"
    code, out = command("audit", *files)
    assert "unknown labels" in out and "--emotion_map THEIRS=OURS" in out and "--emotion_names" not in out
    code, out = command("audit", *files, "--emotion_map", "angry=anger")
    assert "unknown labels" not in out


def test_audit_of_corpora_with_a_folder_each(two):
    """Files of one name in two folders are two, and so are speakers; a wrong number of folders is refused."""
    files = [str(two / f"{c}/{s}.jsonl") for c in ("akan", "emodb") for s in SPLITS]
    bases = [str(two / c) for c in ("akan", "emodb") for _ in SPLITS]
    splits, found = audit_manifests(files, audio_base_path=bases)
    assert {s: len(us) for s, us in splits.items()} == dict(train=24, val=12, test=12)
    assert {u.speaker for u in splits["train"]} == {f"{c}/train{i}" for c in ("akan", "emodb") for i in (0, 1)}
    assert not {"straddling groups", "unknown labels"} & {f.check for f in found}
    same, leaks = audit_manifests(files, audio_base_path=str(two / "akan"))                # one folder: each file is a split
    assert len(same) == 6 and "straddling groups" in {f.check for f in leaks}
    with pytest.raises(ConfigError, match="names 2 folders, the call 6 manifests"):
        audit_manifests(files, audio_base_path=[bases[0], bases[-1]])
    named = audit_manifests(files, audio_base_path=bases, speaker="(?P<speaker>train)")[0]["train"]
    assert named[0].speaker == "akan/train0"                                               # one that is given stays


def test_the_commands_take_them(run, two, tmp_path, command):
    """Evaluation of both, and the card of the model."""
    given = settings(two)
    plain = write(tmp_path / "emodb.jsonl", [r | dict(emotion="anger") for r in read(two / "emodb/test.jsonl")])         # half of them wrong
    code, out = command("evaluate", "--checkpoint_path", run.best_model, "--test_jsonl", given["test_jsonl"][0], plain, "--audio_base_path", *given["audio_base_path"], "--output_dir", tmp_path / "eval", "--device", "cpu")
    assert code == 0, out
    assert {r["corpus"] for r in read(tmp_path / "eval/predictions.jsonl")} == {"akan", "emodb"}
    assert "<audio" in (tmp_path / "eval/report.html").read_text()
    with pytest.raises(ConfigError, match="names 2 folders, --test_jsonl 1 manifests"):
        EvaluateConfig(checkpoint_path="x", test_jsonl="t", audio_base_path=["a", "b"])
    code, out = command("publish", run.folder, "me/two", "--dry_run", tmp_path / "card")
    assert code == 0, out
    card = (tmp_path / "card/README.md").read_text()
    assert "No speaker or film stands in two splits." in card and str(two) not in card


def test_the_film_of_a_row_is_that_among_all_rows(run, two, tmp_path):
    """Not that among the rows of its batch, where another folder may be the first that differs."""
    rows = []
    for film in ("one", "two"):
        (tmp_path / film / "wav").mkdir(parents=True)
        for i in range(2):
            (tmp_path / film / f"wav/{i}.wav").write_bytes((two / f"akan/test{i}.wav").read_bytes())
            rows.append(Utterance(f"{film}/wav/{i}.wav", emotion="joy"))
    found = run.evaluate(rows, tmp_path, tmp_path / "out", batch_size=1, device="cpu")
    assert [r["group"] for r in found.records] == ["one", "one", "two", "two"]


def test_smaller_corpora_more_often():
    """Shares of n ** (1 / T), an epoch as long as ever; all rows are heard in turn, however unlike; the same in all processes."""
    corpora, seconds = ["a"] * 900 + ["b"] * 100 + [None] * 24, np.random.default_rng(0).uniform(1, 9, 1024)
    for temperature in (1, 2, 4, 1e9):
        places = corpus_places(corpora, seconds, temperature)
        weights = np.array([900, 100, 24]) ** (1 / temperature)
        counts = [sum(corpora[p[0]] == c for p in places) for c in ("a", "b", None)]
        assert sum(counts) == 1024 and np.abs(counts - 1024 * weights / weights.sum()).max() <= 1, temperature
        assert all(len({corpora[i] for i in p}) == 1 and seconds[p[0]] == max(seconds[p]) for p in places)
        turns = max(map(len, places))
        assert {p[e % len(p)] for e in range(turns) for p in places} == set(range(1024)) and (temperature > 1 or turns == 1)


def test_epochs_by_temperature(two):
    """By the sampler of training: the same again after a resume, other rows in the next epoch, no batch over its limit; with other speeds, too."""
    rows = read_splits(TrainConfig(**settings(two)))["train"][:15]                      # 12 and 3
    data = SpeechDataset(rows, "", ["anger", "joy"])
    def epoch(e, world=1, **more):
        config = TrainConfig(**settings(two, corpus_temperature=1e6, batch_size=4, max_batch_seconds=3.5, **more))
        return [list(train_batches(data, config, 4, seed=1, epoch=lambda: e, world=world, rank=r)) for r in range(world)]
    first, = epoch(0)
    assert epoch(0) == [first] and epoch(1)[0] != first and len(epoch(1)[0]) == len(first)
    assert sum(i < 12 for b in first for i in b) == 8 and {i for e in (0, 1) for b in epoch(e)[0] for i in b} == set(range(15))
    assert all(len(b) * data.seconds[b].max() <= 3.5 for e in (0, 1) for b in epoch(e)[0])
    assert sorted(i for e in epoch(0, 2) for b in e for i in b) == sorted(i for b in first for i in b) or len(first) % 2
    assert [[i for i, _ in b] for b in epoch(0, speed_perturb=0.1)[0]] and {s for b in epoch(0, speed_perturb=0.1)[0] for _, s in b} <= {0.9, 1.0, 1.1}


def test_temperature_needs_corpora(two, tmp_path):
    """Refused where there is one, below 1, and together with the sampling of emotions; trained where there are two."""
    one = {f"{s}_jsonl": str(two / f"akan/{s}.jsonl") for s in SPLITS} | dict(audio_base_path=str(two / "akan"), corpus_temperature=2.0)
    with pytest.raises(ConfigError, match="the training rows are of one. Name several manifests"):
        run_training(TrainConfig(**one, save_dir=str(tmp_path / "one"), **SMALL))
    with pytest.raises(ConfigError, match="draws by emotion, --corpus_temperature by corpus. Choose one"):
        TrainConfig(**one, balanced_sampling=1.0)
    with pytest.raises(ConfigError, match="--corpus_temperature 0.5 is out of range; give a value from 1"):
        TrainConfig(**one | dict(corpus_temperature=0.5))
    config = TrainConfig(**settings(two, corpus_temperature=2.0), save_dir=str(tmp_path / "two"), **SMALL | dict(num_workers=2))
    assert run_training(config)["ser/n"] == 12


def films(corpus, folder):
    """The rows of a corpus without speakers: one film a split, in folders of its chapters."""
    for split in SPLITS:
        rows = read(corpus / f"{split}.jsonl")
        for i, r in enumerate(rows):
            name = f"{split}_film/ch{i % 4}/{i}.wav"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((corpus / r["audio_filepath"]).read_bytes())
            r |= dict(audio_filepath=name, speaker=None)
        write(folder / f"{split}.jsonl", rows)
    return folder


def test_a_run_knows_films_among_the_rows_of_all_splits(two, tmp_path):
    """A test of one film is one film, however many folders are in it; the same in validation, with stored features, and when it is tested again."""
    folder = films(two / "akan", tmp_path / "films")
    given = dict(save_dir=tmp_path / "run", feature_cache=str(tmp_path / "cache"), freeze_backbone=True)
    run = train(*(folder / f"{s}.jsonl" for s in SPLITS), **given, **SMALL)
    assert {r["group"] for r in run.predictions()} == {"test_film"} and {r["group"] for r in run.predictions("validation")} == {"val_film"}
    assert "only 1 film: nothing is known about new ones" in (run.test_folder / "summary.txt").read_text()


@pytest.mark.parametrize(("pattern", "wanted"), [("film{}/wav/{}.wav", "film{}"), ("wav/film{}/{}.wav", "film{}"), ("{split}/film{}/{}.wav", "film{}"), ("root/film{}/ch{chapter}/{}.wav", "film{}"), ("/x/films/film{}/{}.wav", "film{}"), ("wav/{1}.wav", "wav")])
def test_groups_of_a_split_are_those_among_all(pattern, wanted):
    """Wherever the film stands in the path; a folder that is just a place for audio is none, also the folder of a split."""
    films = dict(train=[0, 1, 2], val=[3], test=[4])
    splits = {s: [Utterance(pattern.format(f, i, split=s, chapter=i % 3)) for f in fs for i in range(6)] for s, fs in films.items()}
    assert groups_of_splits(splits) == {s: [wanted.format(f) for f in fs for _ in range(6)] for s, fs in films.items()}
    spoken = {s: [replace(u, speaker=f"Ama{i}") for i, u in enumerate(rows)] for s, rows in splits.items()}
    assert groups_of_splits(spoken) == {s: [f"ama{i}" for i in range(len(rows))] for s, rows in splits.items()}


@pytest.mark.parametrize("pattern", ["film{}/wav/{}.wav", "film{}/ch{chapter}/{}.wav", "root/film{}/ch{chapter}/{}.wav", "film{}/{}.wav"])
def test_folds_of_films_are_pooled_by_film(pattern):
    """Each fold knows its film by the same name as all others do, so the pooled records are drawn by film."""
    rows = [Utterance(pattern.format(f, i, chapter=i % 4), emotion="joy", id=f"{f}-{i}") for f in range(12) for i in range(12)]
    found = []
    for fold in speaker_folds(rows):
        splits = dict(zip(SPLITS, fold, strict=True))
        found += [dict(id=u.id, speaker=None, group=g, emotion="joy", predicted_emotion="joy") for u, g in zip(splits["test"], groups_of_splits(splits)["test"], strict=True)]
    assert {(r["id"].split("-")[0], r["group"]) for r in found} == {(str(f), f"film{f}") for f in range(12)}
    about = intervals(found)[1]["ser"]
    assert (about["by"], about["groups"]) == ("film", 12)


def weighed(config, data):
    """The share of each class in the weighted loss, over many epochs as training draws them."""
    drawn = np.bincount([data.emotions[i] for e in range(60) for b in train_batches(data, config, 8, seed=0, epoch=lambda: e) for i in b])
    mass = drawn * _emotion_loss_options(config, drawn_counts(data, config))["weights"]
    return mass / mass.sum(), drawn / 60


@pytest.mark.parametrize("more", [{}, dict(corpus_temperature=2.0), dict(corpus_temperature=5.0), dict(corpus_temperature=1e6), dict(balanced_sampling=0.5), dict(balanced_sampling=1.0)])
@pytest.mark.parametrize("soft", [False, True])
def test_classes_are_counted_as_they_are_drawn(two, more, soft):
    """So each counts alike with class weights, whatever is drawn more often; the logit adjustment takes out the shares that training sees."""
    def label(c): return {"anger": float(c == 0), "joy": float(c == 1), "fear": float(c == 2)} if soft else ("anger", "joy", "fear")[c]
    rows = [Utterance(f"a{i}", emotion=label(i % 2), corpus="a") for i in range(300)] + [Utterance(f"b{i}", emotion=label(2 if i % 3 else 0), corpus="b") for i in range(30)]
    data = SpeechDataset(rows, "", ["anger", "joy", "fear"], np.linspace(1, 6, 330))
    config = TrainConfig(**settings(two, class_weights="balanced", logit_adjustment=1.0, batch_size=8, **more))
    shares, drawn = weighed(config, data)
    assert np.allclose(shares, 1 / 3, atol=0.01) and np.allclose(drawn_counts(data, config), drawn, atol=0.5)
    assert np.allclose(np.exp(_emotion_loss_options(config, drawn_counts(data, config))["shift"]), drawn / drawn.sum(), atol=0.01)
    model = build_model(replace(config, backbone="tiny", use_alpha_ser=True), data, None)
    assert model.config.ser == _emotion_loss_options(config, drawn_counts(data, config))
    assert more or drawn_counts(data, config) == data.class_counts


def test_a_resumed_run_keeps_its_loss(two, tmp_path, capsys):
    """Also one of an earlier version, which counted the rows of the manifest; a new run has the new counts."""
    config = TrainConfig(**settings(two, corpus_temperature=4.0, class_weights="balanced"), save_dir=str(tmp_path / "run"), use_alpha_ser=True, **SMALL | dict(checkpoint_interval=1))
    run_training(config)
    file = Path(Run(tmp_path / "run").checkpoint_to_resume()) / "config.json"
    saved = json.loads(file.read_text())
    saved["ser"]["weights"] = [0.5, 1.5]
    file.write_text(json.dumps(saved))
    (tmp_path / "run/test_results.json").unlink()
    run_training(replace(config, resume=True, num_epochs=4, early_stopping_patience=9))
    assert "going on from" in capsys.readouterr().out
    again = Path(Run(tmp_path / "run").checkpoint_to_resume())
    assert json.loads((again / "config.json").read_text())["ser"]["weights"] == [0.5, 1.5] and again != file.parent


def cross(command, folder, corpora, *more):
    """The command with the smallest model."""
    flags = [x for k, v in SMALL.items() for x in (f"--{k}", v)]
    return command("crosscorpus", "--corpora", *(f"{n}={p}" for n, p in corpora.items()), "--use_alpha_ser", *flags, "--save_dir", folder, *more)


def test_crosscorpus(two, tmp_path, command):
    """Each on each: shared classes and rows, floors, what was left out; a second start reads all of it, and other rows are tested anew."""
    for split in SPLITS:
        rows = read(two / f"emodb/{split}.jsonl")
        write(tmp_path / f"{split}.jsonl", [r | dict(audio_filepath=str(two / "emodb" / r["audio_filepath"])) | (dict(emotion="boredom") if i < 2 else {}) for i, r in enumerate(rows)])
    corpora = dict(akan=two / "akan", emodb=tmp_path)
    code, out = cross(command, tmp_path / "x", corpora, "--emotion_map", "angry=anger")
    assert code == 0 and "akan on emodb: 4 rows of 2 emotions; left out: boredom 2" in out, out
    pairs = {(r["trained_on"], r["tested_on"]): r for r in json.loads((tmp_path / "x/crosscorpus.json").read_text())["pairs"]}
    assert len(pairs) == 4 and pairs["emodb", "akan"]["classes"] == ["anger", "joy"] and pairs["emodb", "emodb"]["classes"] == ["anger", "boredom", "joy"]
    assert pairs["akan", "emodb"]["metrics"]["ser/ua_floor"] == 0.5 and pairs["akan", "emodb"]["metrics"]["ser/n"] == 4 and pairs["emodb", "akan"]["rows"] == 6
    records = read(tmp_path / "x/tests/akan_on_emodb_seed_0/predictions.jsonl")
    assert pairs["akan", "emodb"]["metrics"]["ser/ua"] == score(records)["ser/ua"] and len(records) == 4
    assert pairs["akan", "akan"]["metrics"]["ser/ua"] == json.loads((tmp_path / "x/akan/seed_0/test_results.json").read_text())["metrics"]["ser/ua"]
    table = (tmp_path / "x/crosscorpus.md").read_text()
    assert f"({0.5:.3f})" in table and "| akan | " in table and (tmp_path / "x/crosscorpus.png").stat().st_size > 5000
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "x").rglob("*") if p.is_file() and ("seed_0" in str(p))}
    code, out = cross(command, tmp_path / "x", corpora, "--emotion_map", "angry=anger")
    assert code == 0 and {p: p.stat().st_mtime_ns for p in written} == written and (tmp_path / "x/crosscorpus.md").read_text() == table
    rows = read(tmp_path / "test.jsonl")[:-1]
    write(tmp_path / "test.jsonl", rows)
    code, out = cross(command, tmp_path / "x", corpora, "--emotion_map", "angry=anger")
    assert code == 0 and "akan on emodb: 3 rows" in out and len(read(tmp_path / "x/tests/akan_on_emodb_seed_0/predictions.jsonl")) == 3


def test_crosscorpus_says_what_is_wrong(two, tmp_path, command):
    """One sentence with the cure, before anything is trained."""
    both = dict(akan=two / "akan", emodb=two / "emodb")
    def told(corpora, *more):
        code, out = cross(command, tmp_path / "y", corpora, *more)
        assert code and not (tmp_path / "y/akan").exists()
        return out
    assert "no row has the emotion 'sad'" in told(both, "--emotion_map", "sad=anger")
    assert "at least two" in told(dict(akan=two / "akan")) and "write NAME=FOLDER" in told({"": two / "akan", "b": two})
    assert "--train_jsonl: crosscorpus sees to that itself" in told(both, "--train_jsonl", "x")
    assert "other tests what akan is trained on" in told(dict(akan=two / "akan", other=copy_of(two / "akan", tmp_path / "other", test="train")))
    assert "no such manifest" in told(dict(akan=two / "akan", none=tmp_path / "none"))
    numbers = copy_of(two / "akan", tmp_path / "numbers", emotion=1)
    assert "is an index, and corpora may number" in told(dict(akan=two / "emodb", numbers=numbers))
    (tmp_path / "y").mkdir(exist_ok=True)
    (tmp_path / "y/crosscorpus.md").write_text("mine")
    assert "nothing is written over" in told(both) and (tmp_path / "y/crosscorpus.md").read_text() == "mine"


def copy_of(corpus, folder, test="test", **fields):
    """The manifests of a corpus with whole paths, and other fields."""
    folder.mkdir()
    for split in SPLITS:
        rows = read(corpus / f"{test if split == 'test' else split}.jsonl")
        write(folder / f"{split}.jsonl", [r | dict(audio_filepath=str(corpus / r["audio_filepath"])) | fields for r in rows])
    return folder


def test_no_emotions_in_common(two, tmp_path, command):
    """A dash in the table, and a sentence."""
    other = copy_of(two / "emodb", tmp_path / "other", emotion="calm")
    for split in SPLITS:
        rows = read(other / f"{split}.jsonl")
        write(other / f"{split}.jsonl", [r | dict(emotion="calm" if i % 2 else "tired") for i, r in enumerate(rows)])
    code, out = cross(command, tmp_path / "z", dict(akan=two / "akan", other=other))
    assert code == 0 and "akan on other: 0 rows of 0 emotions; left out: tired 3, calm 3; too few in common for a score" in out and "| – |" in out, out


def test_models_are_compared_row_by_row():
    """Rows of two corpora with one id are two; a model that names no corpus is compared with one that does."""
    def rows(right, corpora=("a", "b")):
        return [dict(id=f"{i}.wav", emotion=e, predicted_emotion=e if right else "joy", corpus=c) for c in corpora for i, e in enumerate(["joy", "anger"])]
    assert paired_difference(rows(True), rows(False)[::-1])["ser/ua"] == 0.5
    plain = [{k: v for k, v in r.items() if k != "corpus"} for r in rows(False, "a")]
    assert paired_difference(rows(True, "a"), plain)["ser/ua"] == 0.5
    with pytest.raises(ValueError, match="comes twice"):
        paired_difference(rows(True), [r | dict(corpus=None) for r in rows(False)])


@pytest.mark.parametrize(("second", "swapped"), [
    (dict(group=None), False), (dict(group=None), True), (dict(group="wav"), False), (dict(audio_filepath="elsewhere.wav"), True), (dict(start=0), False)])
def test_both_models_are_drawn_alike(second, swapped):
    """Whatever one of the files says of groups, or nothing, a drawn set holds the same rows of both models."""
    rng, first, other = np.random.default_rng(0), [], []
    for speaker in range(12):
        ease = rng.uniform(.1, .99)
        for i in range(15):
            right = rng.random() < ease
            row = dict(id=f"{speaker}-{i}", group=f"s{speaker}", audio_filepath=f"{speaker}/{i}.wav", start=None, end=None, emotion="joy")
            first.append(row | dict(predicted_emotion="joy" if right else "anger"))
            other.append(row | dict(predicted_emotion="joy" if right or rng.random() < .1 else "anger"))
    changed = [{k: v for k, v in (r | second).items() if v is not None} for r in other]
    ends = ("ser/wa_low", "ser/wa", "ser/wa_high")
    expected = [paired_difference(first, other)[k] for k in ends]
    found = paired_difference(changed, first) if swapped else paired_difference(first, changed)
    assert [found[k] for k in ends] == ([-x for x in expected[::-1]] if swapped else expected)
    assert expected[2] - expected[0] < .1                                    # unpaired: .4
