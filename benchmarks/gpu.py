"""Is everything right on this GPU, and how fast is it? One table, and a JSON file with the same numbers.

    python benchmarks/gpu.py                              # on a GPU: at most 8 minutes; writes runs/gpu.json
    python benchmarks/gpu.py --minutes 15 --parts train   # one part, and time for all of its rows
    python benchmarks/gpu.py --only 'XLS-R*' --more       # these rows; the others of the file stay
    python benchmarks/gpu.py --toy                        # the same code on a CPU at toy size: half a minute

It needs the checkout and a Python with PyTorch for CUDA and transformers (and peft, for the rows of LoRA).
Nothing is installed or downloaded; weights, audio and labels are random. soundfile and soxr, which the
package imports to read audio, are replaced where they are not installed: the files that this script writes
are WAV at 16 kHz, which the standard library reads.

ceiling      What the GPU reaches: products of matrices of 8192 x 8192, and a copy.
correctness  The CTC loss, its terms and gradients against `dense.py` in float64 on the CPU; decoders and
             forced alignment against the CPU's; small models against the CPU, and a padded batch against its
             utterances alone; bf16 and fp16 against float32; the formula for operations against PyTorch's
             count. float32 is not rounded to TF32 here. Differences of losses, gradients and operations are
             relative, those of models are of logits, which are about 1; of decoders, the share that differs.
train        A step (copy to the GPU, forward, backward, clipping, AdamW; not the Trainer around it) over a
             fair sample of the batches that the package's sampler makes of the users' lengths: at most 8
             utterances and 80 padded seconds, V 4000, unless the row says otherwise. Its share of the ceiling
             counts operations by `encoder_flops` and `ctc_flops`, with padded frames and without. The peak is
             that of PyTorch's tensors; the forecast is that of `prosody-ser memory` for the same batches.
             CTC counts as untrained, so words are split evenly; the transcripts have 1.25 pieces a word.
             `words aligned`: CTC counts as good (below 1.5 nats a token), so each step aligns the words, which
             have 2.5 pieces each.
ctc          The CTC loss with all regularisers, forward and backward: `dense.py` against the package's, by
             `benchmarks/ctc.py`. short: 16 x 250 frames, long: 8 x 1500 frames; V 16000.
loader       Audio that the package's dataset and collator prepare, and the share of a step that waits for it.
decode       Greedy and beam search (10 prefixes) and forced alignment of 8 utterances at a time, from the
             last hidden states on.

Every measurement has a process of its own, so that its peak of memory is its own, and one that fails is a
row that says so. They come in the order of their worth; those that no longer fit in the time are left out
and named. The exit code is 1 if a check of correctness fails. With --toy one process does all: memory means
nothing there.
"""
import argparse
import copy
import datetime
import importlib
import importlib.util
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
import wave
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))                  # the package need not be installed

GOALS = {"share": 0.45, "forecast": 0.15}      # of the ceiling; that memory is off its forecast
ROWS, LONGEST = 4483, 30.0                     # of the Akan training manifest; longer ones (2 %) are cut here
PERCENTILES = {0: 1.51, 10: 1.51, 25: 2.51, 50: 3.51, 75: 5.51, 90: 9.51, 95: 16.51, 98: 28.51, 99: 40.51,
               100: 161.51}                    # lengths of its rows in seconds
WORDS_A_SECOND, PIECES_A_WORD = 2, 1.25        # there 2.02, and 1.26 with a vocabulary of 4,000
LORA_RANK, WORKERS, MAX_GRAD_NORM = 16, 4, 1.0
REGULARISERS = dict(entropy_weight=0.01, blank_penalty=50.0, blank_threshold=0.01, label_smoothing=0.1,
                    confidence_penalty=0.1)
TITLES = {"ceiling": "What this machine reaches",
          "correctness": "Correctness: the difference, and what is allowed", "train": "A training step",
          "ctc": "The CTC loss, forward and backward", "loader": "The data loader",
          "decode": "Decoders: utterances a second"}


# --- what only reading audio files needs, where it is not installed -----------------------------------

class WavFile:
    "What the package uses of `soundfile.SoundFile`, for WAV of 16 bits."
    format, subtype = "WAV", "PCM_16"

    def __init__(self, path):
        self.file = wave.open(str(path), "rb")
        self.samplerate, self.frames = self.file.getframerate(), self.file.getnframes()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.file.close()

    def seekable(self):
        return True

    def seek(self, frame):
        self.file.setpos(frame)

    def read(self, frames, dtype, always_2d):
        samples = np.frombuffer(self.file.readframes(frames), "<i2").astype(dtype) / 32768
        return samples.reshape(-1, self.file.getnchannels())


def no_resampling(*_):
    raise RuntimeError("soxr is not installed; the files of this script are at 16 kHz and need none")


STAND_INS = {"soundfile": {"SoundFile": WavFile, "LibsndfileError": wave.Error},
             "soxr": {"resample": no_resampling}}


def import_loader():
    "`prosody_ser.batches`. Stand-ins are there while it is imported, and only for what is not installed."
    missing = [name for name in STAND_INS if importlib.util.find_spec(name) is None]
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(STAND_INS[name])
    room = importlib.import_module("prosody_ser.batches")
    for name in missing:
        del sys.modules[name]                              # transformers would take them for the real ones
    return room


# --- models and batches -------------------------------------------------------------------------------

def encoder_of(size):
    "Family and configuration of an encoder: of one that users train, or of a toy, which has no dropout."
    from transformers import Wav2Vec2BertConfig, Wav2Vec2Config, WhisperConfig
    toy = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
               hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0)
    layer_norm = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    if size == "whisper-large-v3":
        return "whisper", WhisperConfig(d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                                        encoder_ffn_dim=5120, num_mel_bins=128)
    if size == "XLS-R-300M":
        return "xlsr", Wav2Vec2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                      intermediate_size=4096, activation_dropout=0.0, feat_proj_dropout=0.1,
                                      mask_time_prob=0.075, **layer_norm)
    if size == "toy whisper":
        return "whisper", WhisperConfig(d_model=32, encoder_layers=2, encoder_attention_heads=4,
                                        encoder_ffn_dim=64)
    if size == "toy XLS-R":
        return "xlsr", Wav2Vec2Config(conv_dim=[16] * 7, num_conv_pos_embeddings=16,
                                      num_conv_pos_embedding_groups=4, **toy, **layer_norm)
    return "wav2vec2-bert", Wav2Vec2BertConfig(position_embeddings_type="relative_key",
                                               conformer_conv_dropout=0.0, **toy)


