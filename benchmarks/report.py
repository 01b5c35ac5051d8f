"""A finished run as one small file: its test predictions, its settings, and each validation. The guide *Read a report* shows it.

    prosody-ser demo && python benchmarks/report.py runs/demo --out nbs/results/report.json
"""
import argparse
import json
from pathlib import Path

KEPT = "epoch", "skill", "skill_se", "ser/macro_f1", "asr/wer", "prosody/f1"


def digest(run):
    """What a report is written from."""
    settings = json.loads((run / "test/eval_config.json").read_text(encoding="utf-8"))
    history = json.loads((run / "training_history.json").read_text(encoding="utf-8"))
    lines = (run / "test/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return dict(settings={k: v for k, v in settings.items() if k != "intervals"}, metric=history["metric"],
                val=[{k: round(e[k], 5) for k in KEPT if k in e} for e in history["val"]],
                records=[json.loads(line) for line in lines])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    given.out.write_text(json.dumps(digest(given.run), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
