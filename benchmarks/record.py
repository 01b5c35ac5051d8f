"""The record: every row of the results page, from real corpora to one JSON file.

    D="emodb=EMODB nemo=NEMO ravdess=RAVDESS"; B="whisper-tiny=TINY whisper-base=BASE"
    python benchmarks/record.py --corpora $D --backbones $B --plan       # rows, what is finished, hours left
    python benchmarks/record.py --corpora $D --backbones $B --publish nbs/results/record.json

Most rows are one `prosody-ser crossval` with speakers that share no split: scores are pooled over the test
speakers, each heard only by models that were not trained on it. Finished runs are read, so it can be broken
off and gone on with; seeds come one after another, so that every row has one seed before any has two. The
published file keeps the sums of each seed by speaker, which all figures are made of: with it any machine can
go on, without the runs. A GPU takes many small runs at once: `--jobs 16`. Each row says which commits and
machines made its runs. The extra `[record]` adds openSMILE for ComParE + SVM.

Parts: table (corpora, backbones, ways), paper (what the transcript is worth to the emotions, fine-tuned),
ablations (our own choices, one at a time), across (train on some corpora, test on another).
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from threading import Lock

import numpy as np
from common import CORPORA, PLAIN, commit, heads, prosody_ser, read_json, write_json

from prosody_ser.parsing import RECIPES

SMALL = RECIPES["small"]
WAYS = {"frozen": RECIPES["frozen"], "fine-tuned": SMALL}
USUAL_DECAY = "frozen, decay 0.01"  # of the emotion classifier
HEADS = {
    ("ser",): "emotion alone",
    ("ser", "asr"): "with transcript",
    ("ser", "asr", "prosody"): "with transcript and prominence",
}
LOCK = Lock()
SHOWN = "ser/ua", "ser/ua_speaker_norm", "ser/wa", "ser/macro_f1", "asr/wer", "prosody/f1"


@dataclass
class Row:
    """One line of a table: models that differ in seed and fold alone."""

    part: str
    corpus: str
    backbone: str
    way: str
    variant: str  # what tells it from the other rows of the part
    settings: dict
    against: list = field(default_factory=list)  # ids of the rows that it is compared with
    seeds: int = 3
    kind: str = "crossval"  # or svm, across
    trained_on: str = ""  # across: names of the corpora

    @property
    def id(self):
        """What tables call it."""
        return "/".join([self.part, self.corpus, self.backbone, self.way, self.variant])

    def place(self, out):
        """The folder of its runs, the same for rows of several parts that have the same settings."""
        what = json.dumps([self.kind, self.trained_on, self.settings], sort_keys=True)
        return out / self.corpus / self.backbone / blake2b(what.encode(), digest_size=4).hexdigest()


# ---- the rows


def table_rows(corpora, backbones):
    """Each corpus by each backbone and way: the emotion alone, and with all that it has labels for."""
    for corpus in corpora:
        svm = {
            refit: Row(
                "table", corpus, "ComParE", way, "emotion alone", dict(refit=refit), seeds=1, kind="svm"
            )
            for refit, way in ((False, "SVM"), (True, "SVM, refit"))
        }
        yield from svm.values()
        for backbone in backbones:
            for way, settings in WAYS.items():
                alone = None
                for tasks in dict.fromkeys([("ser",), tuple(CORPORA[corpus].heads)]):
                    others = [svm["refit" in settings].id] + ([alone.id] if alone else [])
                    row = Row("table", corpus, backbone, way, HEADS[tasks], settings | heads(tasks), others)
                    row.seeds = 1 if cost(row) > 1 else 3  # the dearest rows have one
                    alone = alone or row
                    if way == "frozen":
                        yield (plain := with_usual_decay(row))
                        row.against = [*others, plain.id]
                    yield row
                    if way == "frozen" and "prosody" in tasks:
                        yield split_evenly(row)


def with_usual_decay(row):
    """The same row without a weight decay of the emotion classifier's own."""
    settings = {k: v for k, v in row.settings.items() if k != "ser_weight_decay"}
    others = [i.replace(f"/{row.way}/", f"/{USUAL_DECAY}/") for i in row.against]
    return replace(row, way=USUAL_DECAY, settings=settings, against=others)


def split_evenly(row):
    """The same row where each word gets an equal part of its utterance, also once CTC can place it."""
    settings = row.settings | dict(prosody_alignment="uniform")
    return replace(row, variant=f"{row.variant}, words split evenly", settings=settings, against=[row.id])


