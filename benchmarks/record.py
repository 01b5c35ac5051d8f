"""The real-data record: leave one speaker out, what the auxiliary tasks are worth, frozen and fine-tuned, beside ComParE + SVM on the same folds.

    python benchmarks/record.py --data EMODB --backbones whisper-tiny=PATH whisper-base=PATH

Each row of the table is one `prosody-ser crossval` (8 folds on the Berlin corpus cut at 2 s); finished runs are read, so it can
be broken off and gone on with. Scores are pooled over all speakers, each heard only by the model that was not trained on it; the
interval is drawn over speakers. `pip install opensmile` adds the row of openSMILE's ComParE 2016 functionals (6,373) with a
linear support vector machine, its C chosen on each fold's validation speaker.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

RECIPE = dict(backbone="whisper", vocab_size=200, backbone_lr=5e-5, head_lr=1e-3, gradient_accumulation_steps=1, ctc_blank_penalty=0, num_workers=0,
              checkpoint_interval=0, decode_method="greedy")
WAYS = {"frozen": dict(freeze_backbone=True, num_epochs=30), "fine-tuned": dict(num_epochs=8)}
TASKS = {"SER": ["ser"], "SER + ASR": ["ser", "asr"], "SER + prosody": ["ser", "prosody"], "all three": ["ser", "asr", "prosody"]}


def flags(settings: dict):
    "Settings as command-line arguments"
    return [x for k, v in settings.items() for x in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


def corpus(data: Path, out: Path):
    "One manifest of all rows"
    from prosody_ser.data import read_manifest, write_manifest
    write_manifest([u for s in ("train", "val", "test") for u in read_manifest(data/f"{s}.jsonl")], out/"all.jsonl")
    return out/"all.jsonl"


def crossval(folder: Path, settings: dict, seeds: int):
    "One study in a process of its own: its pooled predictions"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/"log.txt", "a") as log:
        subprocess.run([sys.executable, "-c", "from prosody_ser.cli import main; main()", "crossval", *flags(settings | dict(save_dir=folder, seeds=seeds))], stdout=log, stderr=log, check=True)
    return [json.loads(line) for line in open(folder/"crossval_predictions.jsonl", encoding="utf-8")]


def compare_svm(data: Path, folds: list):
    "ComParE functionals and a linear SVM: predictions in the shape of ours"
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
        records += [dict(emotion=str(u.emotion), predicted_emotion=str(p), speaker=u.speaker, group=group_of(u)) for u, p in zip(rows["test"], best.predict(x["test"]))]
    return records


def line(name: str, records: list, seeds: list):
    "A row of the table: mean and deviation over seeds, the interval over speakers of the first"
    import numpy as np
    from prosody_ser.evaluation import intervals, score
    scores = [score([r for r in records if r.get("seed", 0) == s]) for s in seeds]
    low_high, _ = intervals([r for r in records if r.get("seed", 0) == seeds[0]])
    def cell(k):
        if k not in scores[0]: return ""
        values = [m[k] for m in scores]
        deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{deviation} ({low_high[k + '_low']:.2f} to {low_high[k + '_high']:.2f})"
    return f"| {name} | " + " | ".join(cell(k) for k in ("ser/ua", "ser/wa", "asr/wer", "prosody/f1")) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Berlin corpus: audio, train.jsonl, val.jsonl, test.jsonl with a speaker in each row")
    parser.add_argument("--backbones", nargs="+", required=True, metavar="NAME=PATH", help="pretrained Whisper encoders")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/record"), help="folder of the runs and of record.md")
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    args.out.mkdir(parents=True, exist_ok=True)
    base = RECIPE | dict(manifests=corpus(args.data, args.out), audio_base_path=args.data, emotion_names="emodb")
    lines = ["| model | UA (95 % over speakers) | WA | WER | prominence F1 |", "|---|---|---|---|---|"]
    def tell(text): lines.append(text); print(text, flush=True); (args.out/"record.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)
    try: import opensmile
    except ImportError: print("(opensmile is not installed: no row for ComParE + SVM)", flush=True)
    else:
        from prosody_ser.crossval import make_folds
        tell(line("ComParE + linear SVM", compare_svm(args.data, make_folds([args.out/"all.jsonl"], args.out/"folds")), [0]))
    for name, path in (b.split("=", 1) for b in args.backbones):
        for way in args.ways:
            for tasks, heads in TASKS.items():
                settings = base | WAYS[way] | dict(backbone_path=path) | {f"use_alpha_{t}": True for t in heads}
                if way == "frozen": settings["feature_cache"] = args.out/"cache"
                folder = args.out/f"{name}-{way}-{'-'.join(heads)}"
                tell(line(f"{name}, {way}, {tasks}", crossval(folder, settings, args.seeds), list(range(args.seeds))))


if __name__ == "__main__":
    main()
