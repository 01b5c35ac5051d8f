"""The studies whose tables stand in the notebooks: variants of one recipe, several seeds, mean and standard deviation.

    python benchmarks/studies.py layers --data EMODB --backbone_path WHISPER_BASE     # last layer or mix, frozen or trained
    python benchmarks/studies.py alignment --data EMODB --backbone_path WHISPER_TINY  # where a word's frames come from
    python benchmarks/studies.py batching --data EMODB --backbone_path WHISPER_TINY   # batches of like length, or random ones
    python benchmarks/studies.py imbalance --data EMODB --backbone_path WHISPER_TINY  # corrections for rare emotions
    python benchmarks/studies.py weights --data EMODB --backbone_path WHISPER_TINY    # weights of the losses: fixed, the best of an alpha study, learned
    python benchmarks/studies.py demo_alignment                                       # the same on the demo corpus
    python benchmarks/studies.py demo_weights
    python benchmarks/studies.py demo_blank                                           # the blank penalty on the demo corpus

Each run is a training of its own in --out; finished runs are read, not repeated, so a study can be broken off and
gone on with. The validation scores are those of the epoch that validation chose; the test scores are that model's.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

EMODB = dict(emotion_names="emodb", backbone="whisper", vocab_size=200, num_epochs=8, backbone_lr=5e-5, head_lr=1e-3, gradient_accumulation_steps=1,
             ctc_blank_penalty=0, num_workers=0, checkpoint_interval=0)
DEMO = dict(backbone="tiny", tokenizer_type="char", vocab_size=80, num_epochs=14, gradient_accumulation_steps=1, backbone_lr=2e-3, head_lr=2e-3, alpha_asr=2,
            alpha_prosody=1, ctc_blank_penalty=0, ctc_entropy_weight=0, num_workers=0, early_stopping_patience=0, checkpoint_interval=0, log_steps=20)
CHAR = dict(tokenizer_type="char")
TENTH, STUDY, LEARNED = dict(alpha_asr=0.1, alpha_prosody=0.1), dict(run_ablation_study=True), dict(alpha_mode="uncertainty")
STUDIES = {  # study -> recipe, {variant: its overrides}, metrics of the table
    "layers": (EMODB, {"frozen, last layer": dict(freeze_backbone=True, no_layer_mix=True), "frozen, mix": dict(freeze_backbone=True),
                       "fine-tuned, last layer": dict(no_layer_mix=True), "fine-tuned, mix": {}}, ["ser/ua", "asr/wer", "prosody/f1"]),
    "pooling": (EMODB, {p: dict(pooling=p) for p in ("mean", "mean_std", "attentive")}, ["ser/ua"]),
    "alignment": (EMODB, {"BPE, even split": dict(prosody_alignment="uniform"), "BPE, ctc": {},
                          "characters, even split": dict(prosody_alignment="uniform") | CHAR, "characters, ctc": CHAR}, ["prosody/f1", "prosody/roc_auc", "asr/wer"]),
    "batching": (EMODB, {b: dict(batching=b) for b in ("length", "random")}, ["ser/ua", "asr/wer", "prosody/f1"]),
    "demo_batching": (DEMO, {b: dict(batching=b) for b in ("length", "random")}, ["ser/ua", "asr/wer", "prosody/f1"]),
    "imbalance": (EMODB, {"cross entropy": {}, "class weights": dict(class_weights="balanced"), "logit adjustment 1": dict(logit_adjustment=1.0),
                          "focal loss 2": dict(focal_gamma=2.0), "balanced sampling": dict(balanced_sampling=1.0)}, ["ser/ua", "ser/wa", "ser/macro_f1"]),
    "weights": (EMODB, {"fixed, 0.1": TENTH, "best of the study": STUDY, "learned, from 0.1": TENTH | LEARNED, "learned, from 1": dict(alpha_asr=1, alpha_prosody=1) | LEARNED},
                ["ser/ua", "asr/wer", "prosody/f1"]),
    "demo_weights": (DEMO, {"fixed, 0.1": TENTH, "fixed, 2 and 1": {}, "best of the study": STUDY, "learned, from 0.1": TENTH | LEARNED, "learned, from 2 and 1": LEARNED},
                     ["ser/ua", "asr/wer", "prosody/f1"]),
    "demo_alignment": (DEMO, {"even split": dict(prosody_alignment="uniform"), "ctc": {}}, ["prosody/f1", "prosody/roc_auc"]),
    "demo_pieces": (DEMO | dict(tokenizer_type="bpe", vocab_size=60), {"even split": dict(prosody_alignment="uniform"), "ctc": {}}, ["prosody/f1", "prosody/roc_auc"]),
    "demo_blank": (DEMO, {f"blank penalty {p}": dict(ctc_blank_penalty=p) for p in (0, 50)}, ["asr/wer", "asr/cer", "ser/ua"]),
}


def flags(settings: dict):
    "Settings as command-line arguments"
    return [x for k, v in settings.items() for x in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


def run(folder: Path, settings: dict):
    "One training: its scores on validation and test"
    done = folder/"test_results.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder/"log.txt", "w") as log:
            subprocess.run([sys.executable, "-m", "prosody_ser.train", *flags(settings | dict(save_dir=folder, tokenizer_path=folder/"tok.model"))], stdout=log, stderr=log, check=True)
    return json.loads((folder/"best_model"/"validation.json").read_text()), json.loads(done.read_text())["metrics"]


def cell(scores: list, metric: str):
    "Mean and standard deviation over seeds"
    values = [s[metric] for s in scores]
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, help="folder with audio, train.jsonl, val.jsonl and test.jsonl; the demo studies make their own")
    parser.add_argument("--backbone_path", help="hub id or folder of the pretrained backbone")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_epochs", type=int, help="epochs of each training, to try a study out; default: the recipe's. Give an --out of its own: finished runs are read")
    parser.add_argument("--cpu_bf16", action="store_true", help="train in bf16 on a processor that has it; half the time for a pretrained backbone")
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    recipe, variants, metrics = STUDIES[args.study]
    if args.study.startswith("demo"):
        from prosody_ser.corpus import make_demo_corpus
        make_demo_corpus(args.out/"demo_corpus"); args.data = args.out/"demo_corpus"
    recipe = recipe | dict(audio_base_path=args.data) | {f"{s}_jsonl": args.data/f"{s}.jsonl" for s in ("train", "val", "test")}
    if args.num_epochs: recipe |= dict(num_epochs=args.num_epochs, ablation_epochs=args.num_epochs)
    if args.cpu_bf16: recipe |= dict(cpu_bf16=True)
    if args.backbone_path: recipe |= dict(backbone_path=args.backbone_path)
    print("| variant | " + " | ".join(f"{m}, {s}" for s in ("validation", "test") for m in metrics) + " |\n" + "|---" * (1 + 2 * len(metrics)) + "|", flush=True)
    for name, overrides in variants.items():
        folder = args.out/args.study/name.replace(", ", "-").replace(" ", "_")
        results = [run(folder/f"seed{s}", recipe | overrides | dict(seed=s)) for s in range(args.seeds)]
        print(f"| {name} | " + " | ".join(cell([r[i] for r in results], m) for i in (0, 1) for m in metrics) + " |", flush=True)


if __name__ == "__main__":
    main()
