"""A batch that does not fit into the memory goes in two halves, in training and where a model answers; with a word."""
import warnings

import pytest
import torch
from test_flags import config
from transformers import TrainerCallback

from prosody_ser.backbones import RunningNorm
from prosody_ser.config import TrainingError
from prosody_ser.data import read_manifest
from prosody_ser.inference import FeatureCache, Predictor, predict
from prosody_ser.model import ProsodySER
from prosody_ser.train import build_model, load_splits, prepare_tokenizer
from prosody_ser.trainer import build_trainer


def with_room(monkeypatch, kind, rows, name="forward"):
    """A class of modules whose forward pass has room for so many rows; the sizes that came."""
    forward, came = getattr(kind, name), []

    def small(self, *args, **inputs):
        came.append(len(args[0] if args else inputs["row"]))
        if came[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, **inputs)
    monkeypatch.setattr(kind, name, small)
    return came


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first step of the optimiser."""
    gradient = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


def trained(corpus, folder, **more):
    """A trainer that has trained, and the gradient of its first step."""
    c = config(corpus, folder, head_dropout=0.0, spec_augment=False, batching="random", use_alpha_ser=True, **more)
    data = load_splits(c)
    model = build_model(c, data["train"], prepare_tokenizer(c, data["train"].utterances))
    for layer in model.modules():                   # two halves draw other numbers than a whole
        if isinstance(getattr(layer, "dropout", None), float):
            layer.dropout = 0.0
    trainer = build_trainer(c, model, data)
    trainer.add_callback(kept := FirstGradient())
    trainer.train()
    return trainer, kept.gradient


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_halves_gradient_is_the_whole_s(corpus, tmp_path, monkeypatch, accumulation):
    monkeypatch.setattr(RunningNorm, "update", lambda *_: None)         # two halves are two batches to a running mean
    _, whole = trained(corpus, tmp_path / "whole", gradient_accumulation_steps=accumulation)
    came = with_room(monkeypatch, ProsodySER, 3)
    with pytest.warns(UserWarning, match="a batch of 4 utterances of .* in two halves.*--gradient_checkpointing"):
        _, halved = trained(corpus, tmp_path / "halves", gradient_accumulation_steps=accumulation)
    assert came[:3] == [4, 2, 2] and whole.abs().max() > 1e-3
    assert (whole - halved).abs().max() < 1e-5 * whole.abs().max()


def test_not_even_a_half(corpus, tmp_path, monkeypatch):
    with_room(monkeypatch, ProsodySER, 1)
    with pytest.warns(UserWarning), pytest.raises(TrainingError, match="even hold a batch of 2 utterances.*--max_batch_seconds.*prosody-ser memory"):
        trained(corpus, tmp_path)


def test_answers_in_halves_are_the_same(corpus, tmp_path, monkeypatch):
    trainer, _ = trained(corpus, tmp_path)
    model, dataset = trainer.model, trainer.eval_dataset
    model.processor = getattr(model, "processor", None) or trainer.processing_class
    assert read_manifest(corpus / "val.jsonl") == list(dataset.utterances)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = predict(model, dataset, 4, "greedy", "cpu", False, 0)
    with_room(monkeypatch, ProsodySER, 2)
    with pytest.warns(UserWarning, match="in two halves"):
        halved = predict(model, dataset, 4, "greedy", "cpu", False, 0)
    assert [r["predicted_emotion"] for r in whole] == [r["predicted_emotion"] for r in halved]
    assert all(abs(a["probabilities"][k] - b["probabilities"][k]) < 1e-4 for a, b in zip(whole, halved, strict=True) for k in a["probabilities"])


def test_features_in_halves(corpus, tmp_path, monkeypatch):
    trainer, _ = trained(corpus, tmp_path / "run")
    kind, dataset = type(trainer.model.backbone), trainer.eval_dataset
    files = []
    for name in ("whole", "halves"):
        cache = FeatureCache(tmp_path / name, trainer.model)
        if name == "halves":
            with_room(monkeypatch, kind, 2)
            with pytest.warns(UserWarning, match="in two halves"):
                cache.fill(trainer.model, dataset, 4, "cpu")
        else:
            cache.fill(trainer.model, dataset, 4, "cpu")
        files.append({key: cache(key) for key in cache.index})
    assert files[0].keys() == files[1].keys() and len(files[0]) == 6
    assert all(abs(files[0][k] - files[1][k]).max() < 1e-2 for k in files[0])


def test_answers_in_halves(corpus, tmp_path, monkeypatch):
    """Many recordings: halves where a batch does not fit, the same answers; where one does not fit, its error in its place."""
    c = config(corpus, tmp_path)
    data = load_splits(c)
    model = build_model(c, data["train"], prepare_tokenizer(c, data["train"].utterances))
    rows = read_manifest(corpus / "test.jsonl", corpus)
    predictor = Predictor(model, "cpu")
    wanted = [predictor(u) for u in rows]
    came = with_room(monkeypatch, ProsodySER, 3, "encode")
    with pytest.warns(UserWarning, match="goes in two halves"):
        assert list(predictor.many(rows)) == wanted
    assert came == [6, 3, 3]
    with_room(monkeypatch, ProsodySER, 0, "encode")
    found = list(predictor.many(rows[:1], keep_errors=True))
    assert "does not hold a single utterance" in str(found[0])
    with pytest.raises(TrainingError):
        next(predictor.many(rows[:1]))
