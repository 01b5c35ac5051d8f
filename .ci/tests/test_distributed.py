"""Several processes learn what one would, write once, and score every row once."""
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read, write
from forge import forge, python
from safetensors.torch import load_file
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

STEPS = "--backbone whisper --vocab_size 30 --num_epochs 2 --gradient_accumulation_steps 1 --num_workers 0 --log_steps 1 --batching random --no_spec_augment --head_dropout 0 " \
        "--backbone_lr 1e-3 --head_lr 1e-3 --ctc_label_smoothing 0.1 --ctc_confidence_penalty 0.1 --ctc_blank_threshold 0.01 --decode_method greedy".split()


@pytest.fixture(scope="module")
def uneven(corpus, tmp_path_factory):
    """The small corpus with labels missing here and there, so that a process may see none, and a backbone without dropout."""
    folder = tmp_path_factory.mktemp("uneven")
    for s in ("train", "val", "test"):
        rows = read(corpus / f"{s}.jsonl")
        for i, r in enumerate(rows):
            for k in (["emotion"], ["words", "prosody_annotations"], ["prosody_annotations"], [], [])[i % 5]:
                r[k] = None
        write(folder / f"{s}.jsonl", rows)
    write(folder / "val.jsonl", read(folder / "val.jsonl")[:5])          # not a multiple of anything
    torch.manual_seed(0)
    WhisperEncoder(WhisperConfig(d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, dropout=0.0)).save_pretrained(folder / "backbone")
    return folder


TORCHRUN = "torch.distributed.run", "--standalone", "--nproc_per_node", 2


def ranks(argv, processes):
    """What a launcher does: so many processes that know of each other. What they said together, and the first exit code that is not 0."""
    if processes == 1:
        return python(*argv)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    with tempfile.TemporaryDirectory() as folder:
        names = [[f"{folder}/{what}{rank}" for what in ("out", "err")] for rank in range(processes)]
        running = [forge().begin(argv, ROOT, os.environ | where | dict(RANK=str(rank), LOCAL_RANK=str(rank)), out, err=err) for rank, (out, err) in enumerate(names)]
        codes = [r.end().code for r in running]
        out, err = ("".join(Path(n).read_text(encoding="utf-8") for n in column) for column in zip(*names))
    return subprocess.CompletedProcess(argv, next(filter(None, codes), 0), out, err)


def launch(corpus, data, run, processes, *more, start=None, program=("-m", "prosody_ser.train")):
    """Train in so many processes, started by a launcher or without one; returns the history, the weights and what was said."""
    manifests = [x for s in ("train", "val", "test") for x in (f"--{s}_jsonl", data / f"{s}.jsonl")]
    argv = [*program, "--audio_base_path", corpus, *manifests, "--backbone_path", data / "backbone",
            "--tokenizer_path", run / "tok.model", "--save_dir", run, *STEPS, "--batch_size", 4 // processes, *more]
    if start:
        done = subprocess.run([sys.executable, "-m", *map(str, [*start, *argv])], cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    else:
        done = ranks(argv, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test set, model ") == 1, done.stdout[-3000:]
    return json.loads((run / "training_history.json").read_text()), load_file(run / "best_model/model.safetensors"), done.stdout


def same(one, two):
    """Losses and scores step by step, and the weights, to 1e-4."""
    for a, b in zip(one[0]["train"] + one[0]["val"], two[0]["train"] + two[0]["val"], strict=True):
        for k in a:
            if "runtime" not in k and "per_second" not in k and k not in ("grad_norm", "loss"):
                assert a[k] == pytest.approx(b[k], abs=1e-4, nan_ok=True), (k, a, b)
    assert one[1].keys() == two[1].keys()
    for k, v in one[1].items():
        assert (v - two[1][k]).abs().max() < 1e-4, k


@pytest.mark.parametrize("mode", ["fixed", "uncertainty"])
def test_two_processes_learn_what_one_does(corpus, uneven, tmp_path, mode):
    """Same global batches, labels missing on either side: six steps, the same losses, shares of the gradient, scores and weights; one log, one set of files."""
    one, two = (launch(corpus, uneven, tmp_path / str(n), n, "--alpha_mode", mode, "--grad_share_steps", 1, start=n > 1 and mode == "fixed" and TORCHRUN) for n in (1, 2))
    same(one, two)
    assert all("asr/grad_share" in e and ("asr/alpha" in e) == (mode == "uncertainty") for e in one[0]["train"])
    assert len(one[0]["train"]) == 6 and one[2].count("tokenizer:") == two[2].count("tokenizer:") == 1
    names = lambda n: sorted(p.relative_to(tmp_path / str(n)).as_posix() for p in (tmp_path / str(n)).rglob("*") if p.is_file())
    assert names(1) == names(2)


def test_two_processes_refit_on_kept_features(corpus, uneven, tmp_path):
    """Features at three speeds, shared out among the processes; the model that is tested is trained on validation rows, too, and is the same as one process's."""
    more = "--freeze_backbone", "--feature_cache", tmp_path / "features", "--speed_perturb", 0.1, "--refit", "--num_epochs", 1, "--ser_weight_decay", 30
    data = shutil.copytree(uneven, tmp_path / "data")
    write(data / "val.jsonl", read(uneven / "val.jsonl")[:4])                            # 12 and 4 rows: whole batches of 4, the same ones for one process and for two
    two = launch(corpus, data, tmp_path / "2", 2, *more)                                 # first: an empty cache
    one = launch(corpus, data, tmp_path / "1", 1, *more)
    same(one, two)
    assert one[0]["refit"]["rows"] == 16 and one[0]["refit"]["epoch"] == 1 and "test set, model trained on training and validation rows" in two[2]
    seen = load_file(tmp_path / "1/selected_model/model.safetensors")
    assert any((seen[k] - v).abs().max() > 1e-4 for k, v in one[1].items())


def test_accelerate_launch(corpus, uneven, tmp_path):
    """The other launcher, batches by length."""
    start = ["accelerate.commands.launch", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    history, _, _ = launch(corpus, uneven, tmp_path / "run", 2, "--batching", "length", "--num_epochs", "1", start=start)
    assert len(history["val"]) == 1 and history["val"][0]["ser/n"] + 0 == 4
    shutil.rmtree(tmp_path / "run")


def test_sharded_weights(corpus, uneven, tmp_path):
    """FSDP2: each process holds half of every weight, gradient and moment, and they learn what one process does; in 16 bits too, to their precision."""
    sharded, steps = [ROOT / ".ci/tests/fsdp_on_cpu.py"], ("--checkpoint_steps", 2, "--grad_share_steps", 0, "--alpha_mode", "uncertainty", "--ser_weight_decay", 30)
    one, two = launch(corpus, uneven, tmp_path / "1", 1, *steps), launch(corpus, uneven, tmp_path / "2", 2, *steps, program=sharded)
    same(one, two)
    half = launch(corpus, uneven, tmp_path / "half", 2, "--alpha_mode", "uncertainty", program=[*sharded, "--bf16"])
    assert not any("ser/grad_share" in e for e in half[0]["train"])                  # no share is measured there
    for a, b in zip(one[0]["train"], half[0]["train"]):
        assert [a[f"{t}/loss"] for t in ("ser", "asr", "prosody")] == pytest.approx([b[f"{t}/loss"] for t in ("ser", "asr", "prosody")], rel=0.03, abs=0.05, nan_ok=True)
    assert (tmp_path / "2/checkpoint-4").is_dir()                # the last one, two steps before the end
    again = launch(corpus, uneven, tmp_path / "2", 2, *steps, "--resume", program=sharded)
    same(two, again)