def paper_rows(corpora, backbones):
    """Cai et al. 2021: the emotion alone, and with the transcript at several weights; both kinds of heads."""
    if "nemo" not in corpora or "whisper-tiny" not in backbones:
        return
    base = WAYS["fine-tuned"]
    transcript = heads(["ser", "asr"])
    weights = {"α 0.1": {}, "α 1": dict(alpha_asr=1.0), "α 0.01": dict(alpha_asr=0.01)}
    learned = {"α learned": dict(alpha_mode="uncertainty")}
    theirs = dict(layer_mix=False, pooling="mean")
    for head, more, variants in (("our heads", {}, weights | learned), ("last layer, mean", theirs, weights)):
        alone = Row("paper", "nemo", "whisper-tiny", head, "emotion alone", base | heads(["ser"]) | more)
        yield alone
        for name, alpha in variants.items():
            yield Row(
                "paper", "nemo", "whisper-tiny", head, name, base | transcript | more | alpha, [alone.id]
            )
        third = base | heads(["ser", "asr", "prosody"]) | more
        names = [alone.id, alone.id.replace("emotion alone", "α 0.1")]
        yield Row("paper", "nemo", "whisper-tiny", head, "α 0.1, and prominence by acoustics", third, names)


ABLATIONS = {
    "last layer alone": dict(layer_mix=False),
    "mean pooling": dict(pooling="mean"),
    "attentive pooling": dict(pooling="attentive"),
    "30 s of silence": dict(whisper_tail_seconds=30),
    "speed perturbation": dict(speed_perturb=0.15),
    "refit": dict(refit=True),
    "random batches": dict(batching="random"),
    "class weights": dict(class_weights="balanced"),
    "rate of the heads 1e-3": dict(head_lr=1e-3),
    "blank penalty 50": dict(ctc_blank_penalty=50),
    "character tokens": dict(tokenizer_type="char", vocab_size=60),
    "weight decay 3 of the emotion classifier": dict(ser_weight_decay=3.0),
    "best epoch": dict(select_rule="best"),
    "10 epochs": dict(num_epochs=10),
}


def ablation_rows(corpora, backbones):
    """One choice changed at a time, frozen, on nEMO."""
    if "nemo" not in corpora or "whisper-tiny" not in backbones:
        return
    base = SMALL | dict(freeze_backbone=True, num_epochs=20) | heads(["ser", "asr"])
    plain = Row("ablations", "nemo", "whisper-tiny", "frozen", "as it is", base)
    yield plain
    for name, more in ABLATIONS.items():
        yield Row("ablations", "nemo", "whisper-tiny", "frozen", name, base | more, [plain.id])


def across_rows(corpora, backbones):
    """Five emotions that all have: train on two corpora and test the third; all together; each alone."""
    if len(corpora) < 3 or "whisper-base" not in backbones:
        return
    base = WAYS["frozen"] | heads(["ser"])
    for corpus in corpora:
        others = " and ".join(c for c in corpora if c != corpus)
        own, together = (
            Row(
                "across",
                corpus,
                "whisper-base",
                "frozen",
                f"trained on {name}",
                base,
                kind="across",
                trained_on=name,
            )
            for name in (corpus, "all")
        )
        together.against = [own.id]
        unseen = Row(
            "across",
            corpus,
            "whisper-base",
            "frozen",
            f"trained on {others}",
            base,
            [own.id],
            kind="across",
            trained_on=others,
        )
        yield from (own, together, unseen)


PARTS = {"table": table_rows, "paper": paper_rows, "ablations": ablation_rows, "across": across_rows}


def cost(row):
    """The cheap rows come first: stored features before backbones that learn, small before large."""
    frozen = row.kind == "svm" or "freeze_backbone" in row.settings
    return 0 if frozen else 1 + (row.backbone != "whisper-tiny")


# ---- making them


def corpus_settings(corpus, folder):
    """Where a corpus lies, and how its emotions are named."""
    about = CORPORA[corpus]
    named = dict(emotion_names=about.emotion_names) if about.emotion_names else {}
    folds = dict(folds=about.folds) if about.folds else {}
    return dict(manifests=about.files(folder), audio_base_path=folder) | named | folds


SHARED = {
    "neutral": "neutral",
    "anger": "anger",
    "angry": "anger",
    "fear": "fear",
    "fearful": "fear",
    "happiness": "happiness",
    "happy": "happiness",
    "sadness": "sadness",
    "sad": "sadness",
}
EMODB = ["neutral", "anger", "boredom", "disgust", "fear", "happiness", "sadness"]


