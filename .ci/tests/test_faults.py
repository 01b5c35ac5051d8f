"""What goes wrong in practice: kills, full disks, interrupts, second runs, folders of the user's, paths and missing numbers.

Processes are forked from one that has PyTorch loaded already, see `forge.py`: a start then costs nothing, and a kill can come at any moment.
PROSODY_SER_KILLS=50 kills as often; CI is content with fewer."""
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import read
from forge import forge as forged

TINY = dict(backbone="tiny", tokenizer_type="char", vocab_size=30, batch_size=4, gradient_accumulation_steps=1, num_workers=0, log_steps=1, eval_steps=0,
            checkpoint_interval=1, decode_method="greedy", num_epochs=1)
KILLS = int(os.environ.get("PROSODY_SER_KILLS", 10))


def flags(**settings):
    """Settings as a command line."""
    return [x for k, v in settings.items() for x in ([f"--{k}"] if v is True else [f"--{k}", *map(str, v if isinstance(v, list) else [v])])]


def on(corpus, save_dir="run", **more):
    """A quick training on a corpus."""
    return ["train", *flags(audio_base_path=corpus, **{f"{s}_jsonl": f"{corpus}/{s}.jsonl" for s in ("train", "val", "test")}, save_dir=save_dir, **(TINY | more))]


@pytest.fixture(scope="module")
def forge():
    return forged()