def extractor_of(family, config):
    "The stock feature extractor of a family."
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
    if family == "whisper":
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    if family == "wav2vec2-bert":
        return SeamlessM4TFeatureExtractor()
    return Wav2Vec2FeatureExtractor(return_attention_mask=True)


def build(size, V, device, **options):
    "The package's model with random weights, made on the device."
    import torch

    from prosody_ser.model import ProsodySER, ProsodySERConfig
    family, encoder = encoder_of(size)
    extractor = json.loads(extractor_of(family, encoder).to_json_string())
    config = ProsodySERConfig(family, encoder.to_dict(), extractor, vocab_size=V,
                              id2label={i: str(i) for i in range(7)}, **options)
    torch.manual_seed(0)
    with torch.device(device):
        return ProsodySER(config).to(device)


FEW, MANY = (1, 1, 1, 2), (2, 3)               # pieces of one word after another; MANY are enough to align them


class Pieces:
    "In the place of a tokenizer: words are numbers."
    def __init__(self, V, pieces=FEW):
        self.V, self.pieces = V, pieces

    def encode_words(self, words):
        owner = [i for i, n in zip(range(len(words)), cycle(self.pieces)) for _ in range(n)]
        return [5 + (int(words[i]) + k) % (self.V - 5) for k, i in enumerate(owner)], owner


def labels(seconds, rng):
    "Words, prominence and emotion of an utterance."
    n = max(1, round(WORDS_A_SECOND * seconds))
    return dict(words=[str(w) for w in rng.integers(0, 10**6, n)], prosody=rng.integers(0, 2, n).tolist(),
                emotion=int(rng.integers(7)))


def collate(seconds, V, seed=0, pieces=FEW):
    "A padded batch of noise: a dict of tensors on the CPU."
    from prosody_ser.model import Collator
    rng = np.random.default_rng(seed)
    rows = [dict(audio=rng.normal(size=round(16000 * s)).astype(np.float32) * 0.1, row=i, **labels(s, rng))
            for i, s in enumerate(seconds)]
    return Collator(Pieces(V, pieces))(rows)


def pinned(batch, device):
    "The batch in page-locked memory, as the package's loader hands it to a GPU."
    return {k: v.pin_memory() for k, v in batch.items()} if device == "cuda" else batch


def to_device(batch, device):
    "The batch where it is used; from page-locked memory the copy does not wait."
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def corpus_seconds(toy):
    "Length of each utterance, as in the users' training manifest; for the toy a quarter, at most 2 s."
    points = list(PERCENTILES), list(PERCENTILES.values())
    seconds = np.interp(np.linspace(0, 100, ROWS), *points).clip(max=LONGEST)
    return (seconds / 4).clip(0.5, 2) if toy else seconds


def sample_batches(batch, count, toy):
    "Lengths in a fair sample of an epoch's batches, one of the longest first, then mixed: arrays of seconds."
    seconds, sampler = corpus_seconds(toy), import_loader().DurationBatchSampler
    epoch = [seconds[rows] for rows in sampler(seconds, batch, 10 * batch, epoch=lambda: 1)]
    epoch.sort(key=lambda s: -s.max())
    first, *others = (epoch[i] for i in np.linspace(0, len(epoch) - 1, count).astype(int))
    return [first, *(others[i] for i in np.random.default_rng(0).permutation(len(others)))]


# --- operations ---------------------------------------------------------------------------------------

def widths(config):
    "H and F of an encoder."
    return config.hidden_size, getattr(config, "encoder_ffn_dim", None) or config.intermediate_size


def forward_macs(config, samples):
    """Multiply-adds of an encoder's forward pass on one utterance, and its frames.

    Of the layers' matrices, of attention, of all before the layers, and of the first convolution in that."""
    H, F = widths(config)
    if config.model_type == "whisper":
        mel = math.ceil(samples / 160)
        frames = (mel + 1) // 2
        first = 3 * config.num_mel_bins * H * mel
        front = first + 3 * H * H * frames
    else:
        width, frames, convolutions = 1, samples, []
        for out, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
            frames = (frames - kernel) // stride + 1
            convolutions.append(width * out * kernel * frames)
            width = out
        position = H * H // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
        first, front = convolutions[0], sum(convolutions) + (width * H + position) * frames
    L = config.num_hidden_layers
    return L * (4 * H * H + 2 * H * F) * frames, L * 2 * H * frames ** 2, front, first, frames


def encoder_flops(config, samples, rank=0, through_front=False):
    """Floating-point operations of an encoder for one utterance, forward and backward.

    With m = 4 H² + 2 H F multiply-adds a frame and layer, T frames, and 2 operations to a multiply-add:
    - layers: 3 m T, as the backward pass costs twice the forward. LoRA: 2 m T, since frozen matrices need no
      gradient of their own, and 3 r (10 H + 2 F) T for the adapters.
    - attention: 3 x 2 H T² for scores and values.
    - what is before the layers: 3 times its forward pass, less the gradient of Whisper's input. LoRA: once,
      or twice where gradients go through it all the same (`through_front`).
    What checkpointing and attention compute a second time is not counted."""
    matrices, attention, front, first, frames = forward_macs(config, samples)
    H, F = widths(config)
    if not rank:
        no_gradient = first if config.model_type == "whisper" else 0
        return 2 * (3 * (matrices + attention + front) - no_gradient)
    adapters = rank * config.num_hidden_layers * (10 * H + 2 * F) * frames
    no_gradient = 0 if through_front else 3 * H * (H + rank) * frames      # at the input of the first layer
    front *= 2 if through_front else 1
    return 2 * (2 * matrices + 3 * (adapters + attention) - no_gradient + front)


def ctc_flops(H, V, tokens, frames, padded):
    "The same for CTC's matrix: all columns at real frames, those of blank and labels at padded ones as well."
    return 6 * H * (V * frames + (1 + tokens) * padded)


def step_flops(config, batches, V, rank, through_front):
    "Operations of one step on each batch, with padded frames and without; heads of under 1 % are left out."
    padded, real, H = 0, 0, config.hidden_size
    for seconds in batches:
        samples = [round(16000 * s) for s in seconds]
        longest = forward_macs(config, max(samples))[-1]
        for n in samples:
            frames, tokens = forward_macs(config, n)[-1], round(PIECES_A_WORD * WORDS_A_SECOND * n / 16000)
            padded += encoder_flops(config, max(samples), rank, through_front)
            padded += ctc_flops(H, V, tokens, frames, longest)
            real += encoder_flops(config, n, rank, through_front) + ctc_flops(H, V, tokens, frames, frames)
    return padded, real


