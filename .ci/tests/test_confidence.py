"""Confidence that can be used: unsure below a limit, by every way to an answer; what is unusual, by a threshold that training finds and every copy of the model keeps."""
import csv
import io
import json
import shutil
import warnings

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import read
from test_numerics import SMALL, made, small_model  # noqa: F401  (made: a fixture)

from prosody_ser.command_config import PredictConfig
from prosody_ser.config import ConfigError
from prosody_ser.confidence import UNSURE, emotion_answer, unusual, usual_of
from prosody_ser.inference import Predictor, predict_emotions
from prosody_ser.model import Collator, create_model, load_checkpoint, save_pt
from prosody_ser.widget import Listener

torch.set_num_threads(1)
USUAL = dict(distance=1.5, seconds=0.8)


def speech(seconds=1.0, seed=0):
    return (np.random.default_rng(seed).laplace(size=round(16000 * seconds)) * 0.05).astype(np.float32)


@pytest.fixture(scope="module")
def model(made):  # noqa: F811
    """A small model whose head has seen such noise in training, so that its distances are about 1."""
    model = small_model(made, "tiny", emotion_temperature=0.5, usual=USUAL)
    with torch.no_grad():
        for i in range(0, 64, 8):
            rows = [torch.from_numpy(speech(1.0, i + k)) for k in range(8)]
            hidden, lengths = model.eval().encode(torch.stack(rows), torch.full((8,), 16000))
            model.ser.norm.update(model.ser.pool(hidden["ser"], lengths))
    return model.eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    model.save_pretrained(folder := tmp_path_factory.mktemp("confidence") / "model")
    return folder


# ------------------------------------------------------------------------------------------------------------- unsure

def test_unsure_below_the_limit(model):
    """Without a limit nothing is new; with one, emotion says unsure, and the class and the probabilities stay readable."""
    plain = Predictor(model, "cpu", "greedy")(speech())
    best = max(plain.probabilities, key=plain.probabilities.get)
    assert plain.emotion == plain.likeliest == best and "likeliest" not in plain
    top = plain.probabilities[best]
    for limit, emotion in ((0.0, best), (top, best), (min(1, top + 1e-4), UNSURE), (1.0, UNSURE if top < 1 else best)):
        found = Predictor(model, "cpu", "greedy", abstain=limit)(speech())
        assert (found.emotion, found.likeliest, found.probabilities) == (emotion, best, plain.probabilities), limit
        assert {k: v for k, v in found.items() if k not in ("emotion", "likeliest")} == {k: v for k, v in plain.items() if k != "emotion"}


def test_calibrated(model):
    """The limit is held against probabilities at the temperature, not against the model's own."""
    sharp = Predictor(model, "cpu", "greedy")(speech()).probabilities
    limit = max(sharp.values()) - 0.01
    assert Predictor(model, "cpu", "greedy", abstain=limit)(speech()).emotion != UNSURE
    model.config.emotion_temperature = 5.0
    try:
        found = Predictor(model, "cpu", "greedy", abstain=limit)(speech())
    finally:
        model.config.emotion_temperature = 0.5
    assert found.emotion == UNSURE and max(found.probabilities.values()) < 0.5


def test_many_as_alone(model):
    predict = Predictor(model, "cpu", "greedy", abstain=0.9)
    sounds = [speech(0.5 + i / 4, i) for i in range(5)] + [speech(0.2), speech() * 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one, together in zip(sounds, predict.many(sounds, batch_size=3), strict=True):
            alone = predict(one)
            assert (together.emotion, together.likeliest, together.unusual) == (alone.emotion, alone.likeliest, alone.unusual)


def test_limits_that_cannot_be(model, made):  # noqa: F811
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="from 0 to 1"):
            Predictor(model, "cpu", abstain=wrong)
    with pytest.raises(ConfigError, match="abstain 7"):
        PredictConfig(audio=["x.wav"], checkpoint_path="m", abstain=7)
    with pytest.raises(ConfigError, match="no emotion head"):
        Predictor(create_model(None, made[1], tasks=["asr"]), "cpu", abstain=0.5)
    with pytest.raises(ConfigError, match="'unsure' is an emotion of this model"):
        Predictor(create_model(["joy", UNSURE], made[1]), "cpu", abstain=0.5)


def test_command(command, saved, tmp_path):
    """The columns of a table, the table for people, and a folder that does not take answers of another limit for its own."""
    for i in range(3):
        sf.write(tmp_path / f"{i}.wav", speech(1.0, i + 3), 16000)
    sf.write(tmp_path / "short.wav", speech(0.2), 16000)
    call = ["predict", saved, tmp_path, "--decode_method", "greedy", "--device", "cpu"]
    code, text = command(*call, "--format", "csv", "--abstain", 1.0)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert code == 0 and [r["emotion"] for r in rows] == [UNSURE] * 4 and {r["likeliest"] for r in rows} <= {"anger", "joy", "fear"}
    assert [r["unusual"] for r in rows[:3]] == [""] * 3 and rows[3]["unusual"].startswith("short")
    code, text = command(*call, "--table", "--abstain", 1.0)
    assert code == 0 and text.count(f"{UNSURE} ") == 4 and text.count("(short") == 1
    out = ["--out", tmp_path / "out"]
    command(*call, *out)
    code, text = command(*call, *out, "--resume", "--abstain", 1.0)
    assert code == 0 and "from before" not in text
    assert all(r["emotion"] == UNSURE and r["likeliest"] for r in read(tmp_path / "out/predictions.jsonl"))
    assert "4 of them from before" in command(*call, *out, "--resume", "--abstain", 1.0)[1]
    code, text = command(*call, "--abstain", 70)
    assert code and "--abstain 70.0 is out of range; give a value from 0 to 1" in text


