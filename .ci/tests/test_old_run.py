"""A run folder of commit 12d1b48 is read by this one: its facts, its models, its checkpoint."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read
from test_commands import command
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from prosody_ser.config import TrainConfig
from prosody_ser.batches import SpeechDataset
from prosody_ser.data import read_manifest
from prosody_ser.inference import predict
from prosody_ser.model import load_checkpoint
from prosody_ser.run import Run, find_runs, read_facts

OLD = Path(__file__).parent / "old_run" / "run"


@pytest.fixture(scope="module")
def home(corpus, tmp_path_factory):
    """The folder that the run was started in: corpus, backbone, and a copy of the run."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "corpus").symlink_to(corpus)
    shutil.copytree(OLD, folder / "run")
    torch.manual_seed(0)
    small = dict(d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=16, max_source_positions=200)
    WhisperEncoder(WhisperConfig(**small)).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=16).save_pretrained(folder / "whisper")
    return folder


def test_it_opens():
    run = Run(OLD)
    assert run.is_finished and run.is_tested and run.latest_checkpoint() == OLD / "checkpoint-4"
    assert (run.metric, run.best["epoch"], run.config.backbone) == ("ser/macro_f1", 2, "whisper")
    assert set(run.settings) == set(TrainConfig.__dataclass_fields__)              # newer settings have their defaults
    assert run.metrics["ser/ua"] == pytest.approx(5 / 6)
    assert len(run.predictions()) == len(run.predictions("validation")) == 6
    assert "trained and tested" in repr(run) and "0.833" in run._repr_html_()
    assert find_runs([OLD.parent]) == [OLD] and read_facts(OLD)["test"] == run.metrics


def test_its_rows_are_recognised(home, monkeypatch):
    """The digests of rows and tokenizer are those of the commit that wrote them, so that a study does not repeat the run."""
    monkeypatch.chdir(home)
    run = Run("run")
    assert run.changed_inputs(run.config) == [] and run.same_settings(run.config)


@pytest.mark.parametrize("name", ["best_model", "best_model.pt"])
def test_its_model_predicts_what_it_did(corpus, name):
    recorded = read(OLD / "test" / "predictions.jsonl")
    test = SpeechDataset(read_manifest(corpus / "test.jsonl"), corpus, ["anger", "joy"])
    records = predict(load_checkpoint(OLD / name), test, decode="greedy")
    for new, old in zip(records, recorded, strict=True):
        assert new["predicted_emotion"] == old["predicted_emotion"]
        assert new["probabilities"] == pytest.approx(old["probabilities"], abs=1e-4)
        assert new["prominence"] == pytest.approx(old["prominence"], abs=1e-4)


NAMES = ("audio_base_path", "train_jsonl", "val_jsonl", "test_jsonl", "tokenizer_path", "tokenizer_type", "vocab_size", "backbone", "backbone_path",
         "checkpoint_interval", "num_workers", "gradient_accumulation_steps", "backbone_lr", "head_lr")


def train_as_then(home, save_dir, *more):
    """The command of the run, by its own record of settings."""
    settings = json.loads((OLD / "train_config.json").read_text())
    done = command("prosody_ser.train", *(x for n in NAMES for x in (f"--{n}", settings[n])), "--save_dir", save_dir, *more, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done, Run(home / save_dir)


def test_the_same_command_learns_the_same(home):
    """A seed gives the weights, the order and the losses that it gave then."""
    _, run = train_as_then(home, "anew", "--num_epochs", "2")
    assert load_checkpoint(run.best_model).config.usable_tokens == 1
    then = Run(OLD).history
    for split in ("train", "val"):
        for new, old in zip(run.history[split], then[split], strict=True):
            compared = [k for k in old if "runtime" not in k and "per_second" not in k]
            assert {k: new[k] for k in compared} == pytest.approx({k: old[k] for k in compared}, rel=1e-3, abs=1e-3, nan_ok=True)


def test_it_goes_on(home):
    done, run = train_as_then(home, "run", "--num_epochs", "3", "--resume")
    assert "going on from run/checkpoint-4" in done.stdout and [e["epoch"] for e in run.history["val"]] == [1, 2, 3]
    assert run.history["val"][:2] == Run(OLD).history["val"]
    rule = json.loads((run.best_model / "config.json").read_text())["usable_tokens"]
    assert "usable_tokens" not in json.loads((OLD / "best_model/config.json").read_text()) and rule == 2      # it places words as it began
    assert load_checkpoint(OLD / "best_model").config.usable_tokens == load_checkpoint(OLD / "best_model.pt").config.usable_tokens == 2


def test_it_is_evaluated(corpus, tmp_path):
    done = command("prosody_ser.evaluate", "--checkpoint_path", OLD / "best_model", "--tokenizer_path", OLD / "tok.model", "--audio_base_path", corpus,
                   "--test_jsonl", corpus / "test.jsonl", "--device", "cpu", "--output_dir", tmp_path / "eval")
    assert done.returncode == 0, done.stderr[-3000:]
    found, recorded = json.loads((tmp_path / "eval" / "test_metrics.json").read_text()), Run(OLD).metrics
    compared = [k for k in recorded if not k.endswith(("_low", "_high"))]              # the drawing of intervals may change
    assert {k: found[k] for k in compared} == pytest.approx({k: recorded[k] for k in compared}, abs=1e-4, nan_ok=True)