def goes_through_front(encoder):
    "Whether gradients go back through wav2vec 2.0's convolutions, be their weights frozen or not."
    return bool(getattr(getattr(encoder, "feature_extractor", None), "_requires_grad", False))


# --- the device ---------------------------------------------------------------------------------------

def synchronize(device):
    "Wait until the GPU has done all that it was asked for."
    import torch
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device):
    "Wall time of one call, the GPU's work included."
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(function, device, repeats):
    "Median of several calls after one that warms up."
    function()
    return statistics.median(seconds_of(function, device) for _ in range(repeats))


def peak_bytes(device):
    "The most memory so far: of PyTorch's tensors on a GPU, of this process on a CPU."
    import torch
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def half_of(device):
    "The 16-bit type that the package trains in on a GPU; on a CPU bf16, to go the same way."
    import torch
    if device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def half_types(device):
    "The 16-bit types of this device by name: fp16, and bf16 where it is in the hardware."
    import torch
    known = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return {k: v for k, v in known.items() if v in (torch.float16, half_of(device))}


def use_tf32(products, convolutions):
    "Whether float32 operations may be rounded to TF32 (19 bits) on a GPU."
    import torch
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


# --- training -----------------------------------------------------------------------------------------

class Training:
    "A model, its optimiser, and a step as the package's Trainer takes it, each batch a step of its own."
    def __init__(self, size, V, device, dtype, way="full", aligned=False, compiled=False, **options):
        import torch

        from prosody_ser.model import add_lora
        self.device, self.dtype = device, dtype
        self.model = build(size, V, device, **options)
        if way == "LoRA":
            add_lora(self.model, LORA_RANK)
        if way == "checkpointing":
            on = getattr(self.model, "activation_checkpointing_enable", None)
            (on or self.model.gradient_checkpointing_enable)(dict(use_reentrant=False))
        self.model.asr_nats.fill_(0.5 if aligned else math.inf)
        self.model._update_nats = lambda nats: None        # the loss of random weights would change it
        self.model.to(device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.01, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        if compiled:                                        # the toy does not wait for a C++ compiler
            from prosody_ser.backbones import compile_layers
            compile_layers(self.model.backbone, backend="inductor" if device == "cuda" else "aot_eager")

    def loss(self, batch):
        "The weighted loss, in 16 bits where they are asked for."
        import torch
        half = self.dtype != torch.float32
        with torch.autocast(self.device, self.dtype if half else None, enabled=half):
            return self.model(**to_device(batch, self.device)).loss

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def update(self):
        "Clip the gradients and change the weights."
        import torch
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def step(self, batch):
        "One step. Returns the loss, detached."
        loss = self.loss(batch)
        self.backward(loss)
        self.update()
        return loss.detach()


def time_parts(training, batches):
    "Milliseconds of the parts of a step on average; the alignment of words is in the forward pass."
    spent = dict.fromkeys(("forward_ms", "align_ms", "backward_ms", "update_ms"), 0.0)

    def timed(part, function, *args):
        kept = []
        seconds = seconds_of(lambda: kept.append(function(*args)), training.device)
        spent[part] += 1e3 * seconds / len(batches)
        return kept[0]

    training.model.align_words = partial(timed, "align_ms", training.model.align_words)
    for batch in batches:
        loss = timed("forward_ms", training.loss, batch)
        timed("backward_ms", training.backward, loss)
        timed("update_ms", training.update)
    return spent


def forecast_bytes(size, batches, batch, V, way, toy):
    "The largest forecast of `prosody-ser memory` over the batches."
    from prosody_ser.model import memory_estimate
    family, config = encoder_of(size)
    more = dict(lora_rank=LORA_RANK * (way == "LoRA"), gradient_checkpointing=way == "checkpointing")
    with tempfile.TemporaryDirectory() as folder:
        if toy:
            config.save_pretrained(folder)
        settings = family, folder if toy else None, batch
        return max(memory_estimate(*settings, float(s.max()), V, **more)["total"] for s in batches)


def measure_train(size, way, V, batch, aligned, compiled, device, toy):
    "One way to train: time, operations and memory."
    import torch
    sampled = sample_batches(batch, (1 if compiled else 2) if toy else 16, toy)
    base = 0 if device == "cuda" else peak_bytes(device)
    training = Training(size, V, device, half_of(device), way, aligned, compiled)
    pieces = MANY if aligned else FEW
    batches = [pinned(collate(s, V, i, pieces), device) for i, s in enumerate(sampled)]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def one_pass():
        return [seconds_of(partial(training.step, b), device) for b in batches]

    warm_up = sum(sum(one_pass()) for _ in range(1 + compiled))
    total = sum(map(statistics.mean, zip(*(one_pass() for _ in range(2)), strict=True)))
    config, through_front = encoder_of(size)[1], goes_through_front(training.model.backbone.encoder)
    padded, real = step_flops(config, sampled, V, LORA_RANK * (way == "LoRA"), through_front)
    row = dict(step_ms=1e3 * total / len(batches), steps=2 * len(batches), warm_up_seconds=warm_up,
               audio_seconds_a_second=float(sum(s.sum() for s in sampled)) / total,
               padded_flops_a_second=padded / total, real_flops_a_second=real / total,
               peak_bytes=peak_bytes(device) - base,
               forecast_bytes=forecast_bytes(size, sampled, batch, V, way, toy))
    yield row | ({} if compiled else time_parts(training, batches))


# --- correctness --------------------------------------------------------------------------------------

def check(name, difference, allowed):
    "A row: passed if the difference is finite and within what is allowed."
    finite = math.isfinite(difference)
    return dict(name=name, difference=difference if finite else None, allowed=allowed,
                passed=finite and difference <= allowed)


def relative(found, expected):
    "Largest ‖a - b‖ / ‖b‖ of two lists of tensors."
    pairs = [[x.detach().double().cpu() for x in pair] for pair in zip(found, expected, strict=True)]
    worst = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]
    return max(worst) if all(map(math.isfinite, worst)) else math.inf


def furthest(found, expected):
    "Largest |a - b| of two lists of tensors on the CPU."
    worst = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
    return max(worst) if all(map(math.isfinite, worst)) else math.inf


def ctc_example():
    "Hidden states and head, and labels of five utterances: repeats, one that just fits, one that cannot."
    import torch
    g = torch.Generator().manual_seed(0)
    B, T, V, H, L = 5, 60, 48, 24, 9
    head = [torch.randn(B, T, H, generator=g), torch.randn(V, H, generator=g) / H ** 0.5,
            torch.randn(V, generator=g) / 4]
    lengths, n = torch.tensor([60, 47, 30, 9, 8]), torch.tensor([9, 7, 4, 9, 9])
    targets = torch.randint(5, V, (B, L), generator=g)
    targets[:3, 1] = targets[:3, 0]
    targets[3] = torch.arange(5, 5 + L)
    return head, [lengths, targets.masked_fill(torch.arange(L) >= n[:, None], -100), n]


