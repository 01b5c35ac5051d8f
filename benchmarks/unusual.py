"""Does `unusual` mark what it should? False alarms on test sets, and how much of other sounds is found.

    python benchmarks/unusual.py --runs demo=runs/demo EmoDB=runs/emodb \\
        --others Polish=NEMO/small.jsonl English=RAVDESS/all.jsonl Twi=TWI/all.jsonl --out nbs/results/unusual.json

Runs are finished run folders with an emotion head. Other sounds are made here (silence, noise, tones, chords), made
of the run's own test set (cut to 0.2 s, overdriven, drowned in noise), or speech of other corpora, whose audio lies
beside their manifests. Beside the distance that the package uses, others are measured on the same vectors, with
thresholds found in the same way. A minute or two of one core.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
from common import write_json

RATE = 16000


# ---- sounds


def chords(seed, seconds):
    """Three tones with overtones that are struck anew every half second."""
    rng, t = np.random.default_rng(seed), np.arange(round(seconds * RATE)) / RATE
    beats, sound = t // 0.5, np.zeros(len(t))
    for beat in np.unique(beats):
        here = beats == beat
        root = 110 * 2 ** (rng.integers(24) / 12)
        for ratio in rng.permutation([1, 2, 2 ** (3 / 12), 2 ** (4 / 12), 2 ** (5 / 12), 2 ** (7 / 12)])[:3]:
            tones = sum(np.sin(2 * np.pi * root * ratio * h * t[here]) / h for h in range(1, 8))
            sound[here] += tones * np.exp(-3 * (t[here] % 0.5))
    return 0.5 * sound / np.abs(sound).max()


def made_sounds(rng):
    """Kind -> sounds without any speech."""

    def t(s):
        return np.arange(round(s * RATE)) / RATE

    lengths = 1, 2, 3, 5
    return {
        "digital silence": [np.zeros(s * RATE) for s in lengths],
        "hiss of -80 dB": [rng.normal(size=s * RATE) * 1e-4 for s in lengths],
        "white noise": [rng.normal(size=s * RATE) * a for s in lengths for a in (0.01, 0.05, 0.2)],
        "a tone": [0.1 * np.sin(2 * np.pi * f * t(s)) for s in lengths for f in (110, 440, 1000, 3000)],
        "chords": [chords(i, s) for i in range(4) for s in lengths],
    }


def spoilt(speech, rng):
    """Kind -> what became of some recordings."""
    loud = [x / np.abs(x).max() for x in speech]
    return {
        "cut to 0.2 s": [x[len(x) // 2 :][:3200] for x in speech],
        "20 dB too loud": [(10 * x).clip(-1, 1) for x in loud],
        "10 dB too loud": [(3.2 * x).clip(-1, 1) for x in loud],
        "in noise as loud": [x + rng.normal(size=len(x)) * x.std() for x in speech],
        "in noise of -10 dB": [x + rng.normal(size=len(x)) * x.std() * 0.32 for x in speech],
        "played backwards": [x[::-1] for x in speech],
    }


def read(manifest, most, base=None):
    """Samples of some recordings of a manifest, drawn by chance."""
    from prosody_ser.audio import load_samples
    from prosody_ser.data import read_manifest

    rows = read_manifest(manifest, base or Path(manifest).parent)
    chosen = np.random.default_rng(0).permutation(len(rows))[:most]
    return [load_samples(rows[i], RATE) for i in sorted(chosen)]


# ---- what is measured


def vectors(model, sounds):
    """What the emotion head standardises of each, (N, D)."""
    import torch

    found = []
    with torch.no_grad():
        for x in sounds:
            x = torch.from_numpy(np.array(x, np.float32))[None]
            hidden, lengths = model.encode(x, torch.tensor([x.shape[1]]))
            found.append(model.ser.norm(model.ser.pool(hidden["ser"], lengths), lengths > 0)[0].numpy())
    return np.stack(found)


def distances(train, head):
    """Name -> function of vectors (N, D): the package's distance, and others."""
    from sklearn.covariance import ledoit_wolf
    from sklearn.neighbors import NearestNeighbors

    mean, precision = train.mean(0), np.linalg.inv(ledoit_wolf(train)[0])
    near = NearestNeighbors(n_neighbors=5).fit(train)
    weight, bias = head
    return {
        "root mean square": lambda x: np.sqrt(np.square(x).mean(1)),
        "Mahalanobis, Ledoit-Wolf": lambda x: np.einsum("nd,de,ne->n", x - mean, precision, x - mean),
        "5th nearest neighbour": lambda x: near.kneighbors(x)[0][:, -1],
        "energy of the logits": lambda x: -np.logaddexp.reduce(x @ weight.T + bias, axis=1),
    }


