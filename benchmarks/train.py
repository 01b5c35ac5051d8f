"""Throughput and peak memory of training at Whisper-tiny size, against the style of the project's first scripts.

    python benchmarks/train.py                        # V 4000 and 16000, batch 8 and 16
    python benchmarks/train.py --manifest AKAN.jsonl  # lengths from names like film_START_END.wav (milliseconds), or from start and end
    python benchmarks/train.py --device cuda --layers 32 --width 1280 --heads 20   # Whisper-large size on a GPU

`old`: every utterance is padded (or cut) to 30 s, batches are random, and the (B, T, V) logits are in memory. `ours`:
actual lengths, batches by duration, lean CTC. Both have the same heads, losses and optimiser, and random weights and audio;
what is counted is seconds of real audio in a second of time. Each runs in a process of its own, so that its peak memory is
its own: on the CPU the growth of the resident set over what it was before the model was built. GFLOP/s are the matrix and
convolution operations of a middling batch's step (PyTorch's count; what lean CTC computes twice counts twice) over its
time; "of matmul" is their share of what one large matrix product reaches on the same machine.

On a CPU much of our own peak can be freed memory: glibc keeps freed blocks below a limit, and between the hidden states of the
largest batch (80 s, 6.1 MB each) holes would remain. `return_freed_memory` sets the limit to 4 MiB. At V 16000 and batch 8 the
old style takes 7.12 GB and ours 1.18 GB (1/6.0); with 6 MiB it was 1.55 GB (1/4.7), with 2 MiB it would be 1.14 GB (1/6.3). Two
threads or huge pages for the heap (GLIBC_TUNABLES=glibc.malloc.hugetlb=1) change that by less than 5 %. The lower limits cost
time in page faults, against 6 MiB: 4 MiB costs 6 % and 2 MiB 13 % of the CPU time on a virtual machine.
"""
import argparse
import json
import math
import re
import resource
import subprocess
import sys
import time

import numpy as np


def lengths(manifest):
    "Seconds of each utterance of a manifest; without one, a log-normal with the median and spread of film speech"
    if not manifest: return np.exp(np.random.default_rng(0).normal(math.log(3.5), 0.8, 4000)).clip(0.3, 160)
    out = []
    for line in open(manifest, encoding="utf-8"):
        row = json.loads(line)
        ms = re.search(r"_(\d+)_(\d+)\.\w+$", row["audio_filepath"])
        out.append((int(ms[2]) - int(ms[1])) / 1000 if ms else row["end"] - row["start"])
    return np.array(out)


def make_rows(seconds, V, rng, old):
    "Noise with transcripts of 3 tokens a second, two a word; `old` pads or cuts the audio to 30 s"
    rows = []
    for s in seconds:
        n, words = int(s * 16000), max(1, int(1.5 * s))
        audio = rng.normal(size=n).astype(np.float32) * 0.1
        if old: audio = np.pad(audio, (0, max(0, 480_000 - n)))[:480_000]
        rows.append(dict(audio=audio, words=[f"w{rng.integers(V)}" for _ in range(words)], prosody=rng.integers(0, 2, words).tolist(), emotion=int(rng.integers(7)), row=0))
    return rows


