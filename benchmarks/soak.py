"""Hours of training, evaluation, prediction and checkpoints in one process: memory, open files and processes stay flat.

    python benchmarks/soak.py --hours 2 --out soak.json

Each round trains a tiny model for two epochs with checkpoints, resumes it for a third, evaluates it on the test
set and predicts each recording. After each round the process is measured; the slopes are those of straight lines
through the rounds after the first tenth, when caches have filled.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import psutil

TINY = dict(
    backbone="tiny", vocab_size=60, batch_size=4, gradient_accumulation_steps=1, num_workers=1, log_steps=5,
    checkpoint_interval=1, checkpoint_steps=4, backbone_lr=1e-3, head_lr=1e-3, select_rule="best",
)


def one_round(splits, place):
    """Train, resume, evaluate and predict; nothing that a user would not do."""
    import prosody_ser as ps

    train, val, test = splits
    for epochs in (2, 3):
        run = ps.train(train, val, num_epochs=epochs, resume=epochs > 2, save_dir=str(place / "run"), **TINY)
    run.evaluate(test)
    predict = ps.Predictor(run.best_model)
    for row in test:
        predict(row)
    plt.close("all")


def measured(process, started):
    """What this process holds now, when all that Python can free is freed."""
    gc.collect()
    return dict(
        hours=(time.time() - started) / 3600, resident_mb=process.memory_info().rss / 2**20,
        open_files=process.num_fds(), threads=process.num_threads(),
        children=len(process.children(recursive=True)),
        temporary=len(os.listdir(tempfile.gettempdir())),
    )


def slopes(rounds):
    """Growth an hour of each figure, by least squares, after the first tenth of the rounds."""
    later = rounds[len(rounds) // 10:]
    hours = np.array([r["hours"] for r in later])
    names = [k for k in later[0] if k != "hours"]
    if len(later) < 3:
        return {}
    return {k: float(np.polyfit(hours, [r[k] for r in later], 1)[0]) for k in names}


def main():
    """Rounds until the time is over; a line each, and the slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="how long (default 2)")
    parser.add_argument("--rows", type=int, default=24, help="rows of each split (default 24)")
    parser.add_argument("--out", type=Path, help="JSON of all rounds and the slopes")
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    import prosody_ser as ps

    started, process, rounds = time.time(), psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = str(Path(folder) / "temporary")       # what is left there is counted
        Path(tempfile.tempdir).mkdir()
        splits = [rows[:args.rows] for rows in ps.demo_corpus(Path(folder) / "corpus")]
        while not rounds or time.time() - started < 3600 * args.hours:
            place = Path(folder) / "round"
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                one_round(splits, place)
            shutil.rmtree(place)
            rounds.append(measured(process, started))
            print(json.dumps({k: round(v, 3) for k, v in rounds[-1].items()}), flush=True)
            if args.out:
                args.out.write_text(json.dumps(dict(rounds=rounds, slopes=slopes(rounds)), indent=1) + "\n")
    print(f"{len(rounds)} rounds; growth an hour:", {k: round(v, 3) for k, v in slopes(rounds).items()})


if __name__ == "__main__":
    main()
