"""The real-data record: leave one speaker out, what the auxiliary tasks are worth, frozen and fine-tuned, beside ComParE + SVM on the same folds.

    python benchmarks/record.py --data EMODB --backbones whisper-base=PATH whisper-tiny=PATH --imbalance --steps --publish nbs/results/record.json

Each row is one `prosody-ser crossval` (8 folds on the Berlin corpus cut at 2 s); finished runs are read, so it can be broken off and
gone on with, and rows that no run has been made for are left out (--read_only makes none). Scores are pooled over all speakers, each
heard only by the model that was not trained on it; intervals and differences are drawn over speakers. `pip install 'prosody-ser[record]'`
adds the rows of openSMILE's ComParE 2016 functionals (6,373) with a linear support vector machine, its C chosen on each fold's
validation speaker; models that are refitted with that speaker are held against one that is. --publish writes the figures that the page `nbs/results.ipynb` draws.
"""
import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from studies import flags

from prosody_ser.evaluation import paired_difference, intervals, read_predictions, score, write_predictions

RECIPE = dict(backbone="whisper", vocab_size=200, head_lr=1e-3, gradient_accumulation_steps=1, ctc_blank_penalty=0, num_workers=0, checkpoint_interval=0,
              decode_method="greedy", early_stopping_patience=0)
WAYS = {"frozen": dict(freeze_backbone=True, num_epochs=20), "frozen, refit": dict(freeze_backbone=True, num_epochs=20, whisper_tail_seconds=30, speed_perturb=0.15, refit=True),
        "fine-tuned": dict(num_epochs=10, freeze_epochs=5, backbone_lr=2e-5, speed_perturb=0.15)}
TASKS = {"SER": ["ser"], "all three": ["ser", "asr", "prosody"], "SER + ASR": ["ser", "asr"], "SER + prosody": ["ser", "prosody"]}
IMBALANCE = {"class weights": dict(class_weights="balanced"), "logit adjustment 1": dict(logit_adjustment=1.0), "focal loss 2": dict(focal_gamma=2.0),
             "balanced sampling": dict(balanced_sampling=1.0)}
STEPS = {"30 s of silence": dict(whisper_tail_seconds=30), "speed perturbation": dict(speed_perturb=0.15), "refit": dict(refit=True)}
SHOWN = "ser/ua", "ser/wa", "ser/macro_f1", "asr/wer", "prosody/f1"


def corpus(data: Path, out: Path):
    "One manifest of all rows"
    from prosody_ser.data import read_manifest, write_manifest
    write_manifest([u for s in ("train", "val", "test") for u in read_manifest(data/f"{s}.jsonl")], out/"all.jsonl")
    return out/"all.jsonl"


def crossval(folder: Path, settings: dict, seeds: int, read_only: bool):
    "One study in a process of its own: its pooled predictions; None where it has not been made"
    pooled = folder/"crossval_predictions.jsonl"
    if read_only and not pooled.exists(): return None
    if not read_only:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder/"log.txt", "a") as log:
            subprocess.run([sys.executable, "-c", "from prosody_ser.cli import main; main()", "crossval", *flags(settings | dict(save_dir=folder, seeds=seeds))], stdout=log, stderr=log, check=True)
    return read_predictions(pooled)


def compare_svm(data: Path, folds: list, refit: bool):
    "ComParE functionals and a linear SVM, with refit trained on the validation speaker too once it has chosen C: predictions in the shape of ours"
    import numpy as np
    import opensmile
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.metrics import recall_score
    from sklearn.svm import LinearSVC
    from prosody_ser.data import group_of, load_utterance, read_manifest
    smile = opensmile.Smile(opensmile.FeatureSet.ComParE_2016, opensmile.FeatureLevel.Functionals)
    seen, records = {}, []
    def features(u):
        if u.audio_filepath not in seen: seen[u.audio_filepath] = smile.process_signal(load_utterance(u, data), 16000).to_numpy()[0]
        return seen[u.audio_filepath]
    for fold in folds:
        x, y, rows = {}, {}, {s: read_manifest(fold/f"{s}.jsonl") for s in ("train", "val", "test")}
        for s, us in rows.items(): x[s], y[s] = np.nan_to_num(np.stack([features(u) for u in us])), [u.emotion for u in us]
        def learn(c): return make_pipeline(StandardScaler(), LinearSVC(C=c, random_state=0, max_iter=20_000)).fit(x["train"], y["train"])
        best = max((learn(c) for c in (1e-5, 1e-4, 1e-3, 1e-2)), key=lambda m: recall_score(y["val"], m.predict(x["val"]), average="macro", zero_division=0))
        if refit: best.fit(np.concatenate([x["train"], x["val"]]), y["train"] + y["val"])
        records += [dict(id=u.id or u.audio_filepath, seed=0, emotion=str(u.emotion), predicted_emotion=str(p), speaker=u.speaker, group=group_of(u)) for u, p in zip(rows["test"], best.predict(x["test"]))]
    return records


def seeds_of(records: list): return sorted({r["seed"] for r in records})


