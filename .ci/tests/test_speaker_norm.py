"""Speaker norm: answers relative to a speaker, by every way to an answer; both answers are scored; off, none changes."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import read, write

import prosody_ser as ps
from prosody_ser.batches import SpeechDataset
from prosody_ser.confidence import relative_rows, speaker_normalised
from prosody_ser.config import ConfigError, TrainConfig
from prosody_ser.data import Utterance
from prosody_ser.evaluate import compare_models, evaluate_model
from prosody_ser.inference import Predictor, predict, predict_emotions
from prosody_ser.model import load_checkpoint

torch.set_num_threads(1)
SETTINGS = dict(backbone="tiny", num_epochs=2, tokenizer_type="char", vocab_size=40, use_alpha_ser=True, use_alpha_asr=True, num_workers=0,
                checkpoint_interval=0, eval_steps=0, decode_method="greedy", head_lr=1e-2)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    return ps.train(*(corpus / f"{s}.jsonl" for s in ("train", "val", "test")), audio_base_path=corpus, speaker_norm=True,
                    save_dir=tmp_path_factory.mktemp("norm") / "run", **SETTINGS)


@pytest.fixture(scope="module")
def test_set(corpus, run):
    model = load_checkpoint(run.best_model)
    return model, SpeechDataset(ps.read_manifest(corpus / "test.jsonl"), corpus, [model.config.id2label[i] for i in range(2)])


def logits_of(records):
    return np.array([[*r["emotion_logits"].values()] for r in records])


def test_training_validates_and_tests_with_it(run):
    """The model keeps the setting, validation and test score the normalised answer, and the other one beside it."""
    assert load_checkpoint(run.best_model).config.speaker_norm
    records = read(run.test_folder / "predictions.jsonl")
    assert all({"predicted_alone", "predicted_emotion"} <= r.keys() for r in records)
    metrics = json.loads(run.results_file.read_text())["metrics"]
    assert metrics["ser/ua_alone"] == pytest.approx(np.mean([np.mean([r["predicted_alone"] == e for r in records if r["emotion"] == e]) for e in ("anger", "joy")]))
    assert {"ser/ua_alone_floor", "ser/ua_alone_low", "ser/ua_alone_high"} <= metrics.keys()
    assert "UA of each utterance alone" in run.summary.read_text() and "ser/ua_alone" in run.history["val"][-1]


def test_the_right_logits(run, test_set):
    """Each row's logits less n / (n + 10) of its speaker's mean distance from the bias; batches change nothing."""
    model, data = test_set
    alone = logits_of(predict(model, data, 1, "greedy", speaker_norm=False))
    who = np.array([u.speaker for u in data.utterances])
    wanted = alone.copy()
    for speaker in set(who):
        rows = who == speaker
        wanted[rows] -= rows.sum() / (rows.sum() + 10) * (alone[rows].mean(0) - model.ser.out[-1].bias.detach().numpy())
    for batch_size in (1, 4):
        assert np.allclose(logits_of(predict(model, data, batch_size, "greedy")), wanted, atol=1e-4)
    raw = predict_emotions(model, data)[0]
    assert np.allclose(raw, alone, atol=1e-4)                                      # what the two temperatures are fitted on
    assert np.allclose(relative_rows(raw, data, model)[0], wanted, atol=1e-4)


def test_the_mean_of_its_features_is_what_goes(run, test_set):
    """The subtraction from the logits is that of the speaker's mean from the features of the linear head."""
    model, data = test_set
    features = []
    hook = model.ser.out.register_forward_hook(lambda _, inputs, out: features.append(inputs[0]))
    alone = torch.tensor(logits_of(predict(model, data, 1, "greedy", speaker_norm=False))).float()
    hook.remove()
    order = torch.tensor([next(i for i, x in enumerate(features) if torch.allclose(model.ser.out(x)[0], a, atol=1e-4)) for a in alone])
    x, who = torch.cat(features)[order].detach(), np.array([u.speaker for u in data.utterances])
    for speaker in set(who):
        rows = torch.tensor(who == speaker)
        x[rows] -= rows.sum() / (rows.sum() + 10) * x[rows].mean(0)
    with torch.no_grad():
        assert torch.allclose(model.ser.out(x), torch.tensor(logits_of(predict(model, data, 1, "greedy"))).float(), atol=1e-3)