def test_shown(model):
    """In a notebook, in a figure and in the widget."""
    predict = Predictor(model, "cpu", "greedy", abstain=1.0)
    assert UNSURE in predict(speech())._repr_html_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = predict(speech(0.3) * 0)
    assert found.unusual.startswith("silent, short") and "unusual: silent, short" in found._repr_html_()
    assert "unusual: silent" in found.plot().axes[0].get_title(loc="right")
    assert Listener(predict).predict is predict


# ------------------------------------------------------------------------------------------------------------ unusual

def test_distance_is_one_in_training_and_larger_elsewhere(model):
    predict = Predictor(model, "cpu", "greedy")
    assert [predict(speech(1.0, 100 + i)).unusual for i in range(10)] == [None] * 10
    tone = (0.2 * np.sin(np.arange(16000) * 0.3)).astype(np.float32)
    assert "unlike the training data" in predict(tone).unusual
    clipped = (speech() * 40).clip(-1, 1)
    assert "clipped" in predict(clipped).unusual
    for rate in (8000, 22050, 44100):                                       # wherever it was cut off, and whatever its rate was
        t = np.arange(rate * 2)
        loud = np.random.default_rng(0).laplace(size=len(t) // 8 + 1).repeat(8)[:len(t)] * 0.05
        assert "clipped" in predict((loud * 30).clip(-0.4, 0.4), sampling_rate=rate).unusual
        assert "clipped" not in (predict(loud, sampling_rate=rate).unusual or "")


def test_facts_need_no_threshold(model):
    """Too few validation rows to tell a distance: silence and length are facts all the same."""
    few = dict(distance=None, seconds=1.0)
    assert unusual(speech(0.4), 99.0, few) == "short" and unusual(speech(), 99.0, few) is None
    assert unusual(speech() * 0, 1.0, few) == "silent"


def test_threshold():
    """The distance that 99 of 100 keep within; one wild row of a hundred does not move it; a few tell nothing."""
    far = np.random.default_rng(0).normal(1, 0.05, 1000)
    limit = usual_of(far, [2, 1.5])["distance"]
    assert np.mean(far > limit) == pytest.approx(0.01, abs=1e-9)
    assert usual_of([*far[:99], 1e9], [1])["distance"] < 1.3
    assert usual_of(far[:19], [3, 0.5]) == dict(distance=None, seconds=0.5)


def test_every_copy_keeps_it(model, saved, tmp_path):
    """Folder, .pt file and ONNX say the same; config.json holds plain numbers; what is older has no such field."""
    assert json.loads((saved / "config.json").read_text())["usual"] == USUAL
    save_pt(model, tmp_path / "m.pt")
    wanted = dict(Predictor(model, "cpu", "greedy")(speech(0.3)))
    assert wanted["unusual"].startswith("short")
    for place in (saved, tmp_path / "m.pt"):
        assert dict(Predictor(place, "cpu", "greedy")(speech(0.3))) == wanted
    shutil.copytree(saved, tmp_path / "old")
    config = json.loads((saved / "config.json").read_text())
    del config["usual"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="cannot mark what is unlike its training data: it was saved before") as told:
        old = Predictor(tmp_path / "old", "cpu", "greedy")
    assert len(told) == 1
    found = old(speech(0.29))
    assert found.unusual == "short" and old(speech(0.31)).unusual is None
    assert found.keys() == wanted.keys()


def test_old_model_marks_plain_facts(saved, made, tmp_path, capsys):  # noqa: F811
    """Silent, clipped and short recordings are marked by a model that knows nothing of its training data, too; that it cannot tell more is said once, by the command and in Python."""
    from prosody_ser.cli import main
    shutil.copytree(saved, tmp_path / "old")
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "old/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "usual"}))
    (tmp_path / "wav").mkdir()
    sounds = dict(a=speech(), b=speech() * 0, c=(speech() * 40).clip(-1, 1), d=speech(0.2))
    for name, sound in sounds.items():
        sf.write(tmp_path / f"wav/{name}.wav", sound, 16000)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        main(["predict", str(tmp_path / "old"), str(tmp_path / "wav"), "--device", "cpu"])
    marks = [json.loads(line)["unusual"] for line in capsys.readouterr().out.splitlines()]
    assert marks == [None, "silent", "clipped", "short"]
    assert [("page Confidence" in str(w.message)) for w in told].count(True) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asr = Predictor(create_model(None, made[1], tasks=["asr"]), "cpu", "greedy")       # no emotion head: no measure to miss
        assert asr(speech(0.2)).unusual == "short" and asr(speech()).unusual is None


def test_onnx(model, tmp_path):
    """The exported model is unsure and finds unusual what PyTorch does."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from prosody_ser.export import export_onnx
    from prosody_ser.onnx import OnnxPredictor
    export_onnx(model, tmp_path / "onnx")
    tone = (0.2 * np.sin(np.arange(16000) * 0.3)).astype(np.float32)
    for limit in (None, 0.0, 1.0):
        torchs, ours = Predictor(model, "cpu", "greedy", abstain=limit), OnnxPredictor(tmp_path / "onnx", 1, abstain=limit)
        for sound in (speech(), tone, speech(0.2)):
            wanted, found = torchs(sound), ours(sound)
            assert found.keys() == wanted.keys()
            assert [found.get(k) for k in ("emotion", "likeliest", "unusual")] == [wanted.get(k) for k in ("emotion", "likeliest", "unusual")]
    with pytest.raises(ConfigError, match="from 0 to 1"):
        OnnxPredictor(tmp_path / "onnx", abstain=2)
    about = json.loads((tmp_path / "onnx/onnx.json").read_text())
    (tmp_path / "onnx/onnx.json").write_text(json.dumps({k: v for k, v in about.items() if k != "usual"}))      # an older export
    with pytest.warns(UserWarning, match="it was saved before there was such a measure"):
        old = OnnxPredictor(tmp_path / "onnx", 1)
    assert "unlike" not in (old(tone)["unusual"] or "") and old(speech(0.2))["unusual"] == "short"


@pytest.mark.parametrize("family", SMALL)
def test_distance_alone_and_in_a_batch(made, family):  # noqa: F811
    """Of every family; padding is not heard (but with group norm, which hears it)."""
    model = small_model(made, family).eval()
    rows = [dict(audio=speech(s, i), words=None, prosody=None, emotion=0, row=i) for i, s in enumerate((1.0, 0.4, 0.7))]
    with torch.no_grad():
        together = model(**Collator()(rows)).emotion_distance
        alone = torch.cat([model(**Collator()([r])).emotion_distance for r in rows])
    assert together.shape == (3,) and (together > 0).all()
    if model.backbone.masked:
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- by a training

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with enough validation rows for a threshold, its backbone frozen and its features kept."""
    from prosody_ser.train import train
    folder, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    rows = {}
    for split, n in (("train", 24), ("val", 24), ("test", 8)):
        rows[split] = [dict(audio_filepath=f"{split}{i}.wav", emotion=("joy", "anger")[i % 2], speaker=f"{split}{i % 3}") for i in range(n)]
        for i, r in enumerate(rows[split]):
            t = np.arange(round(16000 * (0.6 + i / 50))) / 16000
            sf.write(folder / r["audio_filepath"], 0.05 * np.sin(2 * np.pi * (150, 400)[i % 2] * t) + 0.05 * rng.laplace(size=len(t)), 16000)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[split]))
    files = [folder / f"{s}.jsonl" for s in ("train", "val", "test")]
    return train(*files, save_dir=folder / "run", audio_base_path=folder, backbone="tiny", use_alpha_ser=True, num_epochs=2, num_workers=0, freeze_backbone=True,
                 feature_cache=str(folder / "cache"), checkpoint_interval=0, eval_steps=0), folder