def shared_rows(corpus, folder):
    """The rows of the five emotions, with whole paths and speakers named by their corpus."""
    from prosody_ser.data import read_manifest

    for manifest in CORPORA[corpus].files(folder):
        for u in read_manifest(manifest):
            name = EMODB[int(u.emotion)] if str(u.emotion).isdigit() else u.emotion
            if name in SHARED:
                path = str((folder / u.audio_filepath).resolve().relative_to("/"))
                yield replace(u, emotion=SHARED[name], audio_filepath=path, speaker=f"{corpus} {u.speaker}")


def across_folds(row, corpora, out, k=5):
    """Folds for a row: every speaker of its corpus is tested once, by a model that never heard them."""
    from prosody_ser.data import speaker_folds, write_manifest

    dealt = {c: speaker_folds(list(shared_rows(c, folder)), k) for c, folder in corpora.items()}
    names = list(corpora) if row.trained_on == "all" else row.trained_on.split(" and ")
    for i in range(k):
        train, val = ([u for c in names for u in dealt[c][i][part]] for part in (0, 1))
        if row.corpus not in names:  # what its own models would be tested on is free to be learned
            train += [u for c in names for u in dealt[c][i][2]]
        splits = dict(train=train, val=val, test=dealt[row.corpus][i][2])
        for split, rows in splits.items():
            (out / str(i)).mkdir(parents=True, exist_ok=True)
            write_manifest(rows, out / str(i) / f"{split}.jsonl")
    return out


def with_marks(corpus, args):
    """The manifests of a corpus with prominence by acoustics, for one that has no marks by listeners."""
    folder, made = args.corpora[corpus], []
    for manifest in CORPORA[corpus].files(folder):
        made.append(args.out / "marks" / corpus / manifest.name)
        if not made[-1].exists():
            made[-1].parent.mkdir(parents=True, exist_ok=True)
            settings = dict(audio_base_path=folder, out=made[-1])
            prosody_ser("prominence", settings, made[-1].with_suffix(".log"), manifest)
    return made


def make_crossval(row, place, args, seed, only=None):
    """The runs of a seed that are not finished, or of one of its folds; notes what made them."""
    settings = (
        PLAIN | row.settings | dict(save_dir=place, seed=seed, backbone_path=args.backbones[row.backbone])
    )
    if row.kind == "across":
        with LOCK:
            if not (place / "folds").exists():
                across_folds(row, args.corpora, place / "folds")
        settings |= dict(fold_dir=place / "folds", audio_base_path="/")
    else:
        settings |= corpus_settings(row.corpus, args.corpora[row.corpus])
        if row.settings.get("use_alpha_prosody") and "prosody" not in CORPORA[row.corpus].heads:
            with LOCK:
                settings |= dict(manifests=with_marks(row.corpus, args))
    if row.settings.get("freeze_backbone"):
        settings |= dict(feature_cache=args.out / "cache")
    elif args.cpu_bf16:
        settings |= dict(cpu_bf16=True)
    began, before = time.time(), finished(place, seed)
    log = "-".join(map(str, ["log", seed] + ([] if only is None else [only]))) + ".txt"
    prosody_ser("crossval", settings | ({} if only is None else dict(only=only)), place / log)
    new, minutes = finished(place, seed) - before, (time.time() - began) / 60
    runs = len(new) if only is None else min(1, len(new))  # other folds may have ended meanwhile
    about = dict(commit=commit(), machine=machine(), seed=seed, runs=runs, minutes=minutes)
    write_json(place / "made" / log.replace(".txt", f"-{began:.0f}.json"), about)


