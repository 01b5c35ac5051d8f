"""The data loader against bare soundfile (audio-seconds a second), and the reader of manifests against an earlier one.

    python benchmarks/loader.py                        # on noise written for the purpose
    python benchmarks/loader.py --manifest M.jsonl --audio_base_path DATA --num_workers 2
    python benchmarks/loader.py --pack                 # loose files against a pack, on this disk and on a slow one
    python benchmarks/loader.py --rows 1000000         # the reader alone: time and memory, against commit 12d1b48
"""
import argparse
import builtins
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import numpy as np
import soundfile as sf

EARLIER = "12d1b48"   # the last commit whose reader is compared


def noise(folder, n=400):
    "Utterances of film-speech lengths, half WAV, half FLAC; a quarter at 44.1 kHz"
    from prosody_ser.data import Utterance, write_manifest
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        rate, name = (44100 if i % 4 == 0 else 16000), f"{i}.{'wav' if i % 2 else 'flac'}"
        samples = rng.normal(size=int(rate * np.exp(rng.normal(np.log(3.5), 0.8)))).clip(-9, 9) * 0.1
        sf.write(folder/name, samples, rate)
        rows.append(Utterance(name, ["bra", "ha"], [1, 0], i % 2))
    write_manifest(rows, folder/"noise.jsonl")
    return folder/"noise.jsonl"


def long_manifest(path, n):
    "n rows of 4 to 14 words (20,000 word types by Zipf's law), five emotions, segments of films of 500 rows"
    rng, emotions = random.Random(0), ["joy", "anger", "neutral", "sadness", "fear"]
    words = ["".join(rng.choices("abdefgɛɔiklmnopstuwy", k=rng.randint(2, 9))) for _ in range(20000)]
    weights = list(accumulate(1 / (i + 1) for i in range(20000)))
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            text, film = rng.choices(words, cum_weights=weights, k=rng.randint(4, 14)), f"film{i // 500:04d}"
            row = dict(audio_filepath=f"wav/{film}/{film}_{i * 10}.wav", words=text,
                       prosody_annotations=[rng.randint(0, 1) for _ in text], emotion=emotions[i % 5], speaker=film,
                       start=round(i * .37, 2), end=round(i * .37 + 3.1, 2))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure_reader(module, manifest):
    "In a process of its own: CPU seconds that a reader takes, and bytes that it needs at most and keeps"
    from prosody_ser.data import read_manifest
    if module != "ours":
        sys.path.insert(0, str(Path(module).parent))
        read_manifest = import_module(Path(module).stem).read_manifest
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    before, start = resident(), time.process_time()
    rows = read_manifest(manifest)
    took, kept = time.process_time() - start, resident() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps(dict(seconds=took, peak=peak, kept=kept, rows=len(rows))))