class Tokens:
    "Two random pieces a word"
    blank_id = 4

    def __init__(self, V): self.V = V
    def __len__(self): return self.V
    def encode_words(self, words):
        ids = [5 + (hash(w) + k) % (self.V - 5) for w in words for k in (0, 7)]
        return ids, [i // 2 for i in range(len(ids))]


def matmul_ceiling(device):
    "Floating-point operations a second that a large matrix product reaches here: float32 on a CPU, bfloat16 on CUDA"
    import torch
    n, cuda = (8192, True) if device == "cuda" else (2048, False)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    def once():
        start = time.perf_counter(); a @ a
        if cuda: torch.cuda.synchronize()
        return time.perf_counter() - start
    return 2 * n ** 3 / min(once() for _ in range(10))


def child(args):
    "Train a number of batches; print seconds of audio, seconds of time and peak bytes"
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from prosody_ser import model as room
    from prosody_ser.backbones import ActualLengthWhisper
    from dense import dense_ctc
    from prosody_ser.batches import DurationBatchSampler
    from prosody_ser.backbones import return_freed_memory
    old, cuda = args.style == "old", args.device == "cuda"
    if old: room.regularised_ctc = dense_ctc
    rng, seconds = np.random.default_rng(1), lengths(args.manifest)
    batches = list(DurationBatchSampler(seconds, args.batch, None if old else args.batch * 10.0, by_length=not old, epoch=lambda: 1))
    count = len(batches)
    batches = [batches[i] for i in np.linspace(0, count - 1, args.batches if old else 6 * args.batches).astype(int)]                   # a fair sample of the epoch
    if not old: return_freed_memory()                                                                               # as the trainer does
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    encoder = ActualLengthWhisper(WhisperConfig(d_model=args.width, encoder_layers=args.layers, encoder_attention_heads=args.heads, encoder_ffn_dim=4 * args.width))
    extractor = WhisperFeatureExtractor()
    config = room.ProsodySERConfig(backbone="whisper", encoder=encoder.config.to_dict(), feature_extractor=json.loads(extractor.to_json_string()),
                                   vocab_size=args.V, id2label={i: str(i) for i in range(7)})
    model = room.ProsodySER(config, encoder).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    collate, audio, clock = room.Collator(Tokens(args.V)), 0.0, []
    def inputs(rows): return {k: v.to(args.device) for k, v in collate(make_rows(seconds[rows], args.V, rng, old)).items()}
    def step(batch):
        start = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=cuda): loss = model(**batch).loss
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        if cuda: torch.cuda.synchronize()
        return time.perf_counter() - start
    for i, rows in enumerate([batches[0], *batches]):                                                            # the first warms up
        took = step(inputs(rows))
        if i: clock.append(took); audio += seconds[rows].sum()
    peak = torch.cuda.max_memory_allocated() if cuda else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
    batch = inputs(batches[len(batches) // 2])
    with FlopCounterMode(display=False) as counter: step(batch)
    speed = counter.get_total_flops() / min(step(batch) for _ in range(3))
    print(json.dumps(dict(speed=speed, share=speed / matmul_ceiling(args.device), audio=audio, time=sum(clock), step=float(np.median(clock)), peak=peak, epoch=count * float(np.mean(clock)) if old else seconds.sum() * sum(clock) / audio)))   # every old step costs the same, ours as its audio


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", help="JSONL manifest whose lengths are used")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[4000, 16000]); parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--batches", type=int, default=4, help="batches of an old-style run; ours takes six times as many")
    parser.add_argument("--layers", type=int, default=4); parser.add_argument("--width", type=int, default=384); parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--style", help=argparse.SUPPRESS); parser.add_argument("--V", type=int, help=argparse.SUPPRESS); parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.style: return child(args)
    from prosody_ser.batches import DurationBatchSampler, padding_waste
    seconds = lengths(args.manifest)
    for batch in (8, 16, 64):
        random, sorted_ = (padding_waste(list(DurationBatchSampler(seconds, batch, by_length=b)), seconds) for b in (False, True))
        print(f"padding in batches of {batch:2}: random {100 * random:.0f} %, by length {100 * sorted_:.1f} %")
    print(f"{'V':>6} {'batch':>5} {'':>5} {'audio s / s':>12} {'step s':>8} {'epoch min':>10} {'peak GB':>8} {'GFLOP/s':>9} {'of matmul':>9} | ratio of throughput, of memory")
    for V in args.vocab_sizes:
        for batch in args.batch_sizes:
            result = {}
            for style in ("old", "ours"):
                done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--style", style, "--V", str(V), "--batch", str(batch)], capture_output=True, text=True)
                if done.returncode: print(f"{V:6} {batch:5} {style:>5} failed: {done.stderr.splitlines()[-1] if done.stderr else done.returncode}", flush=True); continue
                r = result[style] = json.loads(done.stdout.splitlines()[-1])
                print(f"{V:6} {batch:5} {style:>5} {seconds.sum() / r['epoch']:12.1f} {r['step']:8.2f} {r['epoch'] / 60:10.1f} {r['peak'] / 1e9:8.2f} {r['speed'] / 1e9:9.0f} {100 * r['share']:7.0f} %", end="", flush=True)
                if len(result) == 2:
                    o, n = result["old"], result["ours"]
                    print(f" | {o['epoch'] / n['epoch']:.1f} x, 1/{o['peak'] / n['peak']:.1f}", end="")
                print(flush=True)


if __name__ == "__main__":
    main()