def ctc_result(function, head, labels, device, dtype, **more):
    "The loss and its terms, and the gradients of hidden states, weight and bias."
    import torch
    wide = torch.promote_types(dtype, torch.float32)
    typed = zip(head, (dtype, wide, wide), strict=True)
    leaves = [x.to(device, kind).detach().requires_grad_() for x, kind in typed]
    with torch.autocast(device, dtype if dtype != wide else None, enabled=dtype != wide):
        out = function(*leaves, *(x.to(device) for x in labels), **REGULARISERS, **more)
    out["loss"].backward()
    terms = "loss", "ctc", "entropy", "blank_penalty", "label_smoothing", "confidence", "nats"
    return [out[name] for name in terms], [x.grad for x in leaves]


def check_ctc(device):
    "Values and gradients in float32 and of 16-bit hidden states, and what lies behind the ends."
    import torch
    from dense import dense_ctc

    from prosody_ser.backbones import frame_mask
    from prosody_ser.ctc import regularised_ctc
    head, labels = ctc_example()
    expected = ctc_result(dense_ctc, head, labels, "cpu", torch.float64)
    for how, more in (("in one piece", {}), ("in segments and chunks", dict(cells=1, chunk=7))):
        found = ctc_result(regularised_ctc, head, labels, device, torch.float32, **more)
        yield check(f"CTC {how}: loss and terms", relative(found[0], expected[0]), 1e-5)
        yield check(f"CTC {how}: gradients", relative(found[1], expected[1]), 1e-4)
    for kind, dtype in half_types(device).items():
        rounded = [head[0].to(dtype).double(), *head[1:]]
        expected = ctc_result(dense_ctc, rounded, labels, "cpu", torch.float64)
        found = ctc_result(regularised_ctc, head, labels, device, dtype)
        allowed = 2e-2 if kind == "bf16" else 2e-3
        yield check(f"CTC of {kind} hidden states: loss and terms", relative(found[0], expected[0]), 1e-5)
        yield check(f"CTC of {kind} hidden states: gradients", relative(found[1], expected[1]), allowed)
    behind = ~frame_mask(labels[0], head[0].shape[1])[..., None]
    poisoned = [head[0].masked_fill(behind, math.nan), *head[1:]]
    clean, dirty = (sum(ctc_result(regularised_ctc, h, labels, device, torch.float32), [])
                    for h in (head, poisoned))
    yield check("CTC with NaN behind the ends: as without", relative(dirty, clean), 1e-6)


def decode_all(logits, labels):
    "What each decoder makes of logits: name -> an answer for each utterance, in lists."
    from prosody_ser.alignment import align_logits
    from prosody_ser.decoding import beam_decode, blank_stats, greedy_decode
    return {"greedy": greedy_decode(logits, labels[0]), "beam": beam_decode(logits, labels[0]),
            "beam, blanks merged": beam_decode(logits, labels[0], blank_skip=0.9),
            "forced alignment": align_logits(logits, *labels).tolist(),
            "blank rate": blank_stats(logits, labels[0])["argmax"].tolist()}


def decode_alone(logits, labels):
    "The same, each utterance without its padding."
    answers = {}
    for i, (length, n) in enumerate(zip(labels[0].tolist(), labels[2].tolist(), strict=True)):
        own = [labels[0][i:i + 1], labels[1][i:i + 1, :n], labels[2][i:i + 1]]
        answer = decode_all(logits[i:i + 1, :length], own)
        answer["forced alignment"][0] += [[-1, -1]] * (labels[1].shape[1] - n)       # as padded tokens come
        answers = {k: answers.get(k, []) + v for k, v in answer.items()}
    return answers


def same(a, b):
    "Whether nested lists agree; fractions to 1e-6."
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return abs(a - b) <= (1e-6 if isinstance(a, float) else 0)


def check_decoders(device):
    "Logits, and a head's, as on the CPU; utterances in a batch with noise behind their ends, as alone."
    import torch

    from prosody_ser.decoding import HeadLogits
    head, labels = ctc_example()
    g = torch.Generator().manual_seed(1)
    logits = 3 * (head[0] @ head[1].T + head[2])                                     # (B, T, V)
    logits[..., 4] += 6 * (torch.rand(logits.shape[:2], generator=g) < 0.5)
    behind = (torch.arange(logits.shape[1]) >= labels[0][:, None])[..., None]
    noisy = torch.where(behind, 50 * torch.randn(logits.shape, generator=g), logits)
    there, labels_there = logits.to(device), [x.to(device) for x in labels]
    head_there = HeadLogits(*(x.to(device) for x in head))
    pairs = {"as on the CPU": (decode_all(there, labels_there), decode_all(logits, labels)),
             "of a head, as on the CPU": (decode_all(head_there, labels_there),
                                          decode_all(HeadLogits(*head), labels)),
             "in a batch, as alone": (decode_all(noisy.to(device), labels_there),
                                      decode_alone(there, labels_there))}
    for what, (found, expected) in pairs.items():
        wrong = [k for k in found if not same(found[k], expected[k])]
        told = f" ({', '.join(wrong)} differ)" if wrong else ""
        yield check(f"decoders {what}{told}", len(wrong) / len(found), 0.0)


def outputs(model, batch, dtype=None):
    "Logits of emotion, tokens and prominence of each utterance, without padding: list of tensors on the CPU."
    import torch
    with torch.no_grad(), torch.autocast(batch["audio"].device.type, dtype, enabled=dtype is not None):
        out = model(**batch)
        tokens = out.asr_logits
    rows = out.emotion_logits, tokens, out.prosody_logits, out.lengths, batch["word_counts"]
    return [x.double().cpu() for e, a, p, T, W in zip(*rows, strict=True) for x in (e, a[:T], p[:W])]


def one_row(batch, i):
    "One utterance of a batch, without its padding."
    ends = dict(audio=batch["audio_lengths"][i], targets=batch["target_lengths"][i],
                token_word=batch["target_lengths"][i], prosody=batch["word_counts"][i])
    return {k: v[i:i + 1, :ends[k]] if k in ends else v[i:i + 1] for k, v in batch.items()}


