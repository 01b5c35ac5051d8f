"""What predicting costs: the start of the command, many short clips beside Hugging Face's pipeline, recordings of an hour.

    python benchmarks/predict.py start                    # CPU seconds of `prosody-ser predict` of one short file, best of 5
    python benchmarks/predict.py throughput --whisper W   # clips of 2 to 5 s a second: ours and pipeline("audio-classification")
    python benchmarks/predict.py long --whisper W         # 1, 10 and 60 minutes with --timeline: peak memory, share of real time
    python benchmarks/predict.py start throughput long --quick --json OUT.json

W is a folder of Whisper weights (random ones of the same size do: a Whisper-tiny is made of its configuration where none is given). `--threads 2` uses both cores.
The parts run in processes of their own, one after the other. `--quick` takes a small encoder, a few clips and a minute of audio, to see that all of it runs.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = dict(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, decoder_layers=4, decoder_attention_heads=6, decoder_ffn_dim=1536)
QUICK = dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64)
EMOTIONS = ["anger", "joy", "neutral", "sadness"]
TEXTS = ["the quick brown fox jumps over the lazy dog", "my mother buys food and water today"]


def whisper_folder(args, folder):
    """The folder of a Whisper: the one given, or one of random weights."""
    if args.whisper:
        return args.whisper
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
    WhisperModel(WhisperConfig(**(QUICK if args.quick else TINY))).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor().save_pretrained(folder / "whisper")
    return folder / "whisper"


def our_model(whisper, folder):
    """A model with all heads over that encoder, as if it had learned to place words; its folder."""
    import torch

    from prosody_ser.model import create_model
    from prosody_ser.tokenizer import SentencePieceTokenizer
    torch.manual_seed(0)
    tokenizer = SentencePieceTokenizer(60, folder / "tok", model_type="char").train_tokenizer(TEXTS * 4)
    model = create_model(EMOTIONS, tokenizer, "whisper", str(whisper))
    model.asr_nats.fill_(0.0)
    with torch.no_grad():                                      # blank in most frames, as a trained model has it
        model.asr.out.bias[tokenizer.blank_id] += 1.5
    model.save_pretrained(folder / "model")
    return folder / "model"


def voice(seconds, seed, rate=16000):
    """Something that a pause detector takes for speech: voiced bursts of 2 to 5 s between pauses, in noise. Float (S,)."""
    import numpy as np
    rng, parts, n = np.random.default_rng(seed), [], 0
    while n < seconds * rate:
        t = np.arange(round(rng.uniform(2, 5) * rate)) / rate
        pitch = 2 * np.pi * np.cumsum(rng.uniform(100, 250) * (1 + .1 * np.sin(2 * np.pi * t))) / rate
        burst = sum(np.sin(k * pitch) / k for k in (1, 2, 3, 5, 8)) * (.3 + .2 * np.sin(2 * np.pi * 4 * t))
        parts += [.1 * burst, np.zeros(round(rng.uniform(.5, 1.5) * rate))]
        n += len(parts[-1]) + len(burst)
    x = np.concatenate(parts)[:round(seconds * rate)]
    return (x + 1e-3 * rng.normal(size=len(x))).astype("float32")


def child(argv, **env):
    """Run a command: wall seconds, CPU seconds, peak MB, standard output."""
    start = os.times()
    job = subprocess.Popen([sys.executable, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | env)
    out = job.stdout.read()
    _, status, used = os.wait4(job.pid, 0)
    if status:
        sys.exit(f"{argv} ended with {status}")
    scale = 1e6 if sys.platform == "darwin" else 1e3
    return dict(wall=os.times().elapsed - start.elapsed, cpu=used.ru_utime + used.ru_stime, peak_mb=used.ru_maxrss / scale, out=out)


def start(args, folder):
    """CPU seconds of the command for one short file, without and with all imports."""
    import soundfile as sf
    model = our_model(whisper_folder(args, folder), folder)
    sf.write(folder / "short.wav", voice(3, 0), 16000)
    command = ["-m", "prosody_ser.cli", "predict", model, folder / "short.wav", "--device", "cpu"]
    runs = 1 if args.quick else 5
    for name, env in (("prosody-ser predict, one file", {}), ("the same, with all imports", dict(PROSODY_SER_IMPORT_ALL="1"))):
        best = min((child(command, **env) for _ in range(runs)), key=lambda r: r["cpu"])
        yield dict(what=name, cpu_seconds=round(best["cpu"], 2), wall_seconds=round(best["wall"], 2), peak_mb=round(best["peak_mb"]))


def best_rate(job, seconds, runs):
    """Seconds of audio a CPU second, the best of some runs: other work on the machine changes it little."""
    import time
    best = 0.0
    for _ in range(runs):
        begin = time.process_time()
        job()
        best = max(best, seconds / (time.process_time() - begin))
    return best


def throughput(args, folder):
    """Clips of 2 to 5 s, held as arrays: ours alone and many, the pipeline alone and in batches; emotion alone (as the pipeline) and with all heads; by CPU time."""
    import numpy as np
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification, pipeline
    from transformers.utils import logging

    from prosody_ser.inference import Predictor
    from prosody_ser.model import create_model, load_checkpoint
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    whisper = whisper_folder(args, folder)
    rng = np.random.default_rng(0)
    clips = [voice(rng.uniform(2, 5), i) for i in range(4 if args.quick else 64)]
    few = clips[:2 if args.quick else 16]                      # for what is slow
    labels = dict(num_labels=len(EMOTIONS), id2label=dict(enumerate(EMOTIONS)), label2id={n: i for i, n in enumerate(EMOTIONS)})
    theirs = WhisperForAudioClassification(WhisperConfig.from_pretrained(whisper, **labels)).eval()
    pipe = pipeline("audio-classification", theirs, feature_extractor=WhisperFeatureExtractor.from_pretrained(whisper), device="cpu")
    torch.manual_seed(0)
    emotion = Predictor(create_model(EMOTIONS, None, "whisper", str(whisper), tasks=("ser",)), "cpu")
    every = load_checkpoint(str(our_model(whisper, folder)))

    def one_by_one(predict, some):
        return (lambda: [predict(c) for c in some]), some

    def given(some):
        return [dict(raw=c, sampling_rate=16000) for c in some]
    jobs = {"pipeline, one at a time": one_by_one(lambda c: pipe(dict(raw=c.copy(), sampling_rate=16000)), few),
            "pipeline, batch_size=16": (lambda: list(pipe(given(few), batch_size=16)), few),
            "ours, emotion, one at a time": one_by_one(emotion, clips),
            "ours, emotion, many": (lambda: list(emotion.many(clips)), clips)}
    for decode in ("greedy", "beam"):
        whole = Predictor(every, "cpu", decode)
        jobs |= {f"ours, all heads, {decode}, one at a time": one_by_one(whole, few), f"ours, all heads, {decode}, many": (lambda w=whole: list(w.many(clips)), clips)}
    try:
        from prosody_ser.export import export_onnx
        from prosody_ser.onnx import OnnxPredictor
        for kind in ("float32", "int8"):
            export_onnx(str(folder / "model"), folder / kind, int8=kind == "int8")
            jobs[f"ours, all heads, greedy, one at a time, ONNX {kind}"] = one_by_one(OnnxPredictor(folder / kind, threads=args.threads), clips)
    except ImportError as e:
        print(f"without ONNX: {e}", file=sys.stderr)
    first = None
    for name, (job, some) in jobs.items():
        job()
        rate = best_rate(job, sum(map(len, some)) / 16000, 1 if args.quick else 3)
        first = first or rate
        yield dict(what=name, audio_seconds_per_cpu_second=round(rate, 1), clips_per_cpu_second=round(rate * len(some) / (sum(map(len, some)) / 16000), 1), times_the_pipeline=round(rate / first, 1))


def long(args, folder):
    """Peak memory and share of real time of the command with --timeline."""
    import numpy as np
    import soundfile as sf
    model = our_model(whisper_folder(args, folder), folder)
    for minutes in (.2, 1) if args.quick else (1, 10, 60):
        path = folder / "long.wav"
        with sf.SoundFile(path, "w", 16000, 1) as file:
            for i in range(max(1, round(minutes))):
                file.write(np.asarray(voice(60 * min(1, minutes), i)))
        command = ["-m", "prosody_ser.cli", "predict", model, path, "--timeline", "--device", "cpu", "--decode_method", args.decode]
        found = child(command, OMP_NUM_THREADS=str(args.threads))
        summary = json.loads(found["out"].splitlines()[-1])["summary"]
        yield dict(what=f"{minutes:g} minutes, {summary['utterances']} utterances", wall_seconds=round(found["wall"], 1), cpu_seconds=round(found["cpu"], 1),
                   share_of_real_time=round(found["wall"] / 60 / minutes, 4), peak_mb=round(found["peak_mb"]))


PARTS = dict(start=start, throughput=throughput, long=long)


def run_part(args):
    """The rows of one part, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return list(PARTS[args.parts[0]](args, Path(folder)))


def table(rows):
    """Rows as lines of text."""
    columns = list(rows[0])
    cells = [columns, *[[str(r[c]) for c in columns] for r in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) for line in cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--whisper", help="folder of a Whisper")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--decode", default="greedy", choices=["greedy", "beam"], help="of long recordings")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--quick", action="store_true", help="see that it runs")
    args = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)                # a start would compile PyTorch's modules anew
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = {}
    for part in args.parts:
        if len(args.parts) == 1:
            found[part] = run_part(args)
        else:                                                  # what one part has imported and allocated is not the next one's
            more = [x for k, v in (("--whisper", args.whisper), ("--threads", args.threads), ("--decode", args.decode)) if v for x in (k, str(v))]
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, part, *more, *["--quick"] * args.quick, "--json", f"{folder}/rows.json"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                found |= json.loads(Path(folder, "rows.json").read_text())
        print(f"\n{part}: {PARTS[part].__doc__.strip()}\n\n{table(found[part])}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