def measure(run, others, most):
    """One run: false alarms and what is found, of `unusual` and of each distance alone; and its confidence."""
    from prosody_ser.audio import load_samples
    from prosody_ser.confidence import unusual, usual_of
    from prosody_ser.evaluation import confidences
    from prosody_ser.model import load_checkpoint
    from prosody_ser.run import Run

    run, rng = Run(run), np.random.default_rng(0)
    settings, model = run.settings, load_checkpoint(run.best_model)
    sets = {s: read(settings[f"{s}_jsonl"], most, settings["audio_base_path"]) for s in ("train", "val", "test")}
    sounds = dict(test=sets["test"]) | made_sounds(rng) | spoilt(sets["test"], rng) | others
    sounds = {name: [load_samples(x, RATE) for x in xs] for name, xs in sounds.items()}
    heard = {name: vectors(model, xs) for name, xs in (sets | sounds).items()}
    ways = distances(heard["train"], [p.detach().numpy() for p in model.ser.out[1].parameters()])
    limits = {way: usual_of(f(heard["val"]), [1])["distance"] for way, f in ways.items()}
    marked = {way: {n: float(np.mean(f(heard[n]) > limits[way])) for n in sounds} for way, f in ways.items()}
    seconds = [len(x) / RATE for x in sets["train"]]
    usual = model.config.usual or dict(distance=limits["root mean square"], seconds=min(seconds))
    far = ways["root mean square"]
    said = {n: [unusual(x, d, usual) for x, d in zip(xs, far(heard[n]), strict=True)] for n, xs in sounds.items()}
    confidence, truth, predicted = confidences(run.predictions())
    return dict(
        usual=usual,
        rows={n: len(x) for n, x in (sets | sounds).items()},
        marked={n: float(np.mean([x is not None for x in xs])) for n, xs in said.items()},
        facts={n: float(np.mean([x not in (None, "unlike the training data") for x in xs])) for n, xs in said.items()},
        distances=marked,
        confidence=confidence.round(4).tolist(),
        truth=truth.tolist(),
        predicted=predicted.tolist(),
    )


def table(found):
    """Text: a line for each kind of sound, a column for each run."""
    kinds = dict.fromkeys(n for r in found.values() for n in r["marked"])
    lines = [f"{'marked unusual, %':22}" + "".join(f"{name:>10}" for name in found)]
    for kind in kinds:
        shares = [r["marked"].get(kind) for r in found.values()]
        lines.append(f"{kind:22}" + "".join(f"{'' if s is None else format(100 * s, '.1f'):>10}" for s in shares))
    return "\n".join(lines)


def main():
    """Measures the runs, prints the table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER", help="finished run folders")
    parser.add_argument("--others", nargs="*", default=[], metavar="NAME=MANIFEST", help="speech of other corpora")
    parser.add_argument("--most", type=int, default=400, help="recordings of a split at most")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    warnings.simplefilter("ignore")                        # silence is told by every one that is read
    others = {n: read(path, 60) for n, path in (x.split("=", 1) for x in args.others)}
    found = {}
    for name, run in (x.split("=", 1) for x in args.runs):
        found[name] = measure(run, others, args.most)
    print(table(found))
    for name, r in found.items():
        for way, marked in r["distances"].items():
            rest = np.mean([s for n, s in marked.items() if n != "test"])
            print(f"{name}: {way}: false alarms {marked['test']:.3f}, mean of the others {rest:.2f}")
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