def machine():
    """What trains here, for people."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{os.cpu_count()} cores, {platform.machine()}"


def finished(place, seed):
    """The folds of a seed that have been tested: folders of runs."""
    return {f.parent for f in place.glob(f"fold_*/seed_{seed}/test_results.json")}


def is_whole(place, seed):
    """Whether every fold of a seed has been tested."""
    folds = len(list(place.glob("folds/*/test.jsonl")))
    return 0 < folds == len(finished(place, seed))


def compare_svm(folds, folder, refit):
    """ComParE functionals and a linear SVM, its C chosen on validation: predictions in the shape of ours.

    Its decision function is linear, so speaker norm is the same subtraction as for our head."""
    import opensmile
    from sklearn.metrics import recall_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    from prosody_ser.audio import load_utterance
    from prosody_ser.confidence import speaker_normalised
    from prosody_ser.data import groups_of, read_manifest

    smile = opensmile.Smile(opensmile.FeatureSet.ComParE_2016, opensmile.FeatureLevel.Functionals)
    seen, records = {}, []

    def features(u):
        if u.audio_filepath not in seen:
            seen[u.audio_filepath] = smile.process_signal(load_utterance(u, folder), 16000).to_numpy()[0]
        return seen[u.audio_filepath]

    def learn(c, x, y):
        return make_pipeline(StandardScaler(), LinearSVC(C=c, random_state=0, max_iter=20_000)).fit(x, y)

    for fold in folds:
        rows = {s: read_manifest(fold / f"{s}.jsonl") for s in ("train", "val", "test")}
        x = {s: np.nan_to_num(np.stack([features(u) for u in us])) for s, us in rows.items()}
        y = {s: [str(u.emotion) for u in us] for s, us in rows.items()}
        models = {c: learn(c, x["train"], y["train"]) for c in (1e-5, 1e-4, 1e-3, 1e-2)}
        ua = {
            c: recall_score(y["val"], m.predict(x["val"]), average="macro", zero_division=0)
            for c, m in models.items()
        }
        best = max(ua, key=ua.get)
        model = (
            learn(best, np.concatenate([x["train"], x["val"]]), y["train"] + y["val"])
            if refit
            else models[best]
        )
        alone = model.decision_function(x["test"])
        normalised = speaker_normalised(alone, rows["test"], model[-1].intercept_)
        answers = (model.classes_[values.argmax(1)] for values in (alone, normalised))
        records += [
            dict(
                id=u.id or u.audio_filepath,
                seed=0,
                emotion=str(u.emotion),
                predicted_emotion=str(p),
                predicted_speaker_norm=str(q),
                speaker=u.speaker,
                group=group,
            )
            for u, p, q, group in zip(rows["test"], *answers, groups_of(rows["test"]), strict=True)
        ]
    return records


def make_svm(row, place, args):
    """The predictions of a baseline."""
    from prosody_ser.ablation import make_folds
    from prosody_ser.evaluation import write_predictions

    about, folder, began = CORPORA[row.corpus], args.corpora[row.corpus], time.time()
    folds = make_folds(about.files(folder), place / "folds", about.folds)
    records = compare_svm(folds, folder, row.settings["refit"])
    write_predictions(place / "crossval_predictions.jsonl", records)
    about = dict(commit=commit(), machine=machine(), seed=0, minutes=(time.time() - began) / 60)
    write_json(place / "made" / "svm.json", about | dict(runs=len(folds)))


def make(row, args, seed, only=None):
    """Make what is missing of a row's seed, or of one of its folds; say what failed, and go on."""
    place = row.place(args.out)
    try:
        if row.kind == "svm":
            if not (place / "crossval_predictions.jsonl").exists():
                make_svm(row, place, args)
        elif not is_whole(place, seed):
            make_crossval(row, place, args, seed, only)
    except ImportError as e:
        print(f"left out: {row.id}: {e}", flush=True)
    except subprocess.CalledProcessError:
        print(f"failed: {row.id}, seed {seed}, see the logs in {place}", flush=True)


# ---- sums by seed and speaker: what every figure is made of, so that a record goes on anywhere


ANSWERS = dict(ser="predicted_emotion", ser_speaker_norm="predicted_speaker_norm")


def counts_of(record, names):
    """What the scores of a prediction are sums of: task -> array of whole numbers."""
    from prosody_ser.evaluation import edit_counts
    from prosody_ser.text import clean

    found = {}
    for task, key in ANSWERS.items():
        if record.get("emotion") is not None and key in record:
            cell = names.index(record["emotion"]) * len(names) + names.index(record[key])
            found[task] = np.bincount([cell], minlength=len(names) ** 2)
    if record.get("text"):
        found["asr"] = edit_counts([clean(record["text"])], [" ".join(record["hypothesis"].split())])[0]
    if record.get("prosody_annotations"):
        marks, p = np.array(record["prosody_annotations"]), np.array(record["prominence"])
        cells = (2 * (marks > 0.5) + (p > 0.5))[marks != 0.5]  # what half of the listeners marked is left out
        found["prosody"] = np.bincount(cells, minlength=4)
    return found


def sums_of(records):
    """emotions: their names; seeds: seed -> speaker -> task -> counts. Seed, speaker and counts are texts."""
    names = sorted({r[k] for r in records for k in ("emotion", *ANSWERS.values()) if r.get(k)})
    seeds = {}
    for r in records:
        own = seeds.setdefault(str(r["seed"]), {}).setdefault(str(r["group"]), {})
        for task, counts in counts_of(r, names).items():
            own[task] = own.get(task, 0) + counts
    text = {
        s: {who: {t: " ".join(map(str, c)) for t, c in own[who].items()} for who in sorted(own)}
        for s, own in sorted(seeds.items())
    }
    return dict(emotions=names, seeds=text)