def test_evaluation_both_ways(run, corpus):
    """The same two answers, whichever is the main one."""
    rows = ps.read_manifest(corpus / "test.jsonl")
    model = load_checkpoint(run.best_model)
    on, off = (evaluate_model(model, rows, corpus, speaker_norm=x, decode_method="greedy") for x in (None, False))
    for scores, main in ((on, "ser/ua_speaker_norm"), (off, "ser/ua_alone")):       # each way has its name, whichever is the main one
        assert scores["ser/ua"] == scores[main] and scores["ser/ua_low"] == scores[f"{main}_low"]
    assert all(on[k] == off[k] for k in ("ser/ua_alone", "ser/ua_speaker_norm"))
    lines = [line for line in compare_models(on.records, off.records).splitlines() if line.startswith(("| UA of each", "| UA with"))]
    assert len(lines) == 2 and all("+0.000" in line for line in lines)              # two ways of one model: like with like
    assert [r["predicted_alone"] for r in on.records] == [r["predicted_emotion"] for r in off.records]


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_each_kind_of_answer_has_its_temperature(run, corpus, test_set, command, tmp_path):
    """The normalised answers are divided by their own temperature, those of an utterance alone by theirs: by every way to an answer."""
    data, model = test_set[1], load_checkpoint(run.best_model)
    model.config.emotion_temperature, model.config.norm_temperature = 4.0, 0.5
    model.save_pretrained(tmp_path / "model")
    alone = logits_of(predict(model, data, 4, "greedy", speaker_norm=False))
    relative = speaker_normalised(alone, data.utterances, model.ser.centre)
    for on, logits, t in ((False, alone, 4.0), (None, relative, 0.5)):
        chances = [[*r["probabilities"].values()] for r in predict(model, data, 4, "greedy", speaker_norm=on)]
        assert np.allclose(chances, softmax(logits / t), atol=1e-3)
    first = Predictor(tmp_path / "model", "cpu", "greedy")
    rows = [i for i, u in enumerate(data.utterances) if u.speaker == data.utterances[0].speaker]
    files = [corpus / data.utterances[i].audio_filepath for i in rows]
    for predictor, logits, t in ((first, alone, 4.0), (first.for_speaker(files), relative, 0.5)):
        assert np.allclose([[*predictor(f).probabilities.values()] for f in files], softmax(logits[rows] / t), atol=1e-3)
    for more, logits, t in (([], alone, 4.0), (["--speaker_norm", "rows"], relative, 0.5)):
        out = tmp_path / f"out{len(more)}"
        assert command("predict", tmp_path / "model", corpus / "test.jsonl", "--decode_method", "greedy", "--out", out, *more)[0] == 0
        assert np.allclose([[*r["probabilities"].values()] for r in read(out / "predictions.jsonl")], softmax(logits / t), atol=1e-3)


def test_both_temperatures_are_fitted(corpus, tmp_path):
    """On validation, each on its own kind of answer, whatever the setting; where no speaker comes twice there is one."""
    from prosody_ser.evaluation import calibrate
    from prosody_ser.train import _calibrate_run
    more = dict(audio_base_path=corpus, save_dir=tmp_path / "run", **SETTINGS)
    run = ps.train(*(corpus / f"{s}.jsonl" for s in ("train", "val")), **more)
    model = load_checkpoint(run.best_model)
    rows = [Utterance(u.audio_filepath, u.words, u.prosody_annotations, u.emotion, speaker=str(i % 3))
            for i, u in enumerate(3 * list(ps.read_manifest(corpus / "train.jsonl")))]
    names = [model.config.id2label[i] for i in range(2)]
    rng = np.random.default_rng(0)
    for u in rows[::3]:
        u.emotion = names[rng.integers(2)]                                         # mistakes to learn from
    data = SpeechDataset(rows, corpus, names)
    for on in (False, True):
        config = TrainConfig("-", "-", "-", save_dir=str(tmp_path / "run"), speaker_norm=on)
        found = _calibrate_run(config, model, dict(train=data, val=data, test=data))
        raw = predict_emotions(model, data)[0]
        alone, relative = calibrate(raw, data.emotions), calibrate(*relative_rows(raw, data, model))
        known = json.loads((run.best_model / "config.json").read_text())
        assert (known["emotion_temperature"], known["norm_temperature"]) == (alone["temperature"], relative["temperature"])
        assert found == (relative if on else alone) and alone["temperature"] != relative["temperature"]
    assert _calibrate_run(config, model, dict(train=data, val=data, test=SpeechDataset(rows[:1], corpus, names))) == alone    # of its answers
    lonely = SpeechDataset([Utterance(u.audio_filepath, u.words, emotion=u.emotion) for u in rows], corpus, names)
    _calibrate_run(config, model, dict(train=lonely, val=lonely))
    assert load_checkpoint(run.best_model).config.norm_temperature is None


