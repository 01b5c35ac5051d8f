"""Which epoch? Rules that choose a model on validation, judged on speakers that none of them has seen.

    python benchmarks/selection.py run --corpora emodb=EMODB nemo=NEMO --backbone_path WHISPER_BASE
    python benchmarks/selection.py table --publish nbs/results/selection.json

Each run holds two groups of speakers out: one validates, the other is outside. It trains to the end of its
schedule, keeps the weights of each epoch, and scores each epoch, and the mean of the last weights, on both
groups. A rule sees validation alone; the outside score of the epoch that it takes is what it is worth.
`--refit` also trains on training and validation rows together, as `--refit` of the training does, and scores
its epochs outside. Finished runs are read, so it can be broken off and gone on with. `run` takes hours.
"""

import argparse
import json
import os
from dataclasses import replace
from glob import glob
from pathlib import Path

import numpy as np
from common import CORPORA, heads

RECIPE = dict(
    backbone="whisper",
    vocab_size=200,
    head_lr=1e-3,
    gradient_accumulation_steps=1,
    ctc_blank_penalty=0,
    num_workers=0,
    checkpoint_interval=0,
    grad_share_steps=0,
    eval_steps=0,
    decode_method="greedy",
)
WAYS = {
    "frozen": dict(freeze_backbone=True, num_epochs=20),
    "fine-tuned": dict(backbone_lr=5e-5, head_lr=4e-3, num_epochs=10),
}
TAILS = 3, 5, 10  # epochs whose weights are averaged


# ---- training


def row_counts(records):
    """What scores are sums of, a row each: (true, answered) emotion, word edits, marks."""
    from prosody_ser.evaluation import edit_counts

    rows = []
    for r in records:
        row = dict(speaker=r.get("speaker") or r.get("group"))
        if r.get("emotion") is not None and "probabilities" in r:
            row["ser"] = [str(r["emotion"]), str(r["predicted_emotion"])]
        if r.get("text") and "hypothesis" in r:
            row["asr"] = edit_counts([r["text"]], [r["hypothesis"]])[0].tolist()
        if r.get("prosody_annotations") and r.get("prominence"):
            marks, found = np.array(r["prosody_annotations"]), np.array(r["prominence"]) > 0.5
            row["prosody"] = np.bincount(2 * marks + found, minlength=4).tolist()
        rows.append(row)
    return rows


class KeepWeights:
    """The trained weights at the end of each epoch."""

    def __init__(self, model):
        from transformers import TrainerCallback

        self.kept = []
        learned = {n for n, p in model.named_parameters() if p.requires_grad}
        names = learned | {n for n, _ in model.named_buffers()}

        class Callback(TrainerCallback):
            def on_epoch_end(_, args, state, control, **kwargs):
                state = {n: v.detach().clone() for n, v in model.state_dict().items() if n in names}
                self.kept.append(state)

        self.callback = Callback()

    def mean(self, n):
        """The last n, averaged."""
        last = self.kept[-n:]

        def one(name, value):
            floats = value.is_floating_point() and value.isfinite().all()
            return sum(w[name] for w in last) / len(last) if floats else value

        return {name: one(name, value) for name, value in last[-1].items()}


def train(config, data, tokenizer, splits):
    """Train to the end; the scores of each epoch, and of averaged weights, on some splits."""
    from prosody_ser.train import _cache_features, build_model
    from prosody_ser.trainer import build_trainer

    model = build_model(config, data["train"], tokenizer)
    if config.feature_cache:
        data = _cache_features(config, model, data)
    trainer = build_trainer(config, model, data | dict(val=data[splits[0]]), until=config.num_epochs)
    weights = KeepWeights(model)
    trainer.add_callback(weights.callback)
    for bar in [c for c in trainer.callback_handler.callbacks if "Progress" in type(c).__name__]:
        trainer.remove_callback(bar)
    trainer.train()
    found = {}
    states = {str(i + 1): w for i, w in enumerate(weights.kept)}
    states |= {f"mean {n}": weights.mean(n) for n in TAILS if n <= len(weights.kept)}
    for name, state in states.items():
        model.load_state_dict(state, strict=False)
        for split in splits:
            trainer.eval_dataset = data[split]
            scores = trainer.evaluate(data[split])
            found.setdefault(split, {})[name] = dict(
                loss=scores["eval_loss"], rows=row_counts(trainer.validated)
            )
    return found


def fold_data(config, folder):
    """The three groups of speakers of a fold, and its tokenizer."""
    from prosody_ser.batches import SpeechDataset
    from prosody_ser.data import emotion_names, read_manifest
    from prosody_ser.train import prepare_tokenizer

    splits = {
        s: read_manifest(folder / f"{s}.jsonl", config.audio_base_path) for s in ("train", "val", "test")
    }
    names = emotion_names(splits["train"], config.emotion_names)
    data = {s: SpeechDataset(rows, config.audio_base_path, names) for s, rows in splits.items()}
    return data, prepare_tokenizer(config, splits["train"])