def tables(speakers):
    """task -> (speakers, ...): the counts of a seed as arrays."""
    found = {}
    for own in speakers.values():
        for task, text in own.items():
            found.setdefault(task, []).append(np.array(text.split(), int))
    for task, rows in found.items():
        shape = (-1,) if task == "asr" else (round(len(rows[0]) ** 0.5), -1)
        found[task] = np.stack([row.reshape(shape) for row in rows])
    if len(found.get("ser_speaker_norm", ())) < len(found.get("ser", ())):  # not counted for all speakers
        found.pop("ser_speaker_norm", None)
    return found


def scored(task, counts):
    """The scores (R,) of counts (R, ...)."""
    from prosody_ser.evaluation import _prosody_scores, _ser_scores

    if task == "asr":
        return {"asr/wer": counts[:, :3].sum(1) / counts[:, 3]}
    if task == "ser_speaker_norm":
        return {"ser/ua_speaker_norm": _ser_scores(counts)["ser/ua"]}
    return (_ser_scores if task == "ser" else _prosody_scores)(counts)


def values(speakers):
    """The scores of a seed, and as KEY_floor their floors."""
    from prosody_ser.evaluation import _with_floors

    found = {}
    for task, counts in tables(speakers).items():
        total = counts.sum(0)
        if task == "asr":
            found |= {k: float(v[0]) for k, v in scored(task, total[None]).items()} | {"asr/wer_floor": 1.0}
        else:
            found |= _with_floors(partial(scored, task), total)
    return found


def here(row, out):
    """The sums of the seeds of which every fold is finished here; None where there is none."""
    place = row.place(out)
    if row.kind == "svm":
        done = place / "crossval_predictions.jsonl"
        return sums_of_files((done,), (0,)) if done.exists() else None
    runs = [(run, s) for s in range(row.seeds) if is_whole(place, s) for run in sorted(finished(place, s))]
    return sums_of_files(*zip(*runs, strict=True)) if runs else None


@cache
def sums_of_files(files, seeds):
    """The sums of finished runs; each is read once."""
    from prosody_ser.evaluation import read_predictions

    return sums_of([r | dict(seed=s) for f, s in zip(files, seeds, strict=True) for r in read_predictions(f)])


def sums(row, args):
    """The sums of a row: those that were published, with what has been made here in their place."""
    new, old = here(row, args.out), args.published.get(row.id, {}).get("sums")
    if not (new and old):
        return new or old
    if new["emotions"] != old["emotions"]:
        raise SystemExit(
            f"{row.id}: {args.publish} has other emotions than its runs in {row.place(args.out)}"
        )
    return dict(new, seeds=old["seeds"] | new["seeds"])


def renamed(found, rows):
    """Published id -> the row that has its settings under another name today."""

    def what(part, corpus, backbone, settings):
        return part, corpus, backbone, json.dumps(settings, sort_keys=True)

    today = {r.id for r in rows}
    made = {
        what(*(r[k] for k in ("part", "corpus", "backbone", "settings"))): i
        for i, r in found.items()
        if i not in today and "part" in r and r["part"] != "across"
    }
    rows = [(made.get(what(r.part, r.corpus, r.backbone, r.settings)), r) for r in rows]
    return {old: r for old, r in rows if old and r.id not in found}


def published(path, rows):
    """id -> row of a file that was published before, under today's names; without rows of other settings."""
    found = {r["id"]: r for r in (read_json(path, {}) if path else {}).get("rows", [])}
    names = renamed(found, rows)
    for old, row in names.items():
        found[row.id] = found.pop(old) | dict(id=row.id, way=row.way, variant=row.variant)
    for r in found.values():
        if "against" in r:
            r["against"] = {names[i].id if i in names else i: d for i, d in r["against"].items()}
    settings = {r.id: r.settings for r in rows}
    outdated = [i for i, r in found.items() if i in settings and r["settings"] != settings[i]]
    if outdated:
        print(f"{path}: of other settings, so left out: {', '.join(outdated)}", flush=True)
    return {i: r for i, r in found.items() if i not in outdated}


# ---- what came of them


@cache
def by_text(place, known=("train",)):
    """F1 of prominent words by a rule that hears nothing, from the known splits, over all folds' test rows."""
    from prosody_ser.data import read_manifest
    from prosody_ser.labels import f1_by_text

    def rows(folder, split):
        found = read_manifest(folder / f"{split}.jsonl")
        marked = [u for u in found if u.prosody_annotations]
        return [([f"{folder.name} {w}" for w in u.words], u.prosody_annotations) for u in marked]  # each fold its own

    folds = sorted(d for d in (place / "folds").iterdir() if d.is_dir())
    return f1_by_text(*(sum((rows(d, s) for d in folds for s in of), []) for of in (known, ("test",))))