def test_speakers_of_one_emotion_are_told(corpus, tmp_path, capsys):
    """Where each speaker shows one emotion, the setting takes it for the voice: training and reports say so."""
    from prosody_ser.train import load_splits
    rows = read(corpus / "val.jsonl")
    write(tmp_path / "val.jsonl", [r | dict(speaker=f"val {r['emotion']}") for r in rows])
    manifests = dict(train_jsonl=str(corpus / "train.jsonl"), val_jsonl=str(tmp_path / "val.jsonl"))
    load_splits(TrainConfig(audio_base_path=str(corpus), save_dir=str(tmp_path / "x"), speaker_norm=True, **manifests))
    assert f"{len(rows)} of {len(rows)} utterances are of speakers who show one emotion" in capsys.readouterr().out
    soft = [r | dict(emotion={r["emotion"]: 0.9, {"joy": "anger", "anger": "joy"}[r["emotion"]]: 0.1}, speaker=f"val {r['emotion']}") for r in rows]
    write(tmp_path / "val.jsonl", soft)                                            # shares of emotions: the largest counts
    load_splits(TrainConfig(audio_base_path=str(corpus), save_dir=str(tmp_path / "x"), speaker_norm=True, **manifests))
    assert f"{len(rows)} of {len(rows)} utterances are of speakers who show one emotion" in capsys.readouterr().out


def test_rows_without_speakers(run, corpus):
    rows = [Utterance(u.audio_filepath, u.words, u.prosody_annotations, u.emotion) for u in ps.read_manifest(corpus / "test.jsonl")]
    scores = evaluate_model(load_checkpoint(run.best_model), rows, corpus, decode_method="greedy")
    assert not {"ser/ua_alone", "ser/ua_speaker_norm"} & scores.keys() and "predicted_alone" not in scores.records[0]
    assert scores.settings["speaker_norm"] == "without effect, since no speaker comes twice"


def test_for_speaker(run, corpus, test_set):
    """A predictor that has heard a speaker answers as an evaluation of all of them does; the first one is as it was."""
    model, data = test_set
    wanted = predict(model, data, 4, "greedy")
    first = Predictor(run.best_model, "cpu", "greedy")
    files = {s: [corpus / u.audio_filepath for u in data.utterances if u.speaker == s] for s in ("test0", "test1")}
    before = first(files["test0"][0])
    for speaker, own in files.items():
        heard = first.for_speaker(own, batch_size=2)
        records = [r for r in wanted if r["speaker"] == speaker]
        for file, r, many in zip(own, records, heard.many(own), strict=True):
            for answer in (heard(file), many):
                assert answer.emotion == r["predicted_emotion"] and "logits" not in answer
                assert answer.probabilities == pytest.approx(r["probabilities"], abs=2e-4)
    assert first(files["test0"][0]) == before
    assert first.for_speaker(files["test0"]).for_speaker(files["test1"])(files["test1"][0]) == first.for_speaker(files["test1"])(files["test1"][0])
    with pytest.raises(ConfigError, match="at least one recording"):
        first.for_speaker([])