def one_run(config, fold, refit, file):
    """Train a fold with a seed, and write down what each epoch got."""
    from prosody_ser.batches import SpeechDataset

    data, tokenizer = fold_data(config, fold)
    found = train(config, data, tokenizer, ["val", "test"])
    if refit:
        a, b = data["train"], data["val"]
        both = SpeechDataset(
            [*a.utterances, *b.utterances],
            config.audio_base_path,
            a.names,
            np.concatenate([a.seconds, b.seconds]),
        )
        found["refit"] = train(config, dict(train=both, test=data["test"]), tokenizer, ["test"])["test"]
    file.with_suffix(".part").write_text(json.dumps(found))
    file.with_suffix(".part").rename(file)


def study(args):
    """All runs that are not finished."""
    from prosody_ser.ablation import make_folds
    from prosody_ser.config import TrainConfig

    for corpus, path in (c.split("=", 1) for c in args.corpora):
        about, place = CORPORA[corpus], args.out / corpus
        folds = make_folds(about.files(path), place / "folds", about.folds)
        for way, seed, fold in ((w, s, f) for w in args.ways for s in range(args.seeds) for f in folds):
            file = place / way / f"fold_{fold.name}_seed_{seed}.json"
            if file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            frozen = dict(feature_cache=str(args.out / "cache"))
            more = frozen if way == "frozen" else dict(cpu_bf16=args.cpu_bf16)
            config = TrainConfig(
                path,
                "-",
                "-",
                "-",
                str(file.with_suffix(".model")),
                save_dir=str(file.with_suffix("")),
                seed=seed,
                backbone_path=args.backbone_path,
                emotion_names=about.emotion_names and [about.emotion_names],
                **(heads(args.tasks or about.heads) | RECIPE | WAYS[way] | more),
            )
            if args.epochs:
                config = replace(config, num_epochs=args.epochs)
            one_run(config, fold, args.refit, file)
            print(f"{corpus}, {way}, fold {fold.name}, seed {seed}", flush=True)


# ---- rules


def arrays(epoch):
    """What every score is a sum of, an array a head: (N, C, C), (N, 4), (N, 4)."""
    rows = epoch["rows"]
    names = sorted({n for r in rows if "ser" in r for n in r["ser"][:2]})
    ser = np.zeros((len(rows), len(names), len(names)))
    asr, prosody = np.zeros((len(rows), 4)), np.zeros((len(rows), 4))
    for i, r in enumerate(rows):
        if "ser" in r:
            ser[i, names.index(r["ser"][0]), names.index(r["ser"][1])] = 1
        asr[i], prosody[i] = r.get("asr", [0] * 4), r.get("prosody", [0] * 4)
    return ser, asr, prosody


def scores(epoch, weights=None):
    """UA, macro-F1, WER, F1 with floors and skill (B,), each row as often as weights (B, N) say."""
    from prosody_ser.selection import skill

    ser, asr, prosody = arrays(epoch)
    w = np.ones((1, len(ser))) if weights is None else weights
    c, e, p = (np.tensordot(w, x, 1) for x in (ser, asr, prosody))
    hits, true, answered = c.diagonal(axis1=1, axis2=2), c.sum(2), c.sum(1)
    there, found = (true > 0).sum(1), {}
    if ser.any():
        found |= {
            "ser/ua": (hits / true.clip(1)).sum(1) / there,
            "ser/ua_floor": 1 / (ser.sum((0, 2)) > 0).sum(),
            "ser/macro_f1": (2 * hits / (true + answered).clip(1) * (true > 0)).sum(1) / there,
        }
    if asr[:, 3].any():
        found |= {"asr/wer": e[:, :3].sum(1) / e[:, 3].clip(1), "asr/wer_floor": 1.0}
    if prosody.any():
        q = prosody.sum(0)
        found |= {
            "prosody/f1": 2 * p[:, 3] / (2 * p[:, 3] + p[:, 1] + p[:, 2]).clip(1),
            "prosody/f1_floor": 2 * (q[2] + q[3]) / (2 * (q[2] + q[3]) + q[0] + q[1]),
        }
    return found | dict(skill=skill(found))


def lines_of(val, draws=200):
    """The epochs as lines of a history, with standard errors over drawn rows, and the draws themselves."""
    epochs = sorted((e for e in val if e.isdigit()), key=int)
    n = len(val["1"]["rows"])
    weights = np.random.default_rng(0).multinomial(n, np.ones(n) / n, draws)
    lines = []
    for e in epochs:
        plain, drawn = scores(val[e]), scores(val[e], weights)
        line = dict(epoch=int(e), loss=val[e]["loss"], drawn=drawn["skill"])
        for k in ("skill", "ser/macro_f1"):
            line |= {k: float(np.ravel(plain[k])[0]), f"{k}_se": float(drawn[k].std())}
        lines.append(line)
    return lines