@pytest.fixture(scope="module")
def home(corpus, tmp_path_factory):
    """A folder with a corpus in it."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(corpus, folder / "k")
    return folder


def json_files(folder):
    return [p for p in Path(folder).rglob("*.json*") if p.suffix in (".json", ".jsonl")]


def strict(text):
    """JSON as others read it."""
    def refuse(name):
        raise ValueError(f"{name} is no JSON")
    return json.loads(text, parse_constant=refuse)


def lines_of(run):
    """A history without the clock's figures."""
    history = strict((run / "training_history.json").read_text())
    parts = [history["train"], history["val"], history.get("refit", {}).get("train", [])]
    return [[{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in part] for part in parts] + [history["best"]["epoch"]]


def is_same(one, two, *models):
    """Two runs have learned the same and say the same."""
    from safetensors.torch import load_file
    assert lines_of(one) == lines_of(two)
    for name in models:
        a, b = (load_file(p / name / "model.safetensors") for p in (one, two))
        assert max((a[k].double() - b[k].double()).nan_to_num().abs().max().item() for k in a) < 1e-6, name
    if (one / "test").exists():
        assert read(one / "test/predictions.jsonl") == read(two / "test/predictions.jsonl")


def whole(folder):
    """Whatever the moment of a kill: models that are there can be loaded, a checkpoint can be gone on from, no JSON is half."""
    import torch
    from safetensors.torch import load_file

    from prosody_ser.model import load_checkpoint
    from prosody_ser.run import Run
    found = []
    for run in [Run(p) for p in {q.parent for q in folder.rglob("run_files.json")}]:
        for model in (run.best_model, run.best_model_file):
            if model.exists() or model.with_name("best_model.old").exists() and model is run.best_model:
                load_checkpoint(model)
                found.append(model)
        if last := run.latest_checkpoint():
            load_file(last / "model.safetensors")
            torch.load(last / "optimizer.pt", weights_only=True)
            found.append(last)
        for file in (run.settings_file, run.inputs_file, run.history_file, run.results_file, run.record.file):
            if file.exists():
                strict(file.read_text())
    return found


# ------------------------------------------------------------------------------- killed at any moment

JOBS = dict(
    refit=dict(num_epochs=3, refit=True, seed=3, ser_weight_decay=2.0),
    cache=dict(num_epochs=2, freeze_backbone=True, feature_cache="cache"),
    study=dict(num_epochs=2, run_ablation_study=True, ablation_alphas=[0, 0.5], ablation_epochs=1, refit=True))


@pytest.mark.parametrize("name", JOBS)
def test_killed_at_any_moment(forge, home, tmp_path, name):
    """Killed again and again and started again, a run ends as the unbroken one; at each moment what is there is whole."""
    shutil.copytree(home / "k", tmp_path / "k")
    settings, rng = JOBS[name], random.Random(f"{name} {KILLS}")
    unbroken = forge.run(tmp_path, on("k", "unbroken", **settings | (dict(feature_cache="cache0") if name == "cache" else {})))
    assert unbroken.code == 0, unbroken.said
    kills, share, n = 0, -(-KILLS // len(JOBS)), 0
    while kills < share:
        place, n = f"killed{n}", n + 1
        argv = on("k", place, **settings | (dict(feature_cache=f"cache-{place}") if name == "cache" else {}))
        while True:
            from prosody_ser.run import Run
            resume = name != "study" and Run(tmp_path / place).has_checkpoint
            how = dict(kill_at=rng.randrange(1, unbroken.changes)) if kills < share else {}
            done = forge.run(tmp_path, [*argv, *flags(resume=True)] if resume else argv, **how)
            whole(tmp_path / place)
            if done.code == 0: break
            assert done.code == -signal.SIGKILL and how, done.said
            kills += 1
        is_same(tmp_path / "unbroken", tmp_path / place, "best_model", *["selected_model"] * ("refit" in settings))
        for run in (tmp_path / place).rglob("run_files.json"):
            if run.parent.name.startswith("earlier-"): continue            # a run that was killed in its refit lies there as it was
            assert not [p.relative_to(tmp_path) for p in run.parent.iterdir() if p.name.endswith((".new", ".old", "refit", ".in_use"))]
    if name == "cache":
        from prosody_ser.model import load_checkpoint  # noqa: F401
        for cache in tmp_path.glob("cache-*"):
            keys = [json.loads(x)[0] for p in cache.rglob("*.jsonl") for x in p.read_text().splitlines() if x.endswith("]")]
            assert len(set(keys)) == 18                                    # of training and validation


def test_killed_without_warning_by_time(forge, home, tmp_path):
    """A kill from outside, while PyTorch writes or computes."""
    shutil.copytree(home / "k", tmp_path / "k")
    argv, rng = on("k", num_epochs=6, checkpoint_steps=1), random.Random(7)
    first = forge.start(tmp_path, argv).until(tmp_path / "run/checkpoint-2")
    for _ in range(max(2, KILLS // 5)):
        time.sleep(rng.random() * 0.4)
        first.signal(signal.SIGKILL).end()
        whole(tmp_path / "run")
        first = forge.start(tmp_path, [*argv, "--resume"])
    assert first.end().code == 0, first.said
    assert "which is gone: it is taken over" in first.said
    straight = forge.run(tmp_path, on("k", "straight", num_epochs=6, checkpoint_steps=1))
    is_same(tmp_path / "straight", tmp_path / "run", "best_model")


# ------------------------------------------------------------------------------- disks, numbers, interrupts

def test_full_disk(forge, home, tmp_path):
    """A checkpoint that does not fit: one message with the cure; the best model is whole, and the run goes on from the checkpoint before."""
    shutil.copytree(home / "k", tmp_path / "k")
    straight = forge.run(tmp_path, on("k", "straight", num_epochs=3))
    assert straight.code == 0, straight.said
    begun = forge.run(tmp_path, on("k", num_epochs=3), kill_at=None)
    shutil.rmtree(tmp_path / "run")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "straight/checkpoint-9").iterdir()}
    assert sizes["model.safetensors"] < sizes["optimizer.pt"] and begun.code == 0
    full = forge.run(tmp_path, on("k", num_epochs=3), file_size=(sizes["model.safetensors"] + sizes["optimizer.pt"]) // 2)
    message = full.said[full.said.index("error: "):]
    assert full.code == 1 and "Traceback" not in message and "make room" in message and "best_model is whole" in message and "no checkpoint yet" in message, full.said
    whole(tmp_path / "run")
    part = forge.start(tmp_path, on("k", "run2", num_epochs=3)).until(tmp_path / "run2/checkpoint-6")
    part.signal(signal.SIGKILL).end()
    full = forge.run(tmp_path, [*on("k", "run2", num_epochs=3), "--resume"], file_size=sizes["model.safetensors"] // 2)
    message = full.said[full.said.index("error: "):]
    assert full.code == 1 and "--resume" in message and "run2/checkpoint-" in message and whole(tmp_path / "run2"), full.said
    again = forge.run(tmp_path, [*on("k", "run2", num_epochs=3), "--resume"])
    assert again.code == 0, again.said
    is_same(tmp_path / "straight", tmp_path / "run2", "best_model")


def test_another_version_is_not_called_missing():
    """Only what is not there is to be installed; what lacks a name is of another version, and its own line says so."""
    from prosody_ser.folder import import_fault
    with pytest.raises(ImportError) as old:
        from huggingface_hub import no_such_name  # noqa: F401
    assert "no_such_name" in import_fault(old.value) and "not installed" not in import_fault(old.value)
    assert "torch is not installed" in import_fault(ModuleNotFoundError("No module named 'torch'", name="torch"))