def compare_readers(n):
    "Print time and memory of reading n rows, by the reader of an earlier commit and by ours"
    root = Path(__file__).parent.parent
    show = ["git", "show", f"{EARLIER}:prosody_ser/data.py"]
    earlier = subprocess.run(show, cwd=root, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        manifest, module = Path(folder)/"rows.jsonl", Path(folder)/"earlier_data.py"
        long_manifest(manifest, n)
        module.write_text(earlier.stdout, encoding="utf-8")
        found = {}
        readers = ({EARLIER: str(module)} if earlier.returncode == 0 else {}) | {"ours": "ours"}
        for name, reader in readers.items():
            command = [sys.executable, __file__, "--reader", reader, "--manifest", str(manifest)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = r = json.loads(done.stdout)
            print(f"{name:8} {r['rows']} rows: {r['seconds']:6.2f} s of CPU time, at most {r['peak'] / 1e6:5.0f} MB, "
                  f"{r['kept'] / 1e6:5.0f} MB kept")
    if EARLIER in found:
        time_, peak, kept = (found["ours"][k] / found[EARLIER][k] for k in ("seconds", "peak", "kept"))
        print(f"ours / {EARLIER}: {time_:.2f} of the time, {peak:.2f} of the peak, {kept:.2f} of what is kept")


def compare_loader(args):
    "Print audio-seconds a second of bare soundfile, of the dataset and of the loader"
    import torch

    from prosody_ser.audio import audio_path
    from prosody_ser.batches import DurationBatchSampler, SpeechDataset
    from prosody_ser.data import emotion_names, read_manifest
    from prosody_ser.model import Collator
    rows, clock = read_manifest(args.manifest, args.audio_base_path), {}
    data = SpeechDataset(rows, args.audio_base_path, emotion_names(rows))
    start = time.perf_counter()
    for u in rows:
        sf.read(audio_path(u), dtype="float32")
    clock["bare soundfile"] = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(len(data)):
        data[i]
    clock["dataset: mono, 16 kHz, checked"] = time.perf_counter() - start
    batches = DurationBatchSampler(data.seconds, 8)
    loader = torch.utils.data.DataLoader(data, batch_sampler=batches, collate_fn=Collator(),
                                         num_workers=args.num_workers)
    start = time.perf_counter()
    for _ in loader:
        pass
    clock[f"loader, batches of 8, {args.num_workers} workers"] = time.perf_counter() - start
    for name, t in clock.items():
        print(f"{name:36}{data.seconds.sum() / t:9.0f} audio s / s{clock['bare soundfile'] / t:8.2f} x soundfile")


@contextmanager
def slow_opens(seconds):
    "A stand-in for a slow drive: each opening of a file by its path, of Python or of libsndfile, sleeps; yields the naps"
    naps = []
    def slowly(function):
        def wait(*args, **more):
            if any(isinstance(a, str | os.PathLike) for a in args[:2]):
                time.sleep(seconds)
                naps.append(seconds)
            return function(*args, **more)
        return wait
    with patch.object(builtins, "open", slowly(open)), patch.object(sf.SoundFile, "__init__", slowly(sf.SoundFile.__init__)):
        yield naps


def compare_packs(args):
    "Print an epoch's reading time (CPU and sleep) of loose files, of a pack, and of a pack with the files as they are"
    from prosody_ser import pack
    from prosody_ser.audio import load_utterance
    from prosody_ser.cli import main as prosody_ser
    from prosody_ser.data import read_manifest
    rows = read_manifest(args.manifest, args.audio_base_path)[:args.files]
    with tempfile.TemporaryDirectory() as folder:
        bases = {"loose": str(args.audio_base_path), "pack": f"{folder}/flac.tar", "pack --keep": f"{folder}/keep.tar"}
        for name in ("pack", "pack --keep"):
            prosody_ser([*name.split()[:1], str(args.manifest), "--audio_base_path", bases["loose"], "--out", bases[name],
                         *name.split()[1:]])
        def epoch(base, naps=()):
            pack._packs.clear()                                  # it is opened in every epoch
            start = time.process_time() + sum(naps)
            for u in rows:
                load_utterance(u, base)
            return time.process_time() + sum(naps) - start
        here = {name: min(epoch(base) for _ in range(5)) for name, base in bases.items()}
        with slow_opens(args.open_ms / 1000) as naps:            # of a loose file one, though a first look takes another
            slow = {name: min(epoch(base, naps) for _ in range(3)) for name, base in bases.items()}
        for where, took in (("this disk", here), (f"{args.open_ms:g} ms an open (sleep-per-open stand-in)", slow)):
            for name, t in took.items():
                print(f"{where:44}{name:12}{1000 * t / len(rows):8.2f} ms an utterance{took['loose'] / t:8.2f} x loose files")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest")
    parser.add_argument("--audio_base_path", default="")
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--rows", type=int, help="compare the readers of manifests on so many rows")
    parser.add_argument("--pack", action="store_true", help="compare loose files and packs")
    parser.add_argument("--files", type=int, default=200, help="of which --pack reads so many")
    parser.add_argument("--open_ms", type=float, default=20, help="milliseconds that an open takes on the slow drive")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reader: return measure_reader(args.reader, args.manifest)
    if args.rows: return compare_readers(args.rows)
    with tempfile.TemporaryDirectory() as folder:
        if not args.manifest:
            args.manifest, args.audio_base_path = noise(Path(folder)), folder
        (compare_packs if args.pack else compare_loader)(args)


if __name__ == "__main__":
    main()