def figures(records: list):
    "Mean and deviation over seeds of each score, its floor, and its interval over speakers, all seeds drawn together"
    import numpy as np
    scores, (ends, _) = [score([r for r in records if r["seed"] == s]) for s in seeds_of(records)], intervals(records)
    return {k: dict(mean=float(np.mean([m[k] for m in scores])), sd=float(np.std([m[k] for m in scores], ddof=1)) if len(scores) > 1 else None, low=ends[f"{k}_low"], high=ends[f"{k}_high"],
                    floor=scores[0][f"{k}_floor"]) for k in SHOWN if k in scores[0]}


def against(records: list, others: list):
    "The differences in emotion scores from another row, drawn together over speakers: from its only seed, or over the seeds that both have"
    if len(seeds_of(others)) == 1: others = [r | dict(seed=s) for s in seeds_of(records) for r in others]
    both = set(seeds_of(records)) & set(seeds_of(others))
    records, others = ([r for r in rows if r["seed"] in both] for rows in (records, others))
    found = paired_difference(records, others)
    return {k: dict(mean=found[k], low=found[f"{k}_low"], high=found[f"{k}_high"]) for k in SHOWN[:3]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Berlin corpus: audio, train.jsonl, val.jsonl, test.jsonl with a speaker in each row")
    parser.add_argument("--backbones", nargs="+", required=True, metavar="NAME=PATH", help="pretrained Whisper encoders")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--imbalance", action="store_true", help="also the corrections for rare emotions: frozen, emotion only")
    parser.add_argument("--steps", action="store_true", help="also what tells 'frozen, refit' from 'frozen', one thing at a time: frozen, emotion only")
    parser.add_argument("--cpu_bf16", action="store_true", help="fine-tune in bf16 on a processor that has it; half the time")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--read_only", action="store_true", help="train nothing, sum up what is finished")
    parser.add_argument("--out", type=Path, default=Path("runs/record"), help="folder of the runs")
    parser.add_argument("--publish", type=Path, metavar="JSON", help="write the figures there")
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    args.out.mkdir(parents=True, exist_ok=True)
    base = RECIPE | dict(manifests=corpus(args.data, args.out), audio_base_path=args.data, emotion_names="emodb")
    rows = []
    def tell(records, others, **what):
        row = what | dict(seeds=len(seeds_of(records)), scores=figures(records), against={name: against(records, o) for name, o in others.items() if o})
        rows.append(row)
        told = {"UA": row["scores"]["ser/ua"]} | {f"less {name}": a["ser/ua"] for name, a in row["against"].items()}
        print(f"{what['backbone']}, {what['way']}, {what['tasks']}: " + ", ".join(f"{k} {v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in told.items()), flush=True)
    compare = {}                                               # refitted or not -> predictions
    for refit in (False, True):
        svm = args.out/f"compare_svm{'_refit' * refit}.jsonl"
        if not svm.exists() and not args.read_only:
            try: import opensmile
            except ImportError: print("(opensmile is not installed: no new rows for ComParE + SVM)", flush=True); continue
            from prosody_ser.ablation import make_folds
            write_predictions(svm, compare_svm(args.data, make_folds([args.out/"all.jsonl"], args.out/"folds"), refit))
        if not svm.exists(): continue
        compare[refit] = read_predictions(svm)
        tell(compare[refit], {}, backbone="ComParE", way="svm, refit" if refit else "svm", tasks="SER", part="tasks")
    for name, path in (b.split("=", 1) for b in args.backbones):
        for way in args.ways:
            more = dict(feature_cache=args.out/"cache") if "freeze_backbone" in WAYS[way] else dict(cpu_bf16=True) if args.cpu_bf16 else {}
            settings, alone = base | WAYS[way] | more | dict(backbone_path=path), None
            variants = [("tasks", t, {f"use_alpha_{h}": True for h in TASKS[t]}) for t in TASKS if t in args.tasks]       # the emotion alone first: the others are held against it
            for part, wanted, some in (("rare emotions", args.imbalance, IMBALANCE), ("steps", args.steps, STEPS)):
                if wanted and way == "frozen": variants += [(part, f"SER, {n}", dict(use_alpha_ser=True) | o) for n, o in some.items()]
            for part, tasks, overrides in variants:
                folder = args.out/f"{name} {way} {tasks}".replace(" + ", "+").replace(", ", "-").replace(" ", "_")
                records = crossval(folder, settings | overrides, args.seeds, args.read_only)
                if records: tell(records, {"SER": alone, "ComParE": compare.get("refit" in (settings | overrides))}, backbone=name, way=way, tasks=tasks, part=part)
                else: print(f"(no finished runs in {folder})", flush=True)
                if tasks == "SER": alone = records
    if args.publish:
        import torch
        about = dict(date=datetime.date.today().isoformat(), torch=torch.__version__, machine=f"{os.cpu_count()} cores, {platform.machine()}", cpu_bf16=args.cpu_bf16,
                     recipe={k: v for k, v in RECIPE.items()}, ways=WAYS)
        args.publish.parent.mkdir(parents=True, exist_ok=True)
        args.publish.write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