def paired(lines):
    """The last epoch that the best does not lead by more than a standard error of the difference."""
    top = max(lines, key=lambda e: e["skill"])
    return [e for e in lines if top["skill"] - e["skill"] <= (top["drawn"] - e["drawn"]).std()][-1]


def rules():
    """Name -> function: lines of the validation -> the epoch that is taken."""
    from prosody_ser.selection import choose

    return {
        "best emotion macro-F1 (the earlier default)": lambda v: choose(v, "ser/macro_f1", "best")["epoch"],
        "best skill": lambda v: choose(v, "skill", "best")["epoch"],
        "skill, one standard error, last (the default)": lambda v: choose(v, "skill")["epoch"],
        "skill, one standard error of the difference, last": lambda v: paired(v)["epoch"],
        "emotion macro-F1, one standard error, last": lambda v: choose(v, "ser/macro_f1")["epoch"],
        "lowest loss": lambda v: min(v, key=lambda e: e["loss"])["epoch"],
        "no choice: last epoch": lambda v: v[-1]["epoch"],
    } | {f"no choice: mean of the weights of the last {n}": lambda v, n=n: f"mean {n}" for n in TAILS}


def speakers(scored):
    """Who is heard in a scored split."""
    return {r["speaker"] for r in scored["1"]["rows"]}


def median_of_folds(runs, seeds, taken):
    """The median epoch of the folds of each seed, but those that validated on a run's own test speakers."""
    found = []
    for run, seed in zip(runs, seeds, strict=True):
        own = speakers(run["test"])
        others = [
            int(e)
            for r, s, e in zip(runs, seeds, taken, strict=True)
            if s == seed and not own & speakers(r["val"])
        ]
        found.append(str(int(np.median(others))))
    return found


def choices(runs, seeds):
    """Rule -> the epoch it takes in each run."""
    histories = [lines_of(r["val"]) for r in runs]
    found = {name: [str(rule(h)) for h in histories] for name, rule in rules().items()}
    default = next(name for name in found if "(the default)" in name)
    found["the default's median over folds"] = median_of_folds(runs, seeds, found[default])
    return {name: taken for name, taken in found.items() if set(taken) <= set(runs[0]["val"])}


def rule_table(files):
    """Each rule's outside scores over runs: mean and worst."""
    runs, table = [json.loads(f.read_text()) for f in files], []
    seeds = [f.stem.split("_seed_")[1] for f in files]
    for name, taken in choices(runs, seeds).items():
        row = dict(rule=name, runs=len(runs), epochs=taken)
        for split in [s for s in ("test", "refit") if s in runs[0]]:
            outside = [scores(r[split][e]) for r, e in zip(runs, taken, strict=True)]
            for key in ("skill", "ser/ua", "asr/wer", "prosody/f1"):
                values = [float(np.ravel(o[key])[0]) for o in outside if key in o]
                worst = max if key == "asr/wer" else min
                if values:
                    row[f"{split} {key}"] = dict(mean=float(np.mean(values)), worst=worst(values))
        table.append(row)
    return table


def tables(out, publish):
    """A table for each study (a folder below out), corpus and way."""
    import pandas as pd

    pd.set_option("display.width", 250, "display.max_columns", 50)
    found = []
    for folder in sorted({Path(f).parent for f in glob(f"{out}/**/fold_*_seed_*.json", recursive=True)}):
        files = sorted(folder.glob("fold_*_seed_*.json"))
        *study, corpus, way = folder.relative_to(out).parts
        table = rule_table(files)
        found.append(dict(study=" ".join(study), corpus=corpus, way=way, runs=len(files), rules=table))
        shown = [
            {
                k: f"{v['mean']:.3f} ({v['worst']:.3f})" if isinstance(v, dict) else v
                for k, v in row.items()
                if k not in ("epochs", "runs")
            }
            for row in table
        ]
        print(f"\n{folder.relative_to(out)}: {len(files)} runs, mean (worst)")
        print(pd.DataFrame(shown).to_string(index=False))
    if publish:
        publish.write_text(json.dumps(dict(recipe=RECIPE, ways=WAYS, studies=found), indent=1) + "\n")


def main():
    """Runs the study or prints its table."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument(
        "--corpora", nargs="+", metavar="NAME=FOLDER", default=[], help=f"of {', '.join(CORPORA)}"
    )
    parser.add_argument("--backbone_path", help="folder of a pretrained Whisper encoder")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["frozen"])
    parser.add_argument("--tasks", nargs="+", help="heads; default: all that the corpus has labels for")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each fold")
    parser.add_argument("--epochs", type=int, help="to try the study out")
    parser.add_argument(
        "--refit", action="store_true", help="also train on training and validation rows together"
    )
    parser.add_argument(
        "--cpu_bf16", action="store_true", help="fine-tune in bf16 on a processor that has it"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/selection"), help="folder of the runs")
    parser.add_argument("--publish", type=Path, metavar="JSON", help="write the tables there")
    args = parser.parse_args()
    study(args) if args.what == "run" else tables(args.out, args.publish)


if __name__ == "__main__":
    main()