def check_model(device, name):
    "One family: a padded batch against the CPU, and against each utterance alone, in three precisions."
    model, seconds = build(name, 40, "cpu").eval(), (2.0, 1.3, 0.7)
    model.asr_nats.fill_(0.5)                              # words are aligned
    batch, there = collate(seconds, 40, pieces=MANY), copy.deepcopy(model).to(device)
    batch_there = to_device(batch, device)
    rows = [one_row(batch_there, i) for i in range(len(seconds))]
    together = outputs(there, batch_there)
    yield check(f"{name}, float32: as on the CPU", furthest(together, outputs(model, batch)), 1e-4)
    alone = [x for row in rows for x in outputs(there, row)]
    yield check(f"{name}, float32: batch as alone", furthest(together, alone), 1e-4)
    there.asr_nats.fill_(math.inf)                         # an even split: 16 bits may move the end of a word
    alone = [x for row in rows for x in outputs(there, row)]
    for kind, dtype in half_types(device).items():
        found = furthest(outputs(there, batch_there, dtype), alone)
        yield check(f"{name}, {kind}: batch as alone in float32", found, 0.15 if kind == "bf16" else 0.02)


def first_losses(training, batch):
    "Losses until three steps have changed the weights (fp16 skips those that overflow); None if not finite."
    losses, updates = [], 0
    while updates < 3 and len(losses) < 20:                # so many overflows in a row the package allows
        scale = training.scaler.get_scale()
        losses.append(float(training.step(batch)))
        updates += training.scaler.get_scale() >= scale
    finite = all(map(math.isfinite, losses)) and all(bool(p.isfinite().all()) for p in training.parameters)
    return losses if finite and updates == 3 else None


def check_steps(device, name):
    "Training in 16 bits: three updates, after which all is finite, and the first loss against float32's."
    import torch
    batch, expected = collate((1.5, 1.0), 40), None
    for kind, dtype in {"float32": torch.float32, **half_types(device)}.items():
        training = Training(name, 40, device, dtype, head_dropout=0.0, spec_augment=False)
        losses = first_losses(training, batch)
        expected = expected or losses
        difference = abs(losses[0] / expected[0] - 1) if losses else math.inf
        allowed = {"float32": 0.0, "bf16": 0.02, "fp16": 0.005}[kind]
        yield check(f"{name}, {kind}: 3 finite updates, loss", difference, allowed)


def check_operations(device, name):
    "The formula against PyTorch's count for an encoder, its attention by plain matrix products."
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from prosody_ser.backbones import build_encoder
    from prosody_ser.model import add_lora
    config = encoder_of(name)[1]
    config.num_conv_pos_embedding_groups = 1               # PyTorch's count knows no groups backwards
    whisper = config.model_type == "whisper"
    ways = {"full": 0} | ({"LoRA": LORA_RANK} if importlib.util.find_spec("peft") else {})
    for way, rank in ways.items():
        encoder = build_encoder(config.to_dict())
        if rank:
            add_lora(types.SimpleNamespace(backbone=types.SimpleNamespace(encoder=encoder)), rank)
        encoder.to(device).train()
        shape = (2, config.num_mel_bins, 150) if whisper else (2, 24000)             # 1.5 s
        inputs = [torch.randn(shape, device=device)] + [torch.tensor([150, 150], device=device)] * whisper
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            states = encoder(*inputs)[0]
            (states[-1] if whisper else states).sum().backward()
        formula = 2 * encoder_flops(config, 24000, rank, goes_through_front(encoder))
        difference = abs(formula / counter.get_total_flops() - 1)
        yield check(f"{name}, {way}: operations by the formula", difference, 0.01)


CHECKS = {"ctc": check_ctc, "decoders": check_decoders, "model": check_model, "steps": check_steps,
          "operations": check_operations}


def measure_correctness(group, device, toy, **more):
    "One group of checks; they are small everywhere."
    use_tf32(False, False)
    yield from CHECKS[group](device, **more)


# --- other measurements -------------------------------------------------------------------------------

def seconds_in_a_row(function, device, times):
    "Seconds of one call among some that follow each other without a wait."
    def calls():
        for _ in range(times):
            function()
    return median_seconds(calls, device, 5) / times


def measure_ceiling(device, toy):
    "Products of large random matrices, and a copy."
    import torch
    n, half = 512 if toy else 8192, next(iter(half_types(device)))
    for kind, dtype in {half: half_of(device), "float32": torch.float32, "TF32": torch.float32}.items():
        use_tf32(kind == "TF32", kind == "TF32")
        a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
        times = 1 if toy else 50 if kind == half else 5
        seconds = seconds_in_a_row(partial(torch.mm, a, b, out=c), device, times)
        yield dict(name=f"{kind} product, {n} x {n} x {n}", flops_a_second=2 * n ** 3 / seconds,
                   kind="half" if kind == half else kind)
    x = torch.randn(2 ** (20 if toy else 28), device=device)
    seconds = seconds_in_a_row(partial(torch.empty_like(x).copy_, x), device, 1 if toy else 50)
    yield dict(name=f"copy of {x.nbytes >> 20} MiB", kind="copy", bytes_a_second=2 * x.nbytes / seconds)


def measure_ctc(form, shape, device, toy):
    "Time and memory of one form of the loss."
    from ctc import measure_step
    use_tf32(form.endswith("TF32"), True)
    found = measure_step(form.split(",")[0], shape, 32 if toy else 1280, device, 1 if toy else 5)
    yield dict(form=form, shape=shape, step_ms=1e3 * found["seconds"], peak_bytes=found["bytes"])


def measure_decode(V, T, device, toy):
    "Eight utterances of random hidden states, a trained head's size."
    import torch

    from prosody_ser.alignment import align_logits
    from prosody_ser.decoding import HeadLogits, beam_decode, greedy_decode
    B, H, L = 8, 32 if toy else 1280, T // 20                                        # 2.5 tokens a second
    g = torch.Generator().manual_seed(0)
    head = [torch.randn(B, T, H, generator=g), torch.randn(V, H, generator=g) / H ** 0.5, torch.zeros(V)]
    head, targets = [x.to(device) for x in head], torch.randint(5, V, (B, L), generator=g).to(device)
    lengths, n = (torch.full((B,), k, device=device) for k in (T, L))
    runs = {"greedy": lambda: greedy_decode(HeadLogits(*head), lengths),
            "beam": lambda: beam_decode(HeadLogits(*head), lengths),
            "alignment": lambda: align_logits(HeadLogits(*head), lengths, targets, n)}
    yield {f"{k}_a_second": B / median_seconds(run, device, 1 if toy else 3) for k, run in runs.items()}