def seeds_of(sums, resamples=1000):
    """seed -> its scores, and score -> (resamples,): speakers are drawn, the same ones in every seed and row."""
    from prosody_ser.evaluation import _drawn_sums

    found = {}
    for seed, speakers in sums["seeds"].items():
        draws = {}
        for task, counts in tables(speakers).items():
            draws |= scored(task, _drawn_sums(counts, np.arange(len(counts)), resamples, 0))
        found[seed] = values(speakers), draws
    return found


def over_seeds(pairs, speakers, within=(-np.inf, np.inf)):
    """Mean and interval of (number, its draws) of each seed. Of n seeds n - 1 are drawn with replacement: so
    the mean of the drawn ones varies as that of n seeds does (Hesterberg 2004)."""
    from prosody_ser.evaluation import interval

    numbers, draws = zip(*pairs, strict=True)
    draws, n, mean = np.stack(draws, 1), len(numbers), float(np.mean(numbers))
    chosen = np.random.default_rng(1).integers(n, size=(len(draws), max(1, n - 1)))
    draws = np.take_along_axis(draws, chosen, 1).mean(1)
    low, high = np.clip(interval(mean, draws, speakers), *within).tolist()
    se = float(np.nanstd(draws)) * (speakers / (speakers - 1)) ** 0.5
    sd = float(np.std(numbers, ddof=1)) if n > 1 else None
    return dict(mean=mean, low=low, high=high, se=se, sd=sd, seeds=n)


def speakers_of(sums):
    """How many speakers each seed was tested on."""
    return len(next(iter(sums["seeds"].values())))


def scores_of(sums):
    """Mean of each score with its deviation over seeds, floor and interval, over the seeds that have it."""
    each, found, n = seeds_of(sums).values(), {}, speakers_of(sums)
    for k in SHOWN:
        having = [(m, draws) for m, draws in each if k in draws]
        if having:
            within, floor = (0, np.inf if k == "asr/wer" else 1), having[0][0][f"{k}_floor"]
            found[k] = over_seeds([(m[k], draws[k]) for m, draws in having], n, within) | dict(floor=floor)
    return found


def speaker_norm_gain(sums):
    """What speaker norm adds to UA, with its interval; None where its answers were not counted."""
    alone, norm = "ser/ua", "ser/ua_speaker_norm"
    having = [(m[norm] - m[alone], d[norm] - d[alone]) for m, d in seeds_of(sums).values() if norm in d]
    return over_seeds(having, speakers_of(sums)) if having else None


def difference(mine, theirs):
    """Scores less those of another row, seed by seed; a row of one seed is held against each."""
    one, two, found = seeds_of(mine), seeds_of(theirs), {}
    if len(two) == 1:
        two = dict.fromkeys(one, next(iter(two.values())))
    both = [(one[s], two[s]) for s in one if s in two]
    for k in SHOWN:
        pairs = [(a[k] - b[k], x[k] - y[k]) for (a, x), (b, y) in both if k in x and k in y]
        found |= {k: over_seeds(pairs, speakers_of(mine))} if pairs else {}
    return found


def gradients(place, seed):
    """By epoch, the mean over folds of each task's share of the gradient on the backbone and its cosine."""
    lines = [
        (line, round(line["epoch"] + 0.499))
        for f in place.glob(f"fold_*/seed_{seed}/training_history.json")
        for line in read_json(f)["train"]
    ]
    keys = sorted({k for line, _ in lines for k in line if k.endswith(("/grad_share", "/grad_cosine"))})
    epochs = sorted({e for _, e in lines})
    return {
        k: {
            str(e): float(np.mean(values))
            for e in epochs
            if (values := [line[k] for line, at in lines if at == e and k in line])
        }
        for k in keys
    }


def mean_gradients(seeds):
    """The mean over seeds of what `gradients` found."""
    found = {}
    for one in seeds:
        for k, epochs in one.items():
            for e, value in epochs.items():
                found.setdefault(k, {}).setdefault(e, []).append(value)
    return {k: {e: float(np.mean(v)) for e, v in epochs.items()} for k, epochs in found.items()}


def notes_of(place):
    """What made the runs of a row; runs of earlier commits have one file, which does not tell the seeds."""
    return [read_json(f) for f in sorted(place.glob("made/*.json"))] + read_json(place / "made.json", [])


