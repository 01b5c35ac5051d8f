"""Settings for little speech and two processor cores, compared on validation speakers alone.

    python benchmarks/recipes.py --data NEMO --backbone_path WHISPER_TINY --cpu_bf16
    python benchmarks/recipes.py --data NEMO --backbone_path WHISPER_TINY --read_only --publish FILE.json
    python benchmarks/recipes.py --corpus emodb --data EMODB --backbone_path WHISPER_BASE \
      --ways "emotion alone" --folds 0 1 2 3 4 5 6 7 --publish nbs/results/decay.json

Each variant changes the recipe `small` in the settings that it names, and trains some folds of the corpus;
their test speakers are never scored. Finished runs are read, so it can be broken off and gone on with. A
published file keeps what was not trained here: rows of other backbones, corpora, variants and folds.
"""

import argparse
import os
import time
from pathlib import Path

from common import CORPORA, PLAIN, heads, prosody_ser, read_json, write_json

from prosody_ser.parsing import RECIPES

SMALL = RECIPES["small"]
VARIANTS = {
    "fine-tuned": {
        "as it is": {},
        "the first try: heads 1e-3, frozen for 2 epochs": dict(head_lr=1e-3, freeze_epochs=2),
        "the same, backbone 2e-4": dict(head_lr=1e-3, freeze_epochs=2, backbone_lr=2e-4),
        "frozen for 2 epochs": dict(freeze_epochs=2),
        "frozen for 2 epochs, backbone 1e-4": dict(freeze_epochs=2, backbone_lr=1e-4),
        "frozen for 2 epochs, speed perturbation": dict(freeze_epochs=2, speed_perturb=0.15),
    },
    "frozen": {
        "as it is": {},
        "heads 1e-3": dict(head_lr=1e-3),
        "heads 2e-3": dict(head_lr=2e-3),
        "heads 8e-3": dict(head_lr=8e-3),
        "batches of 4": dict(batch_size=4),
        "characters": dict(tokenizer_type="char", vocab_size=60),
        "characters, heads 1e-3": dict(tokenizer_type="char", vocab_size=60, head_lr=1e-3),
        "α 1": dict(alpha_asr=1.0),
    },
    "emotion alone": {
        f"weight decay {decay:g}": dict(num_epochs=20, ser_weight_decay=decay) for decay in (0.01, 1, 3, 10)
    }
    | {
        "weight decay 3, speed perturbation": dict(num_epochs=20, ser_weight_decay=3, speed_perturb=0.15),
    },
}


def train(place, settings):
    """One training without a test: its validations, and its minutes."""
    if not (place / "minutes.json").exists():
        began = time.time()
        prosody_ser("train", settings | dict(save_dir=place), place / "log.txt")
        write_json(place / "minutes.json", (time.time() - began) / 60)
    return read_json(place / "training_history.json")["val"], read_json(place / "minutes.json")


def told(way, name, fold, found):
    """A run as a row: the end of its schedule, where the choice of an epoch plays no part."""
    val, minutes = found
    means = {k: sum(e[k] for e in val[-3:]) / 3 for k in ("ser/ua", "ser/ua_speaker_norm") if k in val[-1]}
    about = dict(way=way, variant=name, fold=fold, minutes=minutes, rows=val[-1]["ser/n"])
    return about | means | {k: val[-1][k] for k in ("asr/wer",) if k in val[-1]}


def told_apart(row):
    """What no two rows of a published file have in common."""
    return tuple(row.get(k) for k in ("backbone", "corpus", "way", "variant", "fold"))


def runs(args):
    """(way, variant, fold, folder, settings) of every run that is asked for."""
    from prosody_ser.ablation import make_folds

    about = CORPORA[args.corpus]
    folds = make_folds(
        about.files(args.data), args.out / args.corpus / "folds", about.folds
    )
    named = dict(emotion_names=about.emotion_names) if about.emotion_names else {}
    for way in args.ways:
        carried = dict(cpu_bf16=args.cpu_bf16)
        if way != "fine-tuned":
            carried = dict(freeze_backbone=True, feature_cache=args.out / "cache")
        tasks = heads(["ser"] if way == "emotion alone" else ["ser", "asr"])
        for name, more in VARIANTS[way].items():
            for f in args.folds:
                settings = (
                    PLAIN
                    | SMALL
                    | tasks
                    | named
                    | carried
                    | more
                    | dict(
                        audio_base_path=args.data,
                        backbone_path=args.backbone_path,
                        grad_share_steps=0,
                        train_jsonl=folds[f] / "train.jsonl",
                        val_jsonl=folds[f] / "val.jsonl",
                    )
                )
                place = (
                    args.out
                    / args.corpus
                    / args.backbone
                    / way
                    / name.replace(", ", "-").replace(" ", "_")
                    / str(f)
                )
                yield way, name, f, place, settings


def main():
    """Trains the variants, and prints what validation says of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", choices=CORPORA, default="nemo", help="the corpus of --data")
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--backbone_path", required=True, help="folder of a pretrained Whisper encoder")
    parser.add_argument("--ways", nargs="+", choices=VARIANTS, default=["fine-tuned", "frozen"])
    parser.add_argument("--folds", nargs="+", type=int, default=[0], help="numbers of folds")
    parser.add_argument(
        "--cpu_bf16", action="store_true", help="fine-tune in bf16 on a processor that has it"
    )
    parser.add_argument("--read_only", action="store_true", help="train nothing, print what is finished")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    parser.add_argument("--publish", type=Path, metavar="JSON", help="write the figures there")
    args = parser.parse_args()
    args.backbone = Path(args.backbone_path).resolve().name
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    rows = []
    for way, name, fold, place, settings in runs(args):
        if args.read_only and not (place / "minutes.json").exists():
            continue
        rows.append(told(way, name, fold, train(place, settings)))
        rows[-1] |= dict(corpus=args.corpus, backbone=args.backbone)
        scores = "  ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if "/" in k)
        print(
            "{way:13} {variant:48} fold {fold}  {minutes:.1f} min  ".format(**rows[-1]) + scores, flush=True
        )
    if args.publish:
        before = read_json(args.publish, dict(rows=[]))["rows"]
        new = {told_apart(r) for r in rows}
        kept = [r for r in before if told_apart(r) not in new]
        write_json(args.publish, dict(small=SMALL, rows=kept + rows))


if __name__ == "__main__":
    main()