def write_corpus(folder, count, toy):
    "Noise in WAV files of 16 bits at 16 kHz, as long as the corpus' utterances; these, and their seconds."
    import_loader()
    from prosody_ser.data import Utterance
    rng, utterances = np.random.default_rng(0), []
    seconds = corpus_seconds(toy)
    seconds = seconds[np.linspace(0, len(seconds) - 1, count).astype(int)]
    for i, s in enumerate(seconds):
        with wave.open(str(Path(folder) / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(rng.integers(-3000, 3000, round(16000 * s), dtype=np.int16).tobytes())
        said = labels(s, rng)
        utterances.append(Utterance(f"{i}.wav", said["words"], said["prosody"], said["emotion"]))
    return utterances, seconds


def make_loader(folder, workers, device, toy):
    "The package's dataset, sampler and collator in a loader as its Trainer makes; and seconds of audio."
    import torch

    from prosody_ser.model import Collator
    room, (utterances, seconds) = import_loader(), write_corpus(folder, 8 if toy else 400, toy)
    dataset = room.SpeechDataset(utterances, folder, [str(i) for i in range(7)], seconds)
    batches = room.DurationBatchSampler(seconds, 8, 80.0, epoch=lambda: 1)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=Collator(Pieces(64 if toy else 4000)), num_workers=workers,
        persistent_workers=workers > 0, prefetch_factor=2 if workers else None, pin_memory=device == "cuda")
    return loader, float(seconds.sum())


def time_loader(loader, device):
    "Seconds of the second of two passes over a loader, while nothing else is done."
    for _ in range(2):
        seconds = seconds_of(lambda: [None for _ in loader], device)
    return seconds


def time_feeding(loader, training):
    "Seconds that training waits, and that it works, in the second of two passes, without its first batch."
    for _ in range(2):
        batches, waits, steps = iter(loader), [], []
        for _ in range(len(loader)):
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            steps.append(seconds_of(partial(training.step, batch), training.device))
    return sum(waits[1:]), sum(steps[1:])


def measure_loader(size, workers, device, toy):
    "The loader alone, or feeding the training of a model."
    reader = "soundfile" if importlib.util.find_spec("soundfile") else "wave"
    training = size and Training(size, 64 if toy else 4000, device, half_of(device))
    with tempfile.TemporaryDirectory() as folder:
        loader, audio = make_loader(folder, workers, device, toy)
        if training:
            waited, worked = time_feeding(loader, training)
            row = dict(wait_share=waited / (waited + worked), wait_ms=1e3 * waited / (len(loader) - 1),
                       step_ms=1e3 * worked / (len(loader) - 1))
        else:
            row = dict(audio_seconds_a_second=audio / time_loader(loader, device))
    yield row | dict(workers=workers, reader=reader)


# --- what is measured, and in which order -------------------------------------------------------------

def job(part, name, need, /, **arguments):
    "A measurement: its part, its name, the seconds that it is expected to take, and its arguments."
    return dict(part=part, name=name, need=need, arguments=arguments)


def train_group(size, way, V=4000, batch=8, aligned=False, compiled=False):
    "One way to train. Compiling takes longest."
    more = [f"V {V}"] * (V == 16000) + [f"batch {batch}"] * (batch == 32)
    name = ", ".join([size, way, *more, *["words aligned"] * aligned, *["compiled"] * compiled])
    need = 90 if compiled else 20 * max(1, batch // 16)
    how = dict(size=size, way=way, V=V, batch=batch, aligned=aligned, compiled=compiled)
    return [job("train", name, need, **how)]


def correctness_group():
    "All checks: they share a process, since neither time nor memory is measured."
    toys = "toy whisper", "toy XLS-R", "toy W2V-BERT"
    groups = [dict(group="ctc"), dict(group="decoders"), *(dict(group="model", name=n) for n in toys),
              *(dict(group="steps", name=n) for n in toys),
              *(dict(group="operations", name=n) for n in toys[:2])]
    return [job("correctness", " ".join(g.values()), 3, **g) for g in groups]


def ctc_groups(forms, shapes):
    return [[job("ctc", f"{form}, {shape}", 10, form=form, shape=shape)]
            for shape in shapes for form in forms]


def loader_groups(size, workers):
    "A loader that feeds a model; and alone, without processes of its own and with some."
    fed = job("loader", f"feeding {size}, full; workers: {workers}", 25, size=size, workers=workers)
    return [[fed], [job("loader", f"alone; workers: {n}", 6, size=None, workers=n) for n in (0, workers)]]


def decode_groups(sizes, lengths):
    return [[job("decode", f"T {T}, V {V}", 5, V=V, T=T) for T in lengths] for V in sizes]


def gpu_plan(workers):
    "Groups of jobs, each for one process, in the order of their worth."
    sizes = whisper, xlsr = "whisper-large-v3", "XLS-R-300M"
    ways = "full", "LoRA", "checkpointing"
    return [[job("ceiling", "ceiling", 12)], correctness_group(),
            *(train_group(size, way) for way in ways for size in sizes),
            *ctc_groups(("dense", "lean"), ("short", "long")),
            *(train_group(size, "full", aligned=True) for size in sizes),
            *loader_groups(whisper, workers), *decode_groups((4000, 16000), (100, 500, 1500)),
            *(train_group(size, "full", compiled=True) for size in (xlsr, whisper)),
            *(train_group(size, "full", V=16000) for size in sizes),
            *(train_group(size, "full", batch=32) for size in sizes),
            *ctc_groups(("lean, TF32",), ("short", "long")),
            *(train_group(size, "full", batch=32, compiled=True) for size in (xlsr, whisper)),
            *(train_group(size, way, compiled=True) for way in ways[1:] for size in sizes)]


def toy_plan(workers):
    "Jobs of each kind, all for one process."
    whisper, xlsr, small = "toy whisper", "toy XLS-R", dict(V=64, batch=3)
    groups = [[job("ceiling", "ceiling", 1)], correctness_group(),
              train_group(whisper, "checkpointing", **small), train_group(xlsr, "LoRA", aligned=True, **small),
              train_group(whisper, "full", compiled=True, **small),
              *ctc_groups(("dense", "lean"), ("quick",)), *loader_groups(whisper, min(workers, 1)),
              *decode_groups((64,), (20,))]
    return [sum(groups, [])]


# --- processes ----------------------------------------------------------------------------------------

MARK = "@row "                                 # begins a line of a child's output that is for its parent
MEASURES = {"ceiling": measure_ceiling, "correctness": measure_correctness, "train": measure_train,
            "ctc": measure_ctc, "loader": measure_loader, "decode": measure_decode}


def tell(what):
    "A line for the parent: a row, or the number of a job that is done."
    print(MARK + json.dumps(what), flush=True)


def failure(a_job, why):
    "The row of a job that came to nothing."
    return dict(part=a_job["part"], name=a_job["name"], failed=" ".join(why.split())[:200])


def describe_machine():
    "What a reader of the numbers wants to know of where they come from."
    import torch
    import transformers
    gpu = torch.cuda.is_available()
    return dict(gpu=gpu, device=torch.cuda.get_device_name(0) if gpu else platform.machine(),
                memory_bytes=torch.cuda.get_device_properties(0).total_memory if gpu else None,
                cuda=torch.version.cuda, torch=torch.__version__, transformers=transformers.__version__,
                python=platform.python_version(), cores=os.cpu_count())


def do_job(a_job, device, toy):
    "Measure, and tell each row."
    import torch
    use_tf32(False, True)                      # PyTorch's defaults, which the package leaves alone
    try:
        for row in MEASURES[a_job["part"]](device=device, toy=toy, **a_job["arguments"]):
            tell(dict(part=a_job["part"], name=a_job["name"], job=a_job["name"]) | row)
    except torch.cuda.OutOfMemoryError:
        tell(failure(a_job, "out of memory"))
    except Exception as e:
        traceback.print_exc()
        tell(failure(a_job, f"{type(e).__name__}: {e}"))


def child(jobs, device, toy):
    "Do jobs one after the other; without any, describe the machine."
    import torch
    if not jobs:
        tell(describe_machine())
    if toy:
        torch.set_num_threads(1)
    if jobs:
        import_loader()                                    # other rooms import some of what it does
    for i, a_job in enumerate(jobs):
        do_job(a_job, device, toy)
        tell(i)


def end(process):
    "Kill a child and the processes that it has started. Returns what it has printed."
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)             # it leads a group of its own
    return process.communicate()


def ask(jobs, device, toy, seconds):
    "Rows that a new process makes of some jobs in some seconds, or why it could not; and what it said."
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps([jobs, device, toy])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={"GOMP_SPINCOUNT": "0", **os.environ}, start_new_session=True)
    try:
        out, said = process.communicate(timeout=seconds)
        why = f"{(said.strip().splitlines() or [''])[-1]} (exit code {process.returncode})"
    except subprocess.TimeoutExpired:
        out, said = end(process)
        why = f"stopped after {seconds:.0f} s"
    except BaseException:
        end(process)
        raise
    told = [json.loads(line.removeprefix(MARK)) for line in out.splitlines() if line.startswith(MARK)]
    rows, done = [x for x in told if isinstance(x, dict)], [x for x in told if isinstance(x, int)]
    return rows + [failure(a_job, why) for i, a_job in enumerate(jobs) if i not in done], said


