"""How many utterances of a speaker does speaker norm need, and what if they are not of all emotions?

    python benchmarks/speaker_norm.py --runs nEMO=CROSSVAL RAVDESS=CROSSVAL EmoDB=CROSSVAL \\
        --out nbs/results/speaker_norm.json

Runs are folders of `prosody-ser crossval` without --speaker_norm, made with speakers apart. Nothing is trained:
the logits of their test utterances are read, and what each head says of the mean of its training data. Each
utterance is then heard relative to n other ones of its speaker, which are drawn anew many times. Three kinds of
draws: any n of them; n that are all of one emotion; and test sets in which each speaker has mostly one or two
emotions, heard relative to themselves. And how far confidence is from accuracy, if the answers relative to a
speaker have the temperature of the others, or their own: both are fitted on each fold's validation speakers. A
minute of one core.
"""

import argparse
from pathlib import Path

import numpy as np
from common import write_json
from safetensors import safe_open

HALVES = 0, 5, 10, 20  # utterances whose mean counts half; ours is 10
COUNTS = 1, 2, 5, 10, 20, 40
SKEW = 0.3  # of the Dirichlet distribution of a speaker's emotions: one or two make most of them


def labelled(predictions):
    """The records with an emotion. Their logits must be those of each utterance alone."""
    from prosody_ser.evaluation import read_predictions

    rows = [r for r in read_predictions(predictions) if r["emotion"] is not None]
    if any("predicted_alone" in r for r in rows):
        raise SystemExit(f"{predictions}: was made with --speaker_norm. Give a cross-validation without.")
    return rows


def centre_of(run):
    """(C,): what the head says of the mean of its training data, of the model that validation has heard."""
    if (run / "selected_model").exists():
        raise SystemExit(f"{run}: was made with --refit. Give a cross-validation without.")
    with safe_open(run / "best_model" / "model.safetensors", "np") as weights:
        return weights.get_tensor("ser.out.1.bias")


def read_run(folder):
    """Logits (N, C) less what the head says of the mean of its training data, classes (N,), speakers (N,)."""
    logits, truth, speakers = [], [], []
    for run in sorted(folder.glob("fold_*/seed_0")):
        centre, rows = centre_of(run), labelled(run)
        names = sorted(rows[0]["emotion_logits"])
        for r in rows:
            logits.append([r["emotion_logits"][n] for n in names] - centre[_order(r, names)])
            truth.append(names.index(r["emotion"]))
            speakers.append(r["speaker"])
    return np.array(logits), np.array(truth), np.array(speakers), names


def _order(record, names):
    """Where each name stands in the model."""
    own = list(record["emotion_logits"])
    return [own.index(n) for n in names]


def at_its_temperatures(run):
    """Of the test utterances of a run: way -> probabilities (N, C); and classes (N,)."""
    from scipy.special import softmax

    from prosody_ser.confidence import speaker_normalised
    from prosody_ser.data import Utterance
    from prosody_ser.evaluation import fit_temperature

    centre, split = centre_of(run), {}
    for part, file in (("val", run / "validation_predictions.jsonl"), ("test", run)):
        rows = labelled(file)
        logits = np.array([[*r["emotion_logits"].values()] for r in rows])
        truth = np.array([list(r["emotion_logits"]).index(r["emotion"]) for r in rows])
        who = [Utterance("", speaker=r["speaker"]) for r in rows]
        split[part] = logits, speaker_normalised(logits, who, centre), truth
    alone, own = (fit_temperature(x, split["val"][2]) for x in split["val"][:2])
    logits, relative, truth = split["test"]
    ways = dict(alone=logits / alone, relative=relative / alone, own=relative / own)
    return {name: softmax(x, axis=1) for name, x in ways.items()}, truth


def calibration(folder):
    """Expected calibration error over all folds, each way."""
    from prosody_ser.evaluation import calibration_error

    found, errors = [at_its_temperatures(run) for run in sorted(folder.glob("fold_*/seed_0"))], {}
    truth = np.concatenate([t for _, t in found])
    for way in found[0][0]:
        p = np.concatenate([chances[way] for chances, _ in found])
        errors[way] = float(calibration_error(p.max(1), p.argmax(1) == truth))
    return errors


def ua(logits, truth):
    """Mean recall of the classes."""
    hit = logits.argmax(1) == truth
    return float(np.mean([hit[truth == c].mean() for c in np.unique(truth)]))


def heard_after(logits, speakers, n, half, rng, allowed=None):
    """Each utterance relative to n others of its speaker (those that are allowed), drawn for it."""
    found = logits.copy()
    for i, who in enumerate(speakers):
        others = np.flatnonzero((speakers == who) & (True if allowed is None else allowed))
        others = rng.permutation(others[others != i])[:n]
        if len(others):
            found[i] -= len(others) / (len(others) + half) * logits[others].mean(0)
    return found


def relative(logits, speakers, half):
    """All utterances relative to the mean of their speakers."""
    found = logits.copy()
    for who in np.unique(speakers):
        rows = speakers == who
        found[rows] -= rows.sum() / (rows.sum() + half) * logits[rows].mean(0)
    return found


def skewed(truth, speakers, n, rng):
    """n utterances of each speaker, mostly of one or two emotions: their places."""
    places = []
    for who in np.unique(speakers):
        own = np.flatnonzero(speakers == who)
        share = rng.dirichlet([SKEW] * (truth.max() + 1))
        weight = share[truth[own]] / np.bincount(truth[own], minlength=truth.max() + 1)[truth[own]] + 1e-9
        places.append(rng.choice(own, min(n, len(own) // 2), replace=False, p=weight / weight.sum()))
    return np.concatenate(places)


def measured(logits, truth, speakers, names, draws):
    """UA of one corpus in all cases."""
    rng = np.random.default_rng(0)

    def mean(one):
        return float(np.mean([one() for _ in range(draws)]))

    def after(n, half, allowed=None):
        return mean(lambda: ua(heard_after(logits, speakers, n, half, rng, allowed), truth))

    def of_skewed(n):
        ways, sums = (None, *HALVES), 0
        for _ in range(draws):  # the same rows for all
            rows = skewed(truth, speakers, n, rng)
            shown = [logits[rows] if h is None else relative(logits[rows], speakers[rows], h) for h in ways]
            sums = sums + np.array([ua(x, truth[rows]) for x in shown])
        return {str(h): float(x) for h, x in zip(ways, sums / draws, strict=True)}

    return dict(
        rows=len(truth),
        speakers=len(np.unique(speakers)),
        alone=ua(logits, truth),
        every={h: ua(relative(logits, speakers, h), truth) for h in HALVES},
        after={h: {n: after(n, h) for n in COUNTS} for h in HALVES},
        one_emotion={e: after(20, 10, truth == c) for c, e in enumerate(names)},
        skewed={n: of_skewed(n) for n in (10, 25)},
    )


def main():
    """Reads runs and writes what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("speaker_norm.json"))
    args = parser.parse_args()
    found = {}
    for name, folder in (text.split("=", 1) for text in args.runs):
        found[name] = measured(*read_run(Path(folder)), args.draws)
        found[name]["calibration_error"] = calibration(Path(folder))
        print(name, found[name], flush=True)
    write_json(args.out, found)


if __name__ == "__main__":
    main()
