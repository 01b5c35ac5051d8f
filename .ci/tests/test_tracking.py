"""Trackers, each read back from what it has written: an offline run of Weights & Biases, TensorBoard's file; nothing imported unless asked."""
import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile as sf
from conftest import ROOT
from test_commands import TINY, command, manifests, train

BLOCK = 32768      # the log is cut into blocks; a record that does not fit is cut into pieces


def raw_records(data):
    """The records of a `.wandb` file: after 7 bytes of its own a log in LevelDB's form, pieces of (checksum, length, kind)."""
    assert data[:4] == b":W&B", data[:7]
    at, whole = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):                                # a whole record, or the last piece of one
            yield whole
            whole = b""


def offline_run(path):
    """Config, history, summary and the run's own record of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record
    config, history, summary, files, run, exit_code = {}, [], {}, {}, None, None
    key = lambda item: "/".join(item.nested_key) or item.key
    for raw in raw_records(path.read_bytes()):
        record = Record.FromString(raw)
        if record.HasField("run"):
            run = record.run
        for update in (record.run.config.update if record.HasField("run") else [], record.config.update):
            config |= {key(i): json.loads(i.value_json) for i in update}
        if record.HasField("history"):
            history.append({key(i): json.loads(i.value_json) for i in record.history.item})
        summary |= {key(i): json.loads(i.value_json) for i in record.summary.update}
        files |= {e.path: Path(e.local_path) for e in record.artifact.manifest.contents}
        if record.HasField("exit"):
            exit_code = record.exit.exit_code
    return dict(config=config, history=history, summary=summary, files=files, run=run, exit=exit_code, folder=path.parent)


def offline_runs(folder):
    """All offline runs below a folder, by name."""
    found = [offline_run(p) for p in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb"))]
    names = [r["run"].display_name for r in found]
    assert len(set(names)) == len(names), names
    return dict(zip(names, found))


def environment(folder, **more):
    """W&B without a network, its files in a folder of the test."""
    return os.environ | dict(WANDB_MODE="offline", WANDB_DIR=str(folder), WANDB_DATA_DIR=str(folder / "data"), WANDB_CACHE_DIR=str(folder / "cache"), WANDB_SILENT="true") | more


@pytest.fixture(scope="module")
def tracked(corpus, tmp_path_factory):
    """One run with W&B and TensorBoard."""
    folder = tmp_path_factory.mktemp("tracked")
    done = train(corpus, folder, "--use_wandb", "--wandb_project", "proj-x", "--experiment_name", "name-y", "--wandb_tags", "tag-1", "tag-2", "--report_to", "tensorboard",
                 "--gradient_checkpointing", "--num_epochs", "2", "--checkpoint_interval", "1", cwd=folder, env=environment(folder, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_wandb_has_settings_curves_and_scores(tracked):
    found = offline_runs(tracked)["name-y"]
    run, settings = found["run"], json.loads((tracked / "run/train_config.json").read_text())
    assert (run.project, list(run.tags), found["exit"]) == ("proj-x", ["tag-1", "tag-2"], 0)
    assert {k: found["config"].get(k, "missing") for k in settings} == settings          # all of ours, also where the trainer has another by that name
    past = json.loads((tracked / "run/training_history.json").read_text())
    for split, lines in (("train", past["train"]), ("eval", past["val"])):
        rows = [h for h in found["history"] if f"{split}/loss" in h]
        assert [h["train/global_step"] for h in rows] == [e["step"] for e in lines]
        for k in set().union(*lines) - {"step", "epoch"}:                                # whatever was logged has arrived; not every line has a gradient's share
            came, sent = ({i: h[n] for i, h in enumerate(some) if n in h} for some, n in ((rows, f"{split}/{k}"), (lines, k)))
            assert came == pytest.approx(sent, nan_ok=True), k
    assert {"train/ser/loss", "train/asr/loss", "train/prosody/loss", "train/asr/blank_penalty", "train/head_lr"} <= set().union(*found["history"])
    assert {"eval/asr/blank_rate", "eval/asr/empty_rate", "eval/ser/ua", "eval/ser/ua_floor"} <= set().union(*found["history"])
    metrics = json.loads((tracked / "run/test_results.json").read_text())["metrics"]
    assert {k: found["summary"][f"test/{k}"] for k in metrics if metrics[k] == metrics[k]} == pytest.approx({k: v for k, v in metrics.items() if v == v})
    assert found["summary"]["best/metric"] == "skill" and found["summary"]["best/skill"] == past["best"]["skill"] and found["summary"]["best/ser/macro_f1"] == past["best"]["ser/macro_f1"] and found["summary"]["best/epoch"] == past["best"]["epoch"]
    assert "CTC" in found["summary"]["test/advice"] or "WER" in found["summary"]["test/advice"] or found["summary"]["test/advice"] == "none"


def test_wandb_has_media(tracked):
    found = offline_runs(tracked)["name-y"]
    media = {k: v for h in found["history"] for k, v in h.items()}
    for name in ("test/confusion_matrix", "validation/confusion_matrix", "test/timeline_1", "test/timeline_2", "test/timeline_3"):
        assert media[f"{name}/_type"] == "image-file" and (found["folder"] / "files" / media[f"{name}/path"]).read_bytes()[:4] == b"\x89PNG", name
    table = json.loads((found["folder"] / "files" / media["test/samples/path"]).read_text())
    assert table["columns"][:4] == ["audio", "id", "reference", "hypothesis"] and len(table["data"]) == 6
    predictions = {r["id"]: r for r in map(json.loads, (tracked / "run/test/predictions.jsonl").read_text().splitlines())}
    for _, name, reference, hypothesis, emotion, predicted, p, *_ in table["data"]:
        r = predictions[name]
        assert (reference, hypothesis, emotion, predicted) == (r["text"], r["hypothesis"], r["emotion"], r["predicted_emotion"]) and p == r["probabilities"][predicted]
    sounds = [sf.info(p) for name, p in found["files"].items() if name.endswith(".wav")]       # the table's sound lies in its artifact: six of validation, six of the test
    assert len(sounds) == 12 and {s.samplerate for s in sounds} == {16000} and all(0.8 <= s.duration <= 1.2 for s in sounds)


def test_tensorboard_has_curves_and_media(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(tracked / "run/tensorboard"), size_guidance=dict(scalars=0, images=0, audio=0, tensors=0)).Reload()
    tags, past = board.Tags(), json.loads((tracked / "run/training_history.json").read_text())
    for k, lines in (("train/asr/loss", past["train"]), ("train/prosody/loss", past["train"]), ("eval/ser/ua", past["val"])):
        assert [(s.step, s.value) for s in board.Scalars(k)] == [(e["step"], pytest.approx(e[k.split("/", 1)[1]])) for e in lines], k
    metrics = json.loads((tracked / "run/test_results.json").read_text())["metrics"]
    assert board.Scalars("test/asr/wer")[0].value == pytest.approx(metrics["asr/wer"])
    assert {"test/confusion_matrix", "test/timeline_1"} <= set(tags["images"]) and board.Images("test/confusion_matrix")[0].encoded_image_string[:4] == b"\x89PNG"
    assert any(t.startswith("test/") for t in tags["audio"]) and "test/samples/text_summary" in tags["tensors"]


def test_resumed_run_goes_on_in_the_same_wandb_run(tracked, corpus):
    """A new process, the same id."""
    before = offline_runs(tracked)["name-y"]["run"].run_id
    assert json.loads((tracked / "run/wandb_run.json").read_text())["id"] == before
    other = tracked / "other"
    other.mkdir()
    done = train(corpus, tracked, "--use_wandb", "--gradient_checkpointing", "--num_epochs", "3", "--checkpoint_interval", "1", "--resume", "--no_track_audio", cwd=other, env=environment(other, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = offline_runs(other).values()
    assert found["run"].run_id == before and [h["train/global_step"] for h in found["history"] if "eval/loss" in h] == [9]
    table = next(h["test/samples/path"] for h in found["history"] if "test/samples/path" in h)
    assert [row[0] for row in json.loads((found["folder"] / "files" / table).read_text())["data"]] == [None] * 6 and not any(n.endswith(".wav") for n in found["files"])   # no sound was sent


def test_each_run_of_a_study_is_a_run_of_its_own(corpus, tmp_path):
    done = train(corpus, tmp_path, "--run_ablation_study", "--ablation_alphas", "0", "0.5", "--ablation_epochs", "1", "--experiment_name", "akan", "--use_wandb", "--use_alpha_ser", "--use_alpha_asr",
                 cwd=tmp_path, env=environment(tmp_path, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr[-2000:]
    found = offline_runs(tmp_path)
    assert set(found) == {"akan ablation-alpha_0_seed_0", "akan ablation-alpha_0.5_seed_0", "akan final"}
    assert {(r["run"].run_group, r["exit"]) for r in found.values()} == {("akan", 0)} and len({r["run"].run_id for r in found.values()}) == 3
    assert {n: r["config"]["alpha_asr"] for n, r in found.items() if n != "akan final"} == {"akan ablation-alpha_0_seed_0": 0, "akan ablation-alpha_0.5_seed_0": 0.5}
    assert [n for n, r in found.items() if "test/ser/ua" in r["summary"]] == ["akan final"]                # the others are never tested,
    assert all(any("validation/confusion_matrix/path" in h for h in r["history"]) and "best/ser/macro_f1" in r["summary"] for r in found.values())   # but say how they did


def test_a_failed_run_is_shown_as_failed(corpus, tmp_path):
    code = """
