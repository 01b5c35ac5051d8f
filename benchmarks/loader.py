"""The data loader against bare soundfile: audio-seconds a second.

    python benchmarks/loader.py                        # on noise written for the purpose
    python benchmarks/loader.py --manifest M.jsonl --audio_base_path DATA --num_workers 2
"""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf


def noise(folder, n=400):
    "Utterances of film-speech lengths, half WAV, half FLAC; a quarter at 44.1 kHz"
    from prosody_ser.data import Utterance, write_manifest
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        rate, name = (44100 if i % 4 == 0 else 16000), f"{i}.{'wav' if i % 2 else 'flac'}"
        sf.write(folder/name, rng.normal(size=int(rate * np.exp(rng.normal(np.log(3.5), 0.8)))).clip(-9, 9) * 0.1, rate)
        rows.append(Utterance(name, ["bra", "ha"], [1, 0], i % 2))
    write_manifest(rows, folder/"noise.jsonl")
    return folder/"noise.jsonl"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest"); parser.add_argument("--audio_base_path", default="")
    parser.add_argument("--num_workers", type=int, default=0)
    args = parser.parse_args()
    import torch
    from prosody_ser.data import DurationBatchSampler, SpeechDataset, audio_path, emotion_names, read_manifest
    from prosody_ser.model import Collator
    with tempfile.TemporaryDirectory() as folder:
        if not args.manifest: args.manifest, args.audio_base_path = noise(Path(folder)), folder
        rows = read_manifest(args.manifest)
        data = SpeechDataset(rows, args.audio_base_path, emotion_names(rows))
        total, clock = data.seconds.sum(), {}
        start = time.perf_counter()
        for u in rows: sf.read(audio_path(u, args.audio_base_path), dtype="float32")
        clock["bare soundfile"] = time.perf_counter() - start
        start = time.perf_counter()
        for i in range(len(data)): data[i]
        clock["dataset: mono, 16 kHz, checked"] = time.perf_counter() - start
        loader = torch.utils.data.DataLoader(data, batch_sampler=DurationBatchSampler(data.seconds, 8), collate_fn=Collator(), num_workers=args.num_workers)
        start = time.perf_counter()
        for batch in loader: pass
        clock[f"loader, batches of 8, {args.num_workers} workers"] = time.perf_counter() - start
        for name, t in clock.items(): print(f"{name:36}{total / t:9.0f} audio s / s{clock['bare soundfile'] / t:8.2f} x soundfile")


if __name__ == "__main__":
    main()
