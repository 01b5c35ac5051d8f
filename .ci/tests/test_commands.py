"""The commands, as users type them, each in a process of its own."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, needs, read, write
from forge import python
from prosody_ser.run import Run

TINY = "--backbone tiny --vocab_size 30 --num_epochs 1 --batch_size 4 --gradient_accumulation_steps 1 --num_workers 0 --log_steps 1".split()


def command(*argv, cwd=ROOT, **more):
    """Run `python -m ...` and return its result."""
    return python("-m", *argv, cwd=cwd, **more)


def manifests(folder):
    return [x for s in ("train", "val", "test") for x in (f"--{s}_jsonl", folder / f"{s}.jsonl")]


def train(corpus, folder, *more, **kwargs):
    """A quick training run on the small corpus."""
    return command("prosody_ser.train", "--audio_base_path", corpus, *manifests(corpus), "--tokenizer_path", folder / "tok.model",
                   "--save_dir", folder / "run", *TINY, *more, **kwargs)


def test_train_evaluate_predict(corpus, tmp_path):
    """Training leaves everything it promises, and evaluation scores what training saved the same."""
    done = train(corpus, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    for name in ("best_model/model.safetensors", "best_model/tokenizer.model", "best_model/preprocessor_config.json", "best_model/README.md", "best_model.pt",
                 "training_history.json", "training_history.png", "test_results.json", "results_summary.txt", "train_config.json",
                 "test/predictions.jsonl", "test/confusion_matrix.png", "test/calibration.png", "test/abstention.png", "test/report.html"):
        assert (run / name).is_file(), name
    assert "emotion UA" in done.stdout and str(run / "best_model") in done.stdout
    page = (run / "test/report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 3 and "http" not in page and "WER normalised" in page
    assert json.loads((run / "best_model/config.json").read_text())["emotion_temperature"] == 1      # six validation rows are too few
    assert "temperature 1, not fitted" in (run / "results_summary.txt").read_text()
    for checkpoint in (run / "best_model", run / "best_model.pt"):
        done = command("prosody_ser.evaluate", "--checkpoint_path", checkpoint, "--tokenizer_path", tmp_path / "tok.model", "--audio_base_path", corpus,
                       "--test_jsonl", corpus / "test.jsonl", "--device", "cpu", "--output_dir", tmp_path / "eval")
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads((tmp_path / "eval/test_metrics.json").read_text()) == pytest.approx(json.loads((run / "test_results.json").read_text())["metrics"], nan_ok=True)
    done = command("prosody_ser.cli", "predict", corpus / "test0.wav", "--checkpoint_path", run / "best_model")
    assert done.returncode == 0 and json.loads(done.stdout)["emotion"] in ("anger", "joy")


@pytest.mark.parametrize("heads", ["ser", "asr", "prosody", "ser asr", "ser prosody", "asr prosody"])
def test_subsets_of_heads(corpus, tmp_path, heads):
    """Any subset trains, is tested, and reports its own metrics only."""
    done = train(corpus, tmp_path, *(f"--use_alpha_{h}" for h in heads.split()))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {k.split("/")[0] for k in json.loads((tmp_path / "run/test_results.json").read_text())["metrics"]} == set(heads.split())
    done = command("prosody_ser.evaluate", "--checkpoint_path", tmp_path / "run/best_model", "--tokenizer_path", tmp_path / "tok.model",
                   "--audio_base_path", corpus, "--test_jsonl", corpus / "test.jsonl", "--output_dir", tmp_path / "eval")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_test_set_that_was_trained_on_is_told(corpus, tmp_path):
    """Beside the scores, on the console, in the summary and in the report; a name that no row has is told, too."""
    shutil.copy(corpus / "train.jsonl", tmp_path / "test.jsonl")
    done = train(corpus, tmp_path, "--test_jsonl", tmp_path / "test.jsonl")
    n = len(read(corpus / "train.jsonl"))
    told = f"beware: {n} of {n} test utterances are in the training or validation set too."
    places = done.stdout, (tmp_path / "run/results_summary.txt").read_text(), (tmp_path / "run/test/report.html").read_text()
    assert all(told in text for text in places), done.stderr[-2000:]
    done = command("prosody_ser.evaluate", "--checkpoint_path", tmp_path / "run/best_model", "--audio_base_path", corpus, "--test_jsonl", corpus / "test.jsonl",
                   "--output_dir", tmp_path / "eval", "--emotion_map", "joi=joy,anger=anger")
    assert done.returncode == 0 and "no row has the emotion joi; there are anger, joy" in done.stderr, done.stderr[-2000:]
    assert "training or validation set too" not in (tmp_path / "eval/summary.txt").read_text()


def test_an_evaluation_on_training_rows_is_told(corpus, tmp_path):
    """By the manifests of the run: of each row, however its folder is spelt, from Python too; not where they were changed since."""
    folder = shutil.copytree(corpus, tmp_path / "data")
    assert train(folder, tmp_path).returncode == 0
    both = [*read(folder / "test.jsonl"), *read(folder / "train.jsonl"), *read(folder / "val.jsonl")]
    n = len(both) - len(read(folder / "test.jsonl"))
    (folder / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    how = ["prosody_ser.evaluate", "--checkpoint_path", tmp_path / "run/best_model", "--output_dir", tmp_path / "eval", "--test_jsonl", folder / "both.jsonl"]
    told = f"beware: {n} of {len(both)} test utterances are in the training or validation set too."
    done = command(*how, "--audio_base_path", f"{tmp_path}/data/../data/")
    assert done.returncode == 0, done.stderr[-2000:]
    places = done.stdout, (tmp_path / "eval/summary.txt").read_text(), (tmp_path / "eval/report.html").read_text()
    assert all(told in text for text in places), done.stdout + done.stderr[-2000:]
    scores = Run(tmp_path / "run").evaluate(folder / "val.jsonl", device="cpu")
    assert any("validation set too" in w for w in scores.warnings)
    about = Run(tmp_path / "run").evaluate(folder / "val.jsonl", device="cpu", about=dict(tested="elsewhere"))      # as a cross-corpus study has it
    assert about.settings["tested"] == "elsewhere" and about.settings["seen"] == scores.settings["seen"]
    old = json.loads((tmp_path / "run/train_config.json").read_text())
    (tmp_path / "run/train_config.json").write_text(json.dumps({k: v for k, v in old.items() if k != "emotion_map"}))       # of an earlier version
    assert "seen" in Run(tmp_path / "run").evaluate(folder / "val.jsonl", device="cpu").settings
    rows = read(folder / "train.jsonl")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert told not in (done := command(*how, "--audio_base_path", folder)).stdout and done.returncode == 0, done.stderr[-2000:]


def test_files_and_folders_in_the_way(corpus, tmp_path, command):
    """One sentence that says what is there, and no number of an error."""
    for argv, told in ((("crossval", "--fold_dir", tmp_path / "none", "--audio_base_path", corpus), "none: there is no such file or folder"),
                       (("audit", corpus / "train.jsonl", "--plot", tmp_path), "a figure is a PNG file"),
                       (("tokenizer", tmp_path, "--tokenizer_path", tmp_path / "t.model"), "a folder, not a file"),
                       (("crossval", "--manifests", *(corpus / f"{s}.jsonl" for s in ("train", "val", "test")), "--audio_base_path", corpus, "--folds", 3, "--only", 9, "--save_dir", tmp_path / "cv"),
                        "--only 9: the folds are 0, 1, 2")):
        code, printed = command(*argv)
        assert told in printed and "Errno" not in printed, printed
        assert code == 1
    code, printed = command("memory", "--seconds", "30")
    assert code == 0 and "a batch of 2 x 30 s (with --batch_size 8 a batch has at most 80 s: --max_batch_seconds)" in printed
    write(tmp_path / "nobody.jsonl", [{k: v for k, v in r.items() if k != "speaker"} for r in read(corpus / "train.jsonl")])
    with pytest.warns(UserWarning, match="nobody.jsonl: --speaker fits no name of a file, such as train0.wav"):
        assert command("audit", tmp_path / "nobody.jsonl", "--speaker", "(?P<speaker>x9)_")[0] == 0


def broken(corpus, tmp_path, change, split="train"):
    """The answer to a run whose manifest was changed: `change(rows)` edits them."""
    for s in ("train", "val", "test"):
        shutil.copy(corpus / f"{s}.jsonl", tmp_path)
    rows = read(tmp_path / f"{split}.jsonl")
    change(rows)
    write(tmp_path / f"{split}.jsonl", rows)
    done = command("prosody_ser.train", "--audio_base_path", corpus, *manifests(tmp_path), "--tokenizer_path", tmp_path / "tok.model", "--save_dir", tmp_path / "run", *TINY)
    assert done.returncode != 0 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    return done.stderr.splitlines()


def edit(**fields):
    return lambda rows: rows[2].update(fields)


BAD = {
    "missing file": (edit(audio_filepath="gone.wav"), ["train.jsonl:3", "gone.wav", "no such audio file"]),
    "corrupt audio": (edit(audio_filepath="tok.txt"), ["train.jsonl:3", "tok.txt", "cannot be decoded"]),
    "empty manifest": (lambda rows: rows.clear(), ["train.jsonl", "empty"]),
    "length mismatch": (edit(prosody_annotations=[1]), ["train.jsonl:3", "2 words but 1 prosody_annotations"]),
    "empty word": (edit(words=["a", " "], prosody_annotations=None), ["train.jsonl:3", "non-empty"]),
    "no labelled row": (lambda rows: [r.update(emotion=None) for r in rows], ["train.jsonl", "no row has a label for the emotion head"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(corpus, tmp_path, name):
    """One message that names file, line and problem; nothing begun."""
    (corpus / "tok.txt").write_text("not audio")
    change, said = BAD[name]
    message = " ".join(broken(corpus, tmp_path, change))
    for part in said:
        assert part in message, message


def test_unknown_emotion(corpus, tmp_path):
    message = " ".join(broken(corpus, tmp_path, edit(emotion="bliss"), "val"))
    assert "val.jsonl:3: unknown emotion 'bliss'" in message


def test_wrong_tokenizer(corpus, tmp_path):
    """A tokenizer of another size than the checkpoint's is refused."""
    assert train(corpus, tmp_path).returncode == 0
    done = command("prosody_ser.cli", "tokenizer", corpus / "train.jsonl", "--tokenizer_path", tmp_path / "other.model", "--vocab_size", "20")
    assert done.returncode == 0, done.stderr
    done = command("prosody_ser.evaluate", "--checkpoint_path", tmp_path / "run/best_model", "--tokenizer_path", tmp_path / "other.model",
                   "--audio_base_path", corpus, "--test_jsonl", corpus / "test.jsonl", "--output_dir", tmp_path / "eval")
    assert done.returncode and "20 pieces, the checkpoint 30" in done.stderr and "Traceback" not in done.stderr