def test_training_finds_it(trained):
    """From validation, with the model that is kept; the threshold is that of its own distances."""
    from prosody_ser.batches import SpeechDataset
    from prosody_ser.data import read_manifest
    run, folder = trained
    usual = load_checkpoint(run.best_model).config.usual
    val = SpeechDataset(read_manifest(folder / "val.jsonl"), folder, ["anger", "joy"])
    logits, distances = predict_emotions(load_checkpoint(run.best_model), val)
    assert logits.shape == (24, 2) and usual["distance"] == pytest.approx(distances.max(), abs=2e-3)     # kept features have 16 bits
    assert usual["seconds"] == 0.6
    assert load_checkpoint(run.best_model_file).config.usual == usual
    predict = Predictor(run.best_model, "cpu")
    assert [p.unusual for p in predict.many([folder / f"val{i}.wav" for i in range(24)])].count(None) >= 23
    assert "unlike the training data" in predict((0.2 * np.sin(np.arange(16000))).astype(np.float32)).unusual


def test_report_has_the_table(trained):
    run, _ = trained
    assert "unsure below 0.7" in run.summary.read_text() and "unsure below 0.7" in run.report.read_text()
    records = run.predictions()
    sure = [max(r["probabilities"].values()) >= 0.9 for r in records]
    line = next(x for x in run.summary.read_text().splitlines() if x.startswith("unsure below 0.9"))
    assert line.split()[3] == f"{np.mean(sure):.3f}"


def test_answer_is_plain_json():
    assert json.loads(json.dumps(emotion_answer(np.array([0.2, 0.8], np.float32), {0: "a", 1: "b"}, 0.9))) == {
        "emotion": UNSURE, "likeliest": "b", "probabilities": {"a": 0.2, "b": 0.8}}