def test_predict_command(run, corpus, command, tmp_path):
    """rows: as the evaluation of the manifest, also where speakers take turns; one: all are of one person."""
    rows = read(corpus / "test.jsonl")
    predictor = Predictor(run.best_model, "cpu", "greedy")
    code, out = command("predict", run.best_model, corpus / "test.jsonl", "--speaker_norm", "rows", "--decode_method", "greedy", "--out", tmp_path / "rows")
    assert code == 0, out
    wanted = {s: predictor.for_speaker([corpus / r["audio_filepath"] for r in rows if r["speaker"] == s]) for s in ("test0", "test1")}
    for r, answer in zip(rows, read(tmp_path / "rows" / "predictions.jsonl"), strict=True):
        assert answer["probabilities"] == pytest.approx(wanted[r["speaker"]](corpus / r["audio_filepath"]).probabilities, abs=2e-4)
    files = [corpus / r["audio_filepath"] for r in rows]
    code, out = command("predict", run.best_model, *files, "--speaker_norm", "one", "--decode_method", "greedy", "--out", tmp_path / "one")
    assert code == 0, out
    all_of_them = predictor.for_speaker(files)
    for file, answer in zip(files, read(tmp_path / "one" / "predictions.jsonl"), strict=True):
        assert answer["probabilities"] == pytest.approx(all_of_them(file).probabilities, abs=2e-4)
    code, out = command("predict", run.best_model, corpus / "test.jsonl", "--speaker_norm", "one", "--decode_method", "greedy", "--out", tmp_path / "rows", "--resume")
    changed = {a["audio_filepath"]: a["probabilities"] for a in read(tmp_path / "rows" / "predictions.jsonl")}      # another way: other answers
    assert code == 0 and all(changed[r["audio_filepath"]] == pytest.approx(all_of_them(corpus / r["audio_filepath"]).probabilities, abs=2e-4) for r in rows)
    again = command("predict", run.best_model, *files[:3], "--speaker_norm", "one", "--decode_method", "greedy", "--out", tmp_path / "one", "--resume")
    fewer = predictor.for_speaker(files[:3])(files[0]).probabilities            # other recordings: other answers
    found = next(a for a in read(tmp_path / "one" / "predictions.jsonl") if a["audio_filepath"] == str(files[0]))
    assert again[0] == 0 and found["probabilities"] == pytest.approx(fewer, abs=2e-4)


