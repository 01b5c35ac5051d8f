"""Which detector finds the pauses? Utterances of real speech one after the other, with pauses of known length, in silence, pink and white noise, and music-like tones.

    python benchmarks/timeline.py --manifests EMODB/test.jsonl NEMO/small.jsonl RAVDESS/all.jsonl TWI/all.jsonl DEMO/test.jsonl \\
        [--model DEMO/best_model --model_manifest DEMO/test.jsonl] [--json OUT.json]

`pip install silero-vad webrtcvad-wheels` adds the two detectors that it compares ours with; without them ours is alone. Each gets the same least pause (0.4 s), edges (0.2 s) and longest
utterance (12 s). Found: share of the pauses of at least 0.5 s in which there is a cut. Right: share of the cuts that are at a pause that was put there (pauses within an
utterance count as wrong). Lost: share of the speech that is in no utterance. Words cut: words with a cut inside, where the manifest has word times. With a model: its UA and WER
on the utterances that were found, where a reference has the emotion of the one that it shares most time with, beside those on the utterances as they are.
"""
import argparse
import json
from pathlib import Path

import numpy as np

RATE = 16000
PAUSES = (.3, .5, .8, 1.5, 3.)
ROOMS = [("silence", 60), ("pink noise", 20), ("pink noise", 10), ("pink noise", 5), ("white noise", 10), ("tones", 20), ("tones", 10)]     # and dB of speech over them