# --- the table ----------------------------------------------------------------------------------------

def find(rows, **wanted):
    "The first row with these values, or None."
    return next((r for r in rows if all(r.get(k) == v for k, v in wanted.items())), None)


def judge(row, rows, toy):
    "Add to a row what it is beside the rows before it, and a verdict."
    if row["part"] == "correctness" and "left_out" not in row:
        row["verdict"] = "pass" if row.get("passed") else "FAIL"
    if "failed" in row or "left_out" in row:
        return
    if row["part"] == "train":
        judge_training(row, find(rows, kind="half"), toy)
    dense = find(rows, part="ctc", form="dense", shape=row.get("shape"))
    if row["part"] == "ctc" and dense:
        row["time_ratio"] = row["step_ms"] / dense["step_ms"]
        row["memory_ratio"] = row["peak_bytes"] / max(dense["peak_bytes"], 1)        # toys may show no growth


def judge_training(row, ceiling, toy):
    "Share of the ceiling, peak over its forecast, and whether the goals are met."
    row["forecast_ratio"] = row["peak_bytes"] / row["forecast_bytes"]
    if ceiling:
        row["share"] = row["padded_flops_a_second"] / ceiling["flops_a_second"]
        row["real_share"] = row["real_flops_a_second"] / ceiling["flops_a_second"]
    if not toy:
        row["memory_met"] = abs(row["forecast_ratio"] - 1) <= GOALS["forecast"]
        row["share_met"] = row["share"] >= GOALS["share"] if ceiling else None


def lines_of(row):
    "What the table says of a row, a line each: what, value, what stands beside it, verdict."
    if "left_out" in row:
        return [(row["name"], "left out", row["left_out"], "")]
    if "failed" in row:
        return [(row["name"], "failed", row["failed"], row.get("verdict", ""))]
    first = row["name"], *SHOW[row["part"]](row), row.get("verdict", "")
    return [first, *(training_lines(row) if row["part"] == "train" else [])]


def training_lines(row):
    "The share of the ceiling, the peak of memory, and the parts of a step."
    met = {True: "met", False: "not met", None: ""}
    if "share" in row:
        beside = f"{row['real_share']:.1%} without padding; goal {GOALS['share']:.0%}"
        yield "  share of the ceiling", f"{row['share']:.1%}", beside, met[row.get("share_met")]
    beside = f"forecast {row['forecast_bytes'] / 1e9:.2f} GB, ratio {row['forecast_ratio']:.2f}"
    yield "  peak of memory", f"{row['peak_bytes'] / 1e9:.2f} GB", beside, met[row.get("memory_met")]
    if "forward_ms" in row:
        parts = " + ".join(f"{row[k]:.0f}" for k in ("forward_ms", "backward_ms", "update_ms"))
        beside = f"{row['align_ms']:.0f} ms of the first align words" if row["align_ms"] else ""
        yield "  forward + backward + clipping and AdamW", f"{parts} ms", beside, ""


def show_ceiling(row):
    if row["kind"] == "copy":
        return f"{row['bytes_a_second'] / 1e9:,.1f} GB/s", "bytes read plus bytes written"
    return f"{row['flops_a_second'] / 1e12:,.2f} TFLOP/s", ""


def show_correctness(row):
    found = "not finite" if row["difference"] is None else f"{row['difference']:.1e}"
    return found, f"at most {row['allowed']:g}"


def show_train(row):
    heard, warm_up = row["audio_seconds_a_second"], row["warm_up_seconds"]
    return f"{row['step_ms']:.1f} ms", f"{heard:,.0f} s of audio a second, warm-up {warm_up:.0f} s"


def show_ctc(row):
    beside = f"{row['peak_bytes'] / 2 ** 20:,.0f} MiB"
    if "time_ratio" in row:
        beside += f"; time x {row['time_ratio']:.2f}, memory x {row['memory_ratio']:.3f}"
    return f"{row['step_ms']:.1f} ms", beside