def test_a_file_that_cannot_be_used_costs_its_own_answer(run, corpus, command, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound")
    files = [corpus / f"test{i}.wav" for i in range(3)]
    code, out = command("predict", run.best_model, *files, tmp_path / "broken.wav", "--speaker_norm", "one", "--decode_method", "greedy", "--out", tmp_path / "out")
    assert code == 1 and "1 of 4 files" in out and len(read(tmp_path / "out" / "predictions.jsonl")) == 3


def test_a_speaker_of_whom_nothing_can_be_used(run, corpus, command, tmp_path):
    """Each broken file says what is wrong with it, and the other speakers get their answers."""
    for name in ("broken1.wav", "broken2.wav"):
        (tmp_path / name).write_bytes(b"RIFF no sound")
    rows = [dict(audio_filepath=str(corpus / f"test{i}.wav"), speaker="ama") for i in range(3)]
    rows += [dict(audio_filepath=str(tmp_path / f"broken{i}.wav"), speaker="kofi") for i in (1, 2)]
    write(tmp_path / "rows.jsonl", rows)
    code, out = command("predict", run.best_model, tmp_path / "rows.jsonl", "--speaker_norm", "rows", "--decode_method", "greedy", "--out", tmp_path / "out")
    assert code == 1 and "2 of 5 files" in out and "broken1.wav" in out and "broken2.wav" in out
    wanted = Predictor(run.best_model, "cpu", "greedy").for_speaker([r["audio_filepath"] for r in rows[:3]])
    for r, answer in zip(rows, read(tmp_path / "out" / "predictions.jsonl"), strict=False):
        assert answer["probabilities"] == pytest.approx(wanted(r["audio_filepath"]).probabilities, abs=2e-4)


def test_two_manifests_may_name_their_speakers_alike(run, corpus, command, tmp_path):
    """As an evaluation of both: speaker 1 of one manifest is not speaker 1 of the other."""
    for k in (0, 1):
        write(tmp_path / f"m{k}.jsonl", [dict(audio_filepath=str(corpus / f"test{i}.wav"), speaker="1") for i in range(k, 6, 2)])
    code, out = command("predict", run.best_model, tmp_path / "m0.jsonl", tmp_path / "m1.jsonl", "--speaker_norm", "rows", "--decode_method", "greedy", "--out", tmp_path / "out")
    assert code == 0, out
    first = Predictor(run.best_model, "cpu", "greedy")
    found = {a["audio_filepath"]: a["probabilities"] for a in read(tmp_path / "out" / "predictions.jsonl")}
    for k in (0, 1):
        files = [str(corpus / f"test{i}.wav") for i in range(k, 6, 2)]
        heard = first.for_speaker(files)
        assert all(found[f] == pytest.approx(heard(f).probabilities, abs=2e-4) for f in files)


def test_two_folders_may_name_their_recordings_alike(run, corpus, command, tmp_path):
    """Answers of both manifests are those of each alone, with files of one name in two folders; what is done stays done."""
    files = []
    for k in (0, 1):
        for i in range(3):
            (tmp_path / f"c{k}").mkdir(exist_ok=True)
            shutil.copy(corpus / f"test{2 * i + k}.wav", tmp_path / f"c{k}/{i}.wav")
        files += [write(tmp_path / f"c{k}/m.jsonl", [dict(audio_filepath=f"{i}.wav", speaker="1") for i in range(3)])]
    how = ["--speaker_norm", "rows", "--decode_method", "greedy", "--format", "textgrid", "--out"]
    def answers(out, *manifests, more=()):
        code, said = command("predict", run.best_model, *manifests, *how, tmp_path / out, *more)
        assert code == 0, said
        return [a["probabilities"] for a in read(tmp_path / out / "predictions.jsonl")]
    manifests = [tmp_path / f"c{k}/m.jsonl" for k in (0, 1)]
    both = answers("both", *manifests)
    for mine, alone in zip((both[:3], both[3:]), (answers(f"a{k}", m) for k, m in enumerate(manifests)), strict=True):
        assert all(p == pytest.approx(q, abs=2e-4) for p, q in zip(mine, alone, strict=True))
    before = (tmp_path / "both/predictions.jsonl").read_bytes()
    assert len(answers("both", *manifests, more=["--resume"])) == 6
    assert (tmp_path / "both/predictions.jsonl").read_bytes() == before and len(list((tmp_path / "both").glob("*.TextGrid"))) == 6
    how = ["--decode_method", "greedy", "--format", "textgrid", "--plot", "--out"]
    assert len(answers("plain", *manifests)) == 6
    files = {p: p.read_bytes() for p in (tmp_path / "plain").iterdir() if p.suffix in (".png", ".TextGrid")}
    shutil.copy(corpus / "test5.wav", tmp_path / "c1/0.wav")             # one of the two that are called 0.wav
    assert len(answers("plain", *manifests, more=["--resume"])) == 6
    assert len(files) == 12 and all(p.exists() for p in files) and [p.read_bytes() == b for p, b in files.items()].count(False) <= 2


def test_told_where_prediction_knows_no_speaker_twice(run, corpus, command):
    plain = command("predict", run.best_model, corpus / "test0.wav", corpus / "test1.wav", "--decode_method", "greedy")
    code, out = command("predict", run.best_model, corpus / "test0.wav", corpus / "test1.wav", "--speaker_norm", "rows", "--decode_method", "greedy")
    assert code == 0 and "without effect, since no speaker is heard twice: --speaker_norm rows" in out
    assert [line for line in out.splitlines() if line.startswith("{")] == [line for line in plain[1].splitlines() if line.startswith("{")]


def test_refused(run, corpus, command):
    code, out = command("predict", run.best_model, corpus / "test0.wav", "--speaker_norm", "one", "--timeline")
    assert code and "leave --timeline out" in out


def test_told_where_it_has_no_effect(corpus, tmp_path, capsys):
    """Rows without speakers train all the same, and the training says so."""
    for split in ("train", "val"):
        write(tmp_path / f"{split}.jsonl", [{k: v for k, v in r.items() if k != "speaker"} for r in read(corpus / f"{split}.jsonl")])
    ps.train(tmp_path / "train.jsonl", tmp_path / "val.jsonl", audio_base_path=corpus, save_dir=tmp_path / "run", speaker_norm=True, **SETTINGS | dict(num_epochs=1))
    assert "--speaker_norm, validation: without effect, since no speaker comes twice" in capsys.readouterr().out


def test_two_corpora_may_name_their_speakers_alike():
    logits = np.array([[1.0, 0], [3, 0], [0, 1], [0, 3]])
    rows = [Utterance("a.wav", speaker="1", corpus=c) for c in "aabb"]
    found = speaker_normalised(logits, rows, np.zeros(2))
    assert np.allclose(found[:2], logits[:2] - 2 / 12 * np.array([2, 0])) and np.allclose(found[2:], logits[2:] - 2 / 12 * np.array([0, 2]))
