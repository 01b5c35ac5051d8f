"""What ONNX and eight bits cost and save: size, scores and speed of one model in PyTorch, ONNX and int8 ONNX.

    python benchmarks/export.py runs/demo/best_model runs/demo/corpus/test.jsonl --publish nbs/results/onnx.json
    python benchmarks/export.py runs/emodb/best_model EMODB/test.jsonl --corpus EmoDB --publish nbs/results/onnx.json

Each way predicts every row of the test set, one at a time, greedily, on one CPU thread, in a process of its
own; the processes take turns, so that other work on the machine meets them all, and the median of the rounds
is kept. Prominence is scored on the manifest's own words, which each runtime places by its own alignment.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import commit, write_json

WAYS = {"PyTorch, float32": None, "ONNX, float32": "float32", "ONNX, int8": "int8"}  # -> folder of its export


def make_predictor(checkpoint, folder):
    """The predictor of a way, on one thread."""
    if folder:
        from prosody_ser.onnx import OnnxPredictor

        return OnnxPredictor(folder, threads=1)
    import torch

    from prosody_ser.inference import Predictor

    torch.set_num_threads(1)
    return Predictor(checkpoint, "cpu", "greedy")


def peak_mb():
    """The most memory that this process has held; getrusage would count what started it, too."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")) / 1024


def measure(checkpoint, folder, manifest):
    """One way in this process: seconds until it is ready and for all rows, memory (MB), and what it says."""
    start = time.perf_counter()
    predict = make_predictor(checkpoint, folder)
    ready = time.perf_counter() - start
    from prosody_ser.audio import load_utterance
    from prosody_ser.data import read_manifest

    rows = read_manifest(manifest, audio_base_path=Path(manifest).parent)
    sounds = [load_utterance(u) for u in rows]
    for x in sounds[:5]:
        predict(x)
    start = time.perf_counter()
    said = [predict(x) for x in sounds]
    seconds = time.perf_counter() - start
    memory = peak_mb()
    given = [predict(x, words=u.words) if u.words else None for x, u in zip(sounds, rows, strict=True)]
    audio = sum(map(len, sounds)) / 16000
    return dict(ready=ready, seconds=seconds, memory_mb=memory, audio=audio, said=said, given=given)


def scores(found, manifest):
    """UA, WER and prominence F1 of what a way said."""
    from prosody_ser.data import read_manifest
    from prosody_ser.evaluation import asr_metrics, prosody_metrics, ser_metrics

    rows, said, kept = read_manifest(manifest), found["said"], {}
    names = list(said[0]["probabilities"])  # in the order of their indices
    emotions = [names[u.emotion] if isinstance(u.emotion, int) else u.emotion for u in rows]
    if known := [(e, s["emotion"]) for e, s in zip(emotions, said, strict=True) if e is not None]:
        kept |= ser_metrics(*map(list, zip(*known, strict=True)))
    if written := [(u.text, s["transcript"]) for u, s in zip(rows, said, strict=True) if u.words]:
        kept |= asr_metrics(*map(list, zip(*written, strict=True)))
    pairs = zip(rows, found["given"], strict=True)
    if marked := [(u.prosody_annotations, g["words"]) for u, g in pairs if u.prosody_annotations]:
        chances = [w["prominence"] for _, words in marked for w in words]
        kept |= prosody_metrics([m for marks, _ in marked for m in marks], chances)
    return {k: kept[k] for k in ("ser/ua", "asr/wer", "prosody/f1") if k in kept}


def difference(one, other):
    """The largest difference of a probability, and the share of rows whose emotion and words are the same."""
    pairs = list(zip(one["said"], other["said"], strict=True))
    chances = [abs(a["probabilities"][k] - b["probabilities"][k]) for a, b in pairs for k in a["probabilities"]]
    same = sum(a["emotion"] == b["emotion"] and a["transcript"] == b["transcript"] for a, b in pairs)
    return dict(probability=max(chances), same=same / len(pairs))


def size_mb(checkpoint, folder):
    """What lies on the disk to predict with: weights, filters, tokenizer, settings."""
    names = "model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.model"
    files = list(Path(folder).iterdir()) if folder else [Path(checkpoint) / n for n in names]
    return sum(f.stat().st_size for f in files if f.is_file()) / 1e6


def in_turns(checkpoint, exports, manifest, rounds):
    """Each way's measures, one process after another, round by round."""
    found = {way: [] for way in WAYS}
    for i in range(rounds):
        for way, kind in WAYS.items():
            folder = [str(exports / kind)] if kind else []
            argv = [sys.executable, __file__, str(checkpoint), str(manifest), "--measure", *folder]
            env = os.environ | dict(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="0")
            done = subprocess.run(argv, env=env, check=True, stdout=subprocess.PIPE, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {i + 1}, {way}: {found[way][-1]['seconds']:.2f} s")
    return found


def row_of(runs, checkpoint, folder, manifest):
    """One line of the table."""
    first, n = runs[0], len(runs[0]["said"])
    seconds, ready, memory = (
        statistics.median(r[k] for r in runs) for k in ("seconds", "ready", "memory_mb")
    )
    speed = dict(ms=1000 * seconds / n, times_real_time=first["audio"] / seconds, ready_s=ready)
    return dict(size_mb=size_mb(checkpoint, folder), memory_mb=memory) | speed | scores(first, manifest)


def main(args):
    """Exports, measures, and writes the table."""
    if args.measure is not None:
        print(json.dumps(measure(args.checkpoint, args.measure, args.manifest)))
        return
    from prosody_ser.export import export_onnx

    with tempfile.TemporaryDirectory() as made:
        exports = Path(made)
        for kind in ("float32", "int8"):
            export_onnx(args.checkpoint, exports / kind, int8=kind == "int8")
        found = in_turns(args.checkpoint, exports, args.manifest, args.rounds)
        table = {}
        for way, kind in WAYS.items():
            table[way] = row_of(found[way], args.checkpoint, kind and exports / kind, args.manifest)
            table[way]["beside_pytorch"] = difference(found["PyTorch, float32"][0], found[way][0])
    first = found["PyTorch, float32"][0]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread used"
    about = dict(machine=machine, load=os.getloadavg()[1], commit=commit(), rounds=args.rounds)
    about |= dict(rows=len(first["said"]), seconds=first["audio"])
    for way, line in table.items():
        print(f"{way:18}", "  ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float)))
    if args.publish:
        before = json.loads(args.publish.read_text()) if args.publish.exists() else {}
        write_json(args.publish, before | {args.corpus: dict(about=about, table=table)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="best_model folder")
    parser.add_argument("manifest", help="test set, beside its audio")
    parser.add_argument("--publish", type=Path, help="JSON file for the page")
    parser.add_argument("--corpus", default="demo", help="name of the table in that file; others stay")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs="?", const="", help=argparse.SUPPRESS)
    main(parser.parse_args())