import sys; from prosody_ser.config import TrainConfig; from prosody_ser.parsing import parse_args; from prosody_ser.train import run_training; from prosody_ser.trainer import MTLTrainer
MTLTrainer.train = lambda *a, **k: 1 / 0
run_training(parse_args(TrainConfig, sys.argv[1:]))"""
    argv = ["--audio_base_path", corpus, *manifests(corpus), "--tokenizer_path", tmp_path / "tok.model", "--save_dir", tmp_path / "run", *TINY, "--use_wandb"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, env=environment(tmp_path))
    assert "ZeroDivisionError" in done.stderr, done.stderr[-2000:]
    (found,) = offline_runs(tmp_path).values()
    assert found["exit"] == 1


def test_without_asking_no_tracker_is_imported(corpus, tmp_path):
    """A whole run, then what the process has imported."""
    code = """
import sys; from prosody_ser.config import TrainConfig; from prosody_ser.parsing import parse_args; from prosody_ser.cli import quiet_libraries, train_and_report
quiet_libraries(); train_and_report(parse_args(TrainConfig, sys.argv[1:]))
print("IMPORTED", sorted({m.split(".")[0] for m in sys.modules} & {"wandb", "trackio", "tensorboard", "mlflow"}))"""
    argv = ["--audio_base_path", corpus, *manifests(corpus), "--tokenizer_path", tmp_path / "tok.model", "--save_dir", tmp_path / "run", *TINY]
    for more, expected in (([], "IMPORTED []"), (["--report_to", "tensorboard"], "IMPORTED ['tensorboard']")):
        done = subprocess.run([sys.executable, "-c", code, *map(str, argv + more)], cwd=ROOT, capture_output=True, text=True)
        assert expected in done.stdout, done.stdout[-500:] + done.stderr[-2000:]
    assert not (tmp_path / "wandb").exists()


def test_missing_or_misspelled_tracker(corpus, tmp_path):
    """One sentence, before anything is written. swanlab is none of our requirements."""
    if not __import__("importlib.util").util.find_spec("swanlab"):
        done = train(corpus, tmp_path, "--report_to", "swanlab")
        assert done.returncode == 1 and done.stderr.splitlines()[-1] == "error: --report_to swanlab needs the swanlab package: pip install swanlab."
    done = train(corpus, tmp_path, "--report_to", "tensorbord")
    assert done.returncode == 2 and "invalid choice: 'tensorbord'" in done.stderr
    done = train(corpus, tmp_path, "--use_wandb", env={k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | dict(HOME=str(tmp_path), WANDB_MODE="online", WANDB_DIR=str(tmp_path), WANDB_API_KEY=""))
    assert done.returncode == 1 and "wandb login" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr[-2000:]


def test_trackio(corpus, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    done = train(corpus, tmp_path, "--report_to", "trackio", "--wandb_project", "proj-x", "--experiment_name", "name-y", "--wandb_group", "g", env=os.environ | dict(TRACKIO_DIR=str(tmp_path / "trackio")))
    assert done.returncode == 0, done.stderr[-2000:]
    board = sqlite3.connect(tmp_path / "trackio/proj-x.db")
    history = [json.loads(m) for (m,) in board.execute("select metrics from metrics")]
    ((name, settings),) = board.execute("select run_name, config from configs")
    settings = json.loads(settings)
    assert (name, settings["_Group"], settings["alpha_asr"], settings["select_by"]) == ("name-y", "g", 0.1, None)
    assert {"train/ser/loss", "train/prosody/loss", "eval/ser/ua", "test/ser/ua", "best/ser/macro_f1", "test/samples", "test/confusion_matrix", "test/timeline_1"} <= set().union(*history)
    metrics = json.loads((tmp_path / "run/test_results.json").read_text())["metrics"]
    assert [h["test/ser/ua"] for h in history if "test/ser/ua" in h] == [metrics["ser/ua"]]