def show_loader(row):
    if "wait_ms" in row:
        beside = f"{row['wait_ms']:.1f} ms, then {row['step_ms']:.1f} ms of work"
        return f"{row['wait_share']:.1%} waiting", beside
    return f"{row['audio_seconds_a_second']:,.0f}", f"s of audio a second, read by {row['reader']}"


def show_decode(row):
    beside = f"greedy {row['greedy_a_second']:,.0f}, alignment {row['alignment_a_second']:,.0f}"
    return f"beam {row['beam_a_second']:,.1f}", beside


SHOW = {"ceiling": show_ceiling, "correctness": show_correctness, "train": show_train, "ctc": show_ctc,
        "loader": show_loader, "decode": show_decode}


def earlier_rows(path, about):
    "Measured rows of a file of the same card, PyTorch and transformers, each with the commit that made it."
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if any(found["about"][k] != about[k] for k in ("device", "torch", "transformers", "toy")):
        return []
    rows = [row for row in found["rows"] if not {"failed", "left_out"} & set(row)]
    return [dict(row, commit=row.get("commit", found["about"]["commit"])) for row in rows]


class Report:
    "The rows: in a JSON file as soon as they are there, and in the end on the screen."
    def __init__(self, path, about, more=False):
        self.path, self.about = Path(path), about
        self.rows = earlier_rows(self.path, about) if more else []
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows, seconds):
        "Judge some rows, and write all so far; never half a file."
        for row in rows:
            kept = [r for r in self.rows if (r["part"], r["name"]) != (row["part"], row["name"])]
            known = len(kept) < len(self.rows) or row["name"] in {r.get("job") for r in self.rows}
            if "left_out" in row and known:
                continue                                   # an earlier run had the time for it
            self.rows = kept
            judge(row, self.rows, self.about["toy"])
            self.rows.append(row)
        self.about["seconds"] = seconds
        text = json.dumps(dict(about=self.about, rows=self.rows), indent=1, allow_nan=False)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self.path)

    def show(self):
        "Print the table, part by part."
        toy = "a toy on the CPU: only correctness means anything"
        told = [self.about["device"], f"PyTorch {self.about['torch']}", self.about["commit"] or "no commit"]
        print(", ".join(told) + self.about["toy"] * f"\n{toy}")
        for part, title in TITLES.items():
            if rows := [r for r in self.rows if r["part"] == part]:
                print(f"\n{title}")
            for what, value, beside, verdict in (line for row in rows for line in lines_of(row)):
                print(f"{what:<53}{value:>17}  {beside:<34} {verdict}".rstrip())
        checks = [r["verdict"] for r in self.rows if "verdict" in r]
        failed, left_out = (sum(k in r for r in self.rows) for k in ("failed", "left_out"))
        passed, wrong = (checks.count(v) for v in ("pass", "FAIL"))
        print(f"\n{passed} checks passed, {wrong} failed. {len(self.rows)} rows: "
              f"{failed} failed, {left_out} left out. {self.about['seconds']:.0f} s. {self.path}")

    def exit_code(self):
        return int(any(r.get("verdict") == "FAIL" for r in self.rows))


# --- the whole ----------------------------------------------------------------------------------------

def commit():
    "The commit of the checkout, with a + where files differ from it; None where git does not know."
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    try:
        return git("rev-parse", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "-uno").strip())
    except (OSError, subprocess.CalledProcessError):
        return None


def stopped_for_time(row):
    "A row that was stopped since all time was used up is left out, not failed."
    late = row.get("failed", "").startswith("stopped after")
    return dict(part=row["part"], name=row["name"], left_out=row["failed"]) if late else row


def measure(groups, report, device, start, verbose):
    "Go through the groups while there is time."
    toy, limit = report.about["toy"], 60 * report.about["minutes"]
    for jobs in groups:
        need, left = sum(j["need"] for j in jobs), limit - (time.monotonic() - start)
        names = f"{jobs[0]['part']}: {jobs[0]['name']}" + f" and {len(jobs) - 1} more" * (len(jobs) > 1)
        print(f"{limit - left:5.0f} s  {names}", file=sys.stderr, flush=True)
        if need > left:
            why = f"needs {need} s, {max(0, left):.0f} s are left"
            rows, said = [dict(part=j["part"], name=j["name"], left_out=why) for j in jobs], ""
        else:
            allowed = left if toy else min(left, max(90, 2 * need))
            rows, said = ask(jobs, device, toy, allowed)
            if allowed == left:                            # not the row's fault
                rows = [stopped_for_time(row) for row in rows]
        report.add(rows, time.monotonic() - start)
        if verbose or any("failed" in row for row in rows):
            print(said[-4000:], file=sys.stderr, flush=True)


def parse():
    "The command line."
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--out", default="runs/gpu.json", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=8, help="time for all of it; default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=TITLES, default=list(TITLES),
                        help="only these; train brings ceiling along")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[],
                        help="only measurements of these names (* stands for anything), and the ceiling. "
                        "A name that is not there is answered by all names")
    parser.add_argument("--more", action="store_true", help="keep rows of --out that are not measured now, "
                        "if card and PyTorch are the same")
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU; so it is without a GPU")
    parser.add_argument("--verbose", action="store_true", help="print what the processes say to stderr")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    "Plan, measure, report."
    args, start = parse(), time.monotonic()
    if args.child:
        return child(*json.loads(args.child))
    machine, said = ask([], "cpu", True, 60)
    if not machine:
        sys.exit(f"PyTorch or transformers could not be loaded:\n{said}")
    toy = args.toy or not machine[0]["gpu"]
    about = machine[0] | dict(toy=toy, commit=commit(), minutes=args.minutes, goals=GOALS, seconds=0.0,
                              date=datetime.datetime.now().isoformat(timespec="seconds"))
    groups = (toy_plan if toy else gpu_plan)(min(WORKERS, os.cpu_count()))
    parts = {*args.parts, *["ceiling"] * ("train" in args.parts)}
    groups = [some for jobs in groups if (some := [j for j in jobs if j["part"] in parts])]
    if args.only:
        def wanted(job):
            return job["part"] == "ceiling" or any(fnmatchcase(job["name"], n) for n in args.only)

        names = [j["name"] for jobs in groups for j in jobs]
        if nothing := [n for n in args.only if not any(fnmatchcase(name, n) for name in names)]:
            sys.exit(f"--only {' '.join(nothing)}: no such row. There are: {'; '.join(dict.fromkeys(names))}")
        groups = [some for jobs in groups if (some := list(filter(wanted, jobs)))]
    report = Report(args.out, about, args.more)
    try:
        measure(groups, report, "cpu" if toy else "cuda", start, args.verbose)
    finally:
        report.show()
    return report.exit_code()


if __name__ == "__main__":
    sys.exit(main())