def test_rows_without_a_label_train_the_other_tasks(corpus, tmp_path):
    """Emotion-only, transcript-only and unlabelled rows join in."""
    rows = read(corpus / "train.jsonl")
    for i, r in enumerate(rows):
        for k in (["emotion"], ["words", "prosody_annotations"], ["prosody_annotations"], [])[i % 4]:
            r[k] = None
    write(tmp_path / "train.jsonl", rows)
    for s in ("val", "test"):
        shutil.copy(corpus / f"{s}.jsonl", tmp_path)
    done = command("prosody_ser.train", "--audio_base_path", corpus, *manifests(tmp_path), "--tokenizer_path", tmp_path / "tok.model", "--save_dir", tmp_path / "run", *TINY)
    assert done.returncode == 0, done.stderr[-2000:]


def test_resume(corpus, tmp_path):
    """A finished run goes on with --resume to a larger number of epochs."""
    assert train(corpus, tmp_path, "--checkpoint_interval", "1").returncode == 0
    done = train(corpus, tmp_path, "--checkpoint_interval", "1", "--num_epochs", "2", "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((tmp_path / "run/training_history.json").read_text())
    assert [e["epoch"] for e in history["val"]] == [1, 2] and len(history["train"]) == 6


def test_ablation_command(corpus, tmp_path):
    """The study trains each alpha and the final model."""
    done = train(corpus, tmp_path, "--run_ablation_study", "--ablation_alphas", "0", "0.5", "--ablation_epochs", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    study = json.loads((tmp_path / "run/ablation_results.json").read_text())
    assert [r["alpha"] for r in study["table"]] == [0.0, 0.5] and (tmp_path / "run/ablation.png").is_file()


def test_ablation_goes_on(corpus, tmp_path):
    """The subcommand, over both weights: a run that diverged is recorded, the study ends, and started again it repeats that run alone."""
    def study(*more):
        argv = ["--audio_base_path", corpus, *manifests(corpus), "--tokenizer_path", tmp_path / "tok.model", "--save_dir", tmp_path / "run", *TINY]
        return command("prosody_ser.cli", "ablation", *argv, "--ablation_mode", "grid", "--ablation_alphas", *more, "--ablation_epochs", "1", "--max_grad_norm", "0")
    done = study("0", "1e36", "--head_lr", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 of 4 runs failed" in done.stdout or "3 of 4 runs failed" in done.stdout, done.stdout
    first = json.loads((tmp_path / "run/ablation_results.json").read_text())
    assert (first["mode"], set(first["best"])) == ("grid", {"alpha_asr", "alpha_prosody"}) and all("not a finite number" in r["error"] for r in first["failed"])
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/ablation").rglob("best_model/model.safetensors")}
    assert study("0", "1e36", "--head_lr", "1").returncode == 0
    assert kept and all(p.stat().st_mtime_ns == t for p, t in kept.items())
    done = study("1e36", "--head_lr", "1")
    assert done.returncode == 1 and "all 1 runs of the study failed" in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]


def test_learned_weights(corpus, tmp_path):
    """They are in the results, the history and the checkpoint, and evaluation loads it."""
    done = train(corpus, tmp_path, "--alpha_mode", "uncertainty", "--grad_share_steps", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    settings = json.loads((tmp_path / "run/test_results.json").read_text())["settings"]
    assert settings["alphas"] == dict(ser=1.0, asr=0.1, prosody=0.1) and set(settings["learned_alphas"]) == {"ser", "asr", "prosody"} and settings["learned_alphas"] != settings["alphas"]
    assert "learned_alphas" in (tmp_path / "run/results_summary.txt").read_text() and "learned from there" in (tmp_path / "run/best_model/README.md").read_text()
    assert all({"asr/alpha", "asr/grad_share", "asr/grad_cosine"} <= e.keys() for e in json.loads((tmp_path / "run/training_history.json").read_text())["train"])
    argv = ["--checkpoint_path", tmp_path / "run/best_model.pt", "--tokenizer_path", tmp_path / "tok.model", "--audio_base_path", corpus,
            "--test_jsonl", corpus / "test.jsonl", "--device", "cpu", "--output_dir", tmp_path / "eval"]
    done = subprocess.run([sys.executable, "-m", "prosody_ser.evaluate", *map(str, argv)], cwd=ROOT, capture_output=True, text=True)      # no fork: it loads what it needs
    assert done.returncode == 0, done.stderr[-2000:]


def test_papermill(corpus, tmp_path):
    """Flags are parameters; a misspelled one raises."""
    data = [x for k, v in [("audio_base_path", corpus), *[(f"{s}_jsonl", corpus / f"{s}.jsonl") for s in ("train", "val", "test")], ("tokenizer_path", tmp_path / "tok.model")]
            for x in ("-p", k, str(v))]
    run = lambda *p: subprocess.run(["papermill", "nbs/train.ipynb", str(tmp_path / "out.ipynb"), "--cwd", str(tmp_path), "-p", "save_dir", str(tmp_path / "run"),
                                     "-p", "num_epochs", "1", "-p", "backbone", "tiny", "-p", "vocab_size", "30", *data, *p], cwd=ROOT, capture_output=True, text=True)
    done = run("-p", "alpha_asr", "0.7")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run/train_config.json").read_text())["alpha_asr"] == 0.7
    done = run("-p", "alpha_arc", "0.7")
    assert done.returncode and "did you mean 'alpha_asr'" in done.stderr


def test_demo_learns(tmp_path):
    """The README's first command: unseen speakers, all three tasks above their marks. `.ci/run` has trained it already, with the plain install; it says where."""
    there = os.environ.get("DEMO_RUN")
    folder = Path(there or tmp_path / "demo")
    if not there:
        done = command("prosody_ser.cli", "demo", "--save_dir", folder)
        assert done.returncode == 0, done.stderr[-2000:]
    print((folder / "results_summary.txt").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "test_results.json").read_text())["metrics"]
    assert metrics["ser/ua"] >= 0.80 and metrics["prosody/f1"] >= 0.70 and metrics["asr/wer"] <= 0.60, metrics


@needs(SHARED / "data/emodb2s")
def test_users_commands_on_real_speech(tmp_path):
    """The users' two commands with real pretrained weights, one epoch."""
    weights = tmp_path / "whisper-tiny"
    done = subprocess.run([sys.executable, SHARED / "tools/whisper_weights.py", "tiny", weights], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the pretrained weights could not be made: {done.stderr.splitlines()[-1]}")
    data, run = SHARED / "data/emodb2s", tmp_path / "emodb"
    done = command("prosody_ser.train", "--audio_base_path", data, *manifests(data), "--backbone", "whisper", "--backbone_path", weights,
                   "--tokenizer_path", run / "tok.model", "--retrain_tokenizer", "--vocab_size", 200, "--num_epochs", 1, "--save_dir", run,
                   "--use_alpha_ser", "--use_alpha_asr", "--use_alpha_prosody")
    assert done.returncode == 0, done.stderr[-2000:]
    done = command("prosody_ser.evaluate", "--checkpoint_path", run / "best_model", "--tokenizer_path", run / "tok.model", "--audio_base_path", data,
                   "--test_jsonl", data / "test.jsonl", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p.name for p in (tmp_path / "eval_results").iterdir()} == {"test_metrics.json", "eval_config.json", "summary.txt", "predictions.jsonl", "confusion_matrix.png", "calibration.png", "abstention.png", "report.html"}


@needs(SHARED / "data/akan")
def test_akan_manifests_and_tokenizer():
    """The users' real manifests and model load as they are."""
    from prosody_ser.data import emotion_names, read_manifest
    from prosody_ser.text import clean
    from prosody_ser.tokenizer import SentencePieceTokenizer
    train, val = (read_manifest(SHARED / f"data/akan/{s}.jsonl") for s in ("train", "val"))
    assert (len(train), len(val)) == (4483, 931)
    names = emotion_names(train, ["akan"])
    assert len(emotion_names(train)) == 9 and names[7] == "joy"
    tokenizer = SentencePieceTokenizer(model_path=SHARED / "data/akan/akan_mtl_tokenizer.model", vocab_size=16000).load_tokenizer()
    assert (tokenizer.pad_id, tokenizer.blank_id, len(tokenizer)) == (3, 4, 16000)
    encoded = [tokenizer.encode_words(u.words)[0] for u in train]
    assert encoded == [tokenizer.sp.encode(clean(u.text)) for u in train]   # word by word is the sentence, without characters that nobody sees
    known = [(u, ids) for u, ids in zip(train, encoded) if tokenizer.unk_id not in ids]
    assert len(known) > 3500 and all(tokenizer.decode(ids) == clean(u.text) for u, ids in known)