def made_of(row, args, seeds):
    """seed -> commits, machines and minutes of its runs, and gradients; as published where not made here."""
    place, notes = row.place(args.out), notes_of(row.place(args.out))
    found = args.published.get(row.id, {}).get("made", {})
    mine_are = (here(row, args.out) or dict(seeds={}))["seeds"]
    for seed in seeds:
        mine = [m for m in notes if str(m.get("seed", seed)) == seed]
        if mine and seed in mine_are:
            about = {f"{k}s": sorted({m.get(k, machine()) for m in mine}) for k in ("commit", "machine")}
            about |= dict(minutes=round(sum(m["minutes"] for m in mine), 1))
            shares = gradients(place, seed) if row.part == "paper" else {}
            found = found | {seed: about | dict(gradients=shares)}
    return found


def told(row, rows, args):
    """A row with its figures; as it was published where nothing is new; None where it is not made."""
    own = sums(row, args)
    if own is None:
        return args.published.get(row.id)
    others = {r.id: r for r in rows}
    against = {
        i: d
        for i in row.against
        if i in others and (theirs := sums(others[i], args)) and (d := difference(own, theirs))
    }
    before = args.published.get(row.id, {}).get("against", {})
    against = {i: before[i] for i in row.against if i in before} | against  # some cannot be made anew here
    made = made_of(row, args, own["seeds"])
    about = {k: getattr(row, k) for k in ("id", "part", "corpus", "backbone", "way", "variant")}
    first = next(iter(own["seeds"].values()))
    return about | dict(
        settings=dict(row.settings),
        seeds=len(own["seeds"]),
        speakers=len(first),
        rows=int(tables(first)["ser"].sum()),
        commits=sorted({c for m in made.values() for c in m["commits"]}),
        machines=sorted({c for m in made.values() for c in m["machines"]}),
        minutes=round(sum(m["minutes"] for m in made.values()), 1),
        scores=scores_of(own),
        speaker_norm_gain=speaker_norm_gain(own),
        **text_rule(row, args),
        against=against,
        gradients=mean_gradients([m.get("gradients", {}) for m in made.values()]),
        made=made,
        sums=own,
    )


def text_rule(row, args):
    """What `by_text` reaches on a row with prominence; as published where its folds are not here."""
    before = args.published.get(row.id, {}).get("f1_by_text")
    if not row.settings.get("use_alpha_prosody"):
        return {}
    place, known = row.place(args.out), ("train", "val") if row.settings.get("refit") else ("train",)
    return dict(f1_by_text=by_text(place, known) if (place / "folds/0/train.jsonl").is_file() else before)


def line(found):
    """A row for people."""
    ua = found["scores"]["ser/ua"]
    text = f"{found['id']}: {found['seeds']} seeds, UA {ua['mean']:.3f} [{ua['low']:.3f}, {ua['high']:.3f}]"
    norm = found["scores"].get("ser/ua_speaker_norm")
    text += f", with speaker norm {norm['mean']:.3f} [{norm['low']:.3f}, {norm['high']:.3f}]" if norm else ""
    wer = found["scores"].get("asr/wer")
    text += f", WER {wer['mean']:.3f}" if wer else ""
    for name, d in found["against"].items():
        d = d["ser/ua"]
        text += f"; UA less {name.split('/', 2)[-1]} {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
    return text


def make_demo(out):
    """The demo's test scores as it prints them, and its minutes; None where it does not run."""
    from prosody_ser.evaluate import metrics_table

    began, place = time.time(), out / "demo"
    if not (place / "made.json").exists():
        try:
            prosody_ser("demo", dict(save_dir=place), place / "log.txt")
        except subprocess.CalledProcessError:
            print(f"the demo failed, its scores stay as published: see {place / 'log.txt'}", flush=True)
            return None
        write_json(place / "made.json", dict(commit=commit(), minutes=(time.time() - began) / 60))
    metrics = read_json(place / "test_results.json")["metrics"]
    return read_json(place / "made.json") | dict(table=metrics_table(metrics))


def publish(rows, args):
    """Write what is finished."""
    import torch

    about = dict(
        date=datetime.date.today().isoformat(),
        torch=torch.__version__,
        cpu_bf16=args.cpu_bf16,
        machine=machine(),
        plain=PLAIN,
    )
    found = [f for r in rows if (f := told(r, rows, args))]
    asked = {r.id for r in rows}
    found += [r for i, r in args.published.items() if i not in asked]  # of corpora that are not here
    made = not args.read_only or (args.out / "demo" / "made.json").exists()
    demo = (made and make_demo(args.out)) or read_json(args.publish, {}).get("demo")
    write_json(args.publish, dict(about=about, demo=demo, rows=found))
    print(f"{args.publish}: {len(found)} rows, of {len(rows)} that were asked for", flush=True)


