"""What goes wrong in practice: kills, full disks, interrupts, second runs, folders of the user's, paths and missing numbers.

Processes are forked from one that has PyTorch loaded already, `Forge`: a start then costs nothing, and a kill can come at any moment.
PROSODY_SER_KILLS=50 kills as often; CI is content with fewer."""
import contextlib
import errno
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile as sf
from conftest import ROOT, read, write, write_corpus

TINY = dict(backbone="tiny", tokenizer_type="char", vocab_size=30, batch_size=4, gradient_accumulation_steps=1, num_workers=0, log_steps=1, eval_steps=0,
            checkpoint_interval=1, decode_method="greedy", num_epochs=1)
KILLS = int(os.environ.get("PROSODY_SER_KILLS", 10))


def flags(**settings):
    """Settings as a command line."""
    return [x for k, v in settings.items() for x in ([f"--{k}"] if v is True else [f"--{k}", *map(str, v if isinstance(v, list) else [v])])]


def on(corpus, save_dir="run", **more):
    """A quick training on a corpus."""
    return ["train", *flags(audio_base_path=corpus, **{f"{s}_jsonl": f"{corpus}/{s}.jsonl" for s in ("train", "val", "test")}, save_dir=save_dir, **(TINY | more))]


# ------------------------------------------------------------------------------- the process that others are forked from

def serve():
    """Read jobs, a JSON line each: start one (argv, cwd, env, faults) and answer with its number, or wait for one and answer with its exit code."""
    import torch

    import prosody_ser.ablation, prosody_ser.cli, prosody_ser.train  # noqa: E401, F401
    prosody_ser.cli.quiet_libraries()
    torch.set_num_threads(1)
    print("> ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(">", os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        else:
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                child(**job)
            print(">", pid, flush=True)


def child(argv, cwd, out, env, kill_at=None, file_size=None):
    """One command; it is killed before its kill_at-th change of a file, or cannot write more bytes than file_size to one."""
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    with open(out, "w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    count_changes(f"{out}.changes", kill_at)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    code = 1
    try:
        from prosody_ser.cli import main
        main(argv)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def count_changes(counter, kill_at):
    """Count what Python changes in the file system, and kill this process at one of the changes."""
    seen, owner = [0], os.getpid()

    def look(event, args):
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
        if event == "open" and isinstance(args[1], str):
            changes = set(args[1]) & set("wax+")
        if changes and os.getpid() == owner:
            seen[0] += 1
            if seen[0] == kill_at:
                os.kill(owner, signal.SIGKILL)
    sys.addaudithook(look)
    finish = os._exit

    def leave(code):
        with contextlib.suppress(OSError), open(counter, "w") as file:
            file.write(str(seen[0]))
        finish(code)
    os._exit = leave


class Forge:
    """Starts commands by a fork."""
    def __init__(self):
        self.server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", GOMP_SPINCOUNT="0", HF_HUB_OFFLINE="1", WANDB_MODE="offline"))
        assert self.ask(None) == "ready"

    def ask(self, job):
        if job:
            self.server.stdin.write(json.dumps(job) + "\n")
            self.server.stdin.flush()
        return next(line for line in self.server.stdout if line.startswith("> "))[2:].strip()       # libraries print, too

    def start(self, cwd, argv, env=None, **faults):
        """A running command."""
        Path(cwd).mkdir(exist_ok=True, parents=True)
        out = Path(cwd) / f"log{len(list(Path(cwd).glob('log*.txt')))}.txt"
        return Running(self, int(self.ask(dict(argv=[str(a) for a in argv], cwd=str(cwd), out=str(out), env=env or {}, **faults))), out)

    def run(self, *args, **kwargs):
        return self.start(*args, **kwargs).end()


class Running:
    def __init__(self, forge, pid, out):
        self.forge, self.pid, self.out, self.code = forge, pid, out, None

    def until(self, path, seconds=60):
        """Wait for a file of it."""
        end = time.monotonic() + seconds
        while not list(path.parent.glob(path.name)):
            assert time.monotonic() < end and os.path.exists(f"/proc/{self.pid}") and not self.is_zombie(), self.said
            time.sleep(0.005)
        return self

    def is_zombie(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z"

    def signal(self, number, group=False):
        (os.killpg if group else os.kill)(self.pid, number)
        return self

    def end(self):
        """Its exit code and what it said."""
        self.code = int(self.forge.ask(dict(wait=self.pid)))
        return self

    @property
    def said(self):
        return self.out.read_text(errors="replace")

    @property
    def changes(self):
        return int(Path(f"{self.out}.changes").read_text())


@pytest.fixture(scope="module")
def forge():
    made = Forge()
    yield made
    made.server.stdin.close()
    made.server.wait()


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
    refit=dict(num_epochs=3, refit=True, seed=3),
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


if __name__ == "__main__":
    serve()