def trimmed(u):
    """Samples of an utterance from the first to the last of its frames above -35 dB, and where that begins (s)."""
    from prosody_ser.audio import load_utterance
    x = load_utterance(u)
    power = np.square(x[:len(x) // 160 * 160].reshape(-1, 160)).mean(1)
    loud = np.flatnonzero(power > power.max() * 10 ** -3.5)
    return x[loud[0] * 160:(loud[-1] + 1) * 160], loud[0] / 100


def room(kind, n, rng):
    """Sound (n,) of power 1 that is no speech."""
    if kind == "tones":                                        # a chord each half second
        t = np.arange(RATE // 2) / RATE
        chords = [sum(np.sin(2 * np.pi * 220 * 2 ** (rng.integers(12) / 12) * k * t) for k in (1, 1.25, 1.5, 2)) * np.exp(-2 * t) for _ in range(n // len(t) + 1)]
        x = np.concatenate(chords)[:n]
    else:
        x = rng.normal(size=n)
        if kind == "pink noise":
            x = np.fft.irfft(np.fft.rfft(x) / np.sqrt(np.arange(n // 2 + 1).clip(1)), n)
    return x / x.std()


def recording(rows, kind, db, seed=1):
    """Samples (S,), where speech is, where pauses are, where words are: lists of (start, end) in seconds."""
    rng, parts, speech, pauses, words, at = np.random.default_rng(seed), [np.zeros(RATE)], [], [], [], 1.0
    for u in rows:
        x, begin = trimmed(u)
        x = x / np.sqrt(np.square(x).mean()) * .05 * 10 ** (rng.uniform(-6, 6) / 20)
        pause = round(rng.choice(PAUSES) * RATE)
        parts += [x, np.zeros(pause)]
        speech.append((at, at + len(x) / RATE))
        words += [(at + a - begin, at + b - begin) for a, b in u.word_times or []]
        pauses.append((speech[-1][1], speech[-1][1] + pause / RATE))
        at = pauses[-1][1]
    x = np.concatenate(parts)
    return (x + .05 * 10 ** (-db / 20) * room(kind, len(x), rng)).astype("float32"), speech, pauses[:-1], words


def ours(x):
    from prosody_ser.timeline import cut_at_pauses
    return [(start, start + len(s) / RATE) for start, s in cut_at_pauses([x])]


def silero():
    import torch
    from silero_vad import get_speech_timestamps, load_silero_vad
    model = load_silero_vad()
    how = dict(min_silence_duration_ms=400, speech_pad_ms=200, max_speech_duration_s=12)
    return lambda x: [(d["start"] / RATE, d["end"] / RATE) for d in get_speech_timestamps(torch.from_numpy(x), model, **how)]


def webrtc():
    import webrtcvad

    from prosody_ser.timeline import _Cutter, _Piece
    def detect(x):
        vad, pcm = webrtcvad.Vad(3), (x.clip(-1, 1) * 32767).astype("<i2")
        voiced = np.repeat([vad.is_speech(pcm[i:i + 480].tobytes(), RATE) for i in range(0, len(pcm) - 479, 480)], 3)
        return [(start, start + len(s) / RATE) for start, s in _Cutter(12).stretches([_Piece(x[:len(voiced) * 160], voiced.astype(float), .5, .5)])]
    return detect


def judged(found, speech, pauses, words):
    """Pauses of at least 0.5 s: how many, of which found; cuts: how many, of which right; seconds of speech, of which lost; words: how many, of which cut."""
    cuts = [(a[1], b[0]) for a, b in zip(found, found[1:], strict=False)]

    def meet(cut, pause):
        return cut[0] <= pause[1] + .05 and cut[1] >= pause[0] - .05
    long = [p for p in pauses if p[1] - p[0] > .45]
    covered = sum(max(0, min(b, d) - max(a, c)) for a, b in found for c, d in speech)
    total = sum(b - a for a, b in speech)
    cut_words = sum(any(c[0] < b - .05 and c[1] > a + .05 for c in cuts) for a, b in words)
    return np.array([len(long), sum(any(meet(c, p) for c in cuts) for p in long), len(cuts), sum(any(meet(c, p) for p in pauses) for c in cuts),
                     total, total - covered, len(words), cut_words])


def model_scores(model, manifest, detectors, n):
    """UA and WER of a model on utterances as they are, and on those that each detector finds, in silence and in noise."""
    import jiwer

    from prosody_ser.data import read_manifest
    from prosody_ser.inference import Predictor
    predictor, rows = Predictor(model, "cpu", "greedy"), read_manifest(manifest, Path(manifest).parent)[:n]
    for kind, db in ROOMS[:2]:
        x, speech, *_ = recording(rows, kind, db)
        for name, detect in {"known pauses": lambda x, speech=speech: [(a - .2, b + .2) for a, b in speech], **detectors}.items():
            found = detect(x)
            answers = list(predictor.many(x[round(a * RATE):round(b * RATE)] for a, b in found))
            heard = [max(range(len(found)), key=lambda i, c=c, d=d: min(found[i][1], d) - max(found[i][0], c)) for c, d in speech]
            right = {}
            for u, i in zip(rows, heard, strict=True):
                right.setdefault(u.emotion, []).append(answers[i].emotion == u.emotion)
            wer = jiwer.wer(" ".join(u.text for u in rows), " ".join(a.transcript for a in answers))
            yield dict(room=f"{kind}, {db} dB", detector=name, utterances=len(found), UA=round(float(np.mean([np.mean(v) for v in right.values()])), 3), WER=round(wer, 3))


if __name__ == "__main__":
    import time

    from predict import table

    from prosody_ser.data import read_manifest
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifests", nargs="+", required=True, help="with their audio beside them")
    parser.add_argument("--model", help="best_model folder")
    parser.add_argument("--model_manifest", help="of its test")
    parser.add_argument("--utterances", type=int, default=40, help="of each manifest")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    detectors = {"ours": ours}
    for name, make in (("silero", silero), ("webrtc", webrtc)):
        try:
            detectors[name] = make()
        except ImportError as e:
            print(f"{name} is left out: {e}")
    rng, corpora = np.random.default_rng(0), []
    for path in args.manifests:
        rows = read_manifest(path, Path(path).parent)
        corpora.append([rows[i] for i in rng.permutation(len(rows))[:args.utterances]])
    rows = []
    for kind, db in ROOMS:
        made = [recording(c, kind, db) for c in corpora]
        for name, detect in detectors.items():
            begin = time.perf_counter()
            found = [detect(x) for x, *_ in made]
            took = (time.perf_counter() - begin) / sum(len(x) / RATE for x, *_ in made)
            long, hit, cuts, right, speech, lost, words, cut_words = sum(judged(f, *m[1:]) for f, m in zip(found, made, strict=True))
            rows.append({"room": f"{kind}, {db} dB", "detector": name, "found": round(hit / long, 3), "right": round(right / max(1, cuts), 3), "lost": round(lost / speech, 3),
                         "words cut": f"{cut_words:.0f} of {words:.0f}", "share of real time": round(took, 4)})
    print(table(rows))
    scores = list(model_scores(args.model, args.model_manifest, detectors, 150)) if args.model else []
    print(table(scores) if scores else "")
    if args.json:
        Path(args.json).write_text(json.dumps(dict(detectors=rows, model=scores), indent=1) + "\n")
