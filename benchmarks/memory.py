"""Peak memory: of an utterance of 500 s against one of 30 s, and of a training step against its estimate.

    python benchmarks/memory.py long                       # Whisper-tiny size, V 16000: training and evaluation
    python benchmarks/memory.py estimate                   # Whisper-tiny size on this machine
    python benchmarks/memory.py estimate --device cuda     # Whisper-large-v3 size (random weights): all weights, LoRA, checkpointing

Each figure comes from a process of its own: on the CPU the highest resident set less that before the model was built, on CUDA
`torch.cuda.max_memory_allocated`.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def build(shape, V, device):
    "A model with random weights"
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from prosody_ser import model as room
    from prosody_ser.backbones import ActualLengthWhisper
    layers, width, heads, mels = shape
    torch.manual_seed(0)
    encoder = ActualLengthWhisper(WhisperConfig(d_model=width, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width, num_mel_bins=mels))
    config = room.ProsodySERConfig(backbone="whisper", encoder=encoder.config.to_dict(), vocab_size=V, id2label={i: str(i) for i in range(7)},
                                   feature_extractor=json.loads(WhisperFeatureExtractor(feature_size=mels).to_json_string()))
    return room.ProsodySER(config, encoder).to(device)


def child(job, seconds, batch, V, device, shape, way):
    "Do one job and print its peak"
    import numpy as np
    import torch
    from prosody_ser.inference import decode_batch
    from prosody_ser.model import add_lora
    from prosody_ser.model import Collator
    from train import Tokens, make_rows
    from prosody_ser.backbones import return_freed_memory
    return_freed_memory()
    rows = make_rows([seconds] * batch, V, np.random.default_rng(0), False)
    base, cuda = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, device == "cuda"
    model = build(shape, V, device)
    if "LoRA" in way: add_lora(model, 16)
    if "checkpointing" in way: model.gradient_checkpointing_enable(dict(use_reentrant=False))
    if way == "heads only": model.backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    inputs = {k: v.to(device) for k, v in Collator(Tokens(V))(rows).items()}
    model.train(job == "train")
    model.asr_nats.fill_(0.5)               # as if CTC had learned enough to place the words,
    model._update_nats = lambda nats: None  # and would not forget it
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=cuda), torch.set_grad_enabled(job == "train"): out = model(**inputs)
        if job == "train": out.loss.backward(); optimizer.step(); optimizer.zero_grad()
        else: decode_batch(model, out, "beam")
        if cuda: torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if cuda else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
    print(json.dumps(dict(peak=peak, process=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, step=time.perf_counter() - start)))


def ask(*what):
    "The answer of a child process"
    done = subprocess.run([sys.executable, __file__, "child", json.dumps(what)], capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


TINY, LARGE = (4, 384, 6, 80), (32, 1280, 20, 128)


def long(device):
    "500 s against 30 s"
    print(f"{'':12}{'30 s, GB':>10}{'500 s, GB':>11}{'ratio':>8}   (on a CPU: of the whole process, PyTorch included)")
    for job in ("train", "evaluate"):
        a, b = (ask(job, s, 1, 16000, device, TINY, "all weights") for s in (30, 500))
        a, b = (x["peak"] if device == "cuda" else x["process"] for x in (a, b))
        print(f"{job:12}{a / 1e9:10.2f}{b / 1e9:11.2f}{b / a:8.2f}", flush=True)


def estimate(device):
    "The estimate against the truth"
    from prosody_ser.model import memory_estimate
    shape, name = (LARGE, "whisper") if device == "cuda" else (TINY, None)
    folder = Path("runs/bench-whisper-tiny")
    if name is None: build(TINY, 4000, "cpu").backbone.encoder.save_pretrained(folder)
    ways = {"all weights": {}, "all, checkpointing": dict(gradient_checkpointing=True), "LoRA": dict(lora_rank=16), "LoRA, checkpointing": dict(lora_rank=16, gradient_checkpointing=True), "heads only": dict(freeze_backbone=True)}
    print(f"{'':22}{'estimate, GB':>13}{'measured, GB':>14}{'ratio':>7}{'step, s':>9}")
    for way, more in ways.items():
        guess = memory_estimate("whisper", None if name else folder, 8, 10.0, 4000, device == "cuda", **more)["total"]
        true = ask("train", 10.0, 8, 4000, device, shape, way)
        print(f"{way:22}{guess / 1e9:13.2f}{true['peak'] / 1e9:14.2f}{true['peak'] / guess:7.2f}{true['step']:9.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]: child(*json.loads(sys.argv[2]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("what", choices=["long", "estimate"])
        parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        args = parser.parse_args()
        dict(long=long, estimate=estimate)[args.what](args.device)