def plan(rows, args):
    """What there is to do, with hours by the runs that are finished."""
    left = 0.0
    for row in rows:
        place, seeds = row.place(args.out), range(min(row.seeds, args.seeds))
        missing = [s for s in seeds if str(s) not in (sums(row, args) or dict(seeds={}))["seeds"]]
        runs = sum(folds_of(row, args) - len(finished(place, s)) for s in missing)
        notes = notes_of(place)
        done, minutes = sum(m["runs"] for m in notes), sum(m["minutes"] for m in notes)
        hours = minutes / done * runs / 60 if done else None
        left += hours or 0
        what = f"{runs} runs of seeds {missing}" if missing else "finished"
        print(f"{row.id}: {what}" + (f", {hours:.1f} h left" if hours and missing else ""))
    print(f"{left:.1f} hours left for the rows that were begun")


def folds_of(row, args):
    """How many folds a row has."""
    from prosody_ser.data import groups_of, read_manifest

    if row.kind == "across":
        return 5
    about = CORPORA[row.corpus]
    rows = [u for m in about.files(args.corpora[row.corpus]) for u in read_manifest(m)]
    return about.folds or len(set(groups_of(rows)))


# ---- the command


def missing(rows, args):
    """(row, seed) that are neither published nor made here: the first seed of all rows, then the next.

    Rows that have no figure at all come first."""
    rows = sorted(rows, key=lambda row: row.id in args.published)
    once = {row.place(args.out): row for row in reversed(rows)}  # rows of several parts share their runs
    rows = [row for row in rows if row is once[row.place(args.out)]]
    for seed in range(args.seeds):
        for row in rows:
            if seed < row.seeds and str(seed) not in (sums(row, args) or dict(seeds={}))["seeds"]:
                yield row, seed


def fill(rows, every, args):
    """Make what is missing of some rows, and print each; with several jobs each fold has a process."""
    until, shown = time.time() + 60 * args.minutes, set()

    def one(what):
        row, seed, *fold = what
        if time.time() >= until:
            return
        make(row, args, seed, *fold)
        with LOCK:  # the last fold of a row prints it, once
            new = (row.id, seed) not in shown and (row.kind == "svm" or is_whole(row.place(args.out), seed))
            shown.update([(row.id, seed)] * new)
        if new and (found := told(row, every, args)):
            print(line(found), flush=True)

    jobs = list(missing(rows, args))
    if args.jobs > 1:
        folds = [range(folds_of(row, args)) if row.kind != "svm" else [None] for row, _ in jobs]
        jobs = [(*job, fold) for job, own in zip(jobs, folds, strict=True) for fold in own]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, jobs))


def pairs(texts):
    """NAME=PATH texts as a dict."""
    return {name: Path(path).resolve() for name, path in (t.split("=", 1) for t in texts)}


def main():
    """Makes rows, or says what there is to do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpora", nargs="+", required=True, metavar="NAME=FOLDER", help=f"of {', '.join(CORPORA)}"
    )
    parser.add_argument(
        "--backbones",
        nargs="+",
        required=True,
        metavar="NAME=FOLDER",
        help="pretrained Whisper encoders, named whisper-tiny and whisper-base",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in this order")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[], help="rows whose id has one of these texts"
    )
    parser.add_argument(
        "--leave_out", nargs="+", metavar="TEXT", default=[], help="rows whose id has none of these texts"
    )
    parser.add_argument("--seeds", type=int, default=3, help="at most; the rows have 3")
    parser.add_argument(
        "--cpu_bf16", action="store_true", help="fine-tune in bf16 on a processor that has it"
    )
    parser.add_argument("--jobs", type=int, default=1, help="folds that are trained side by side")
    parser.add_argument("--minutes", type=float, default=np.inf, help="begin no run after so many")
    parser.add_argument("--plan", action="store_true", help="make nothing, list the rows and the hours")
    parser.add_argument("--read_only", action="store_true", help="make nothing, sum up what is finished")
    parser.add_argument("--out", type=Path, default=Path("runs/record"), help="folder of the runs")
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="JSON",
        help="write the figures of all rows there; what stands there is kept",
    )
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    args.corpora, args.backbones, args.out = pairs(args.corpora), pairs(args.backbones), args.out.resolve()
    every = [r for part in PARTS.values() for r in part(args.corpora, args.backbones)]
    rows = [r for part in args.parts for r in every if r.part == part]
    rows = [r for r in rows if not args.only or any(text in r.id for text in args.only)]
    rows = [r for r in rows if not any(text in r.id for text in args.leave_out)]
    rows.sort(key=cost)
    args.published = published(args.publish, every)
    if args.plan:
        return plan(rows, args)
    if not args.read_only:
        fill(rows, every, args)
    if args.publish:
        publish(every, args)


if __name__ == "__main__":
    main()
