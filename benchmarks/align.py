"""Time and memory of the forced alignment of a long recording; or how well its score tells right words from wrong ones.

    python benchmarks/align.py                 # 10 and 30 minutes
    python benchmarks/align.py --minutes 60
    python benchmarks/align.py --models runs/demo/best_model --corpus runs/demo/corpus

Random frames, 50 a second, and random targets, 3 tokens a second, on the CPU with one thread. `in segments` is what the
package does; `in one piece` keeps the steps of all frames and states. Each runs in a process of its own; its memory is the
growth of the resident set while it aligns.

With models, 160 utterances of the corpus' validation and test sets are aligned with their own words and with wrong ones:
ROC-AUC of the score, and the share of alignments below the floor.
"""
import argparse
import random
import resource
import subprocess
import sys
import time


def align(minutes, cells):
    """Seconds and GB of one alignment."""
    import torch

    from prosody_ser.alignment import align_logits
    from prosody_ser.decoding import HeadLogits
    torch.set_num_threads(1)
    torch.manual_seed(0)
    frames, tokens = int(minutes * 60 * 50), int(minutes * 60 * 3)
    head = HeadLogits(torch.randn(1, frames, 64), torch.randn(4000, 64), torch.randn(4000))
    labels = torch.tensor([frames]), torch.randint(5, 4000, (1, tokens)), torch.tensor([tokens])
    align_logits(HeadLogits(head.hidden[:, :500], head.weight, head.bias), torch.tensor([500]), labels[1][:, :30],
                 torch.tensor([30]))                                               # what is loaded at the first call
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    align_logits(head, *labels, cells=cells)
    return time.time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def wrong_words(rows, rng):
    """Each row's own words, and wrong ones of four kinds."""
    vocabulary = sorted({w for u in rows for w in u.words})
    for u in rows:
        other = rng.choice([v for v in rows if v.words != u.words])
        i = rng.randrange(len(u.words))
        one = rng.choice([w for w in vocabulary if w != u.words[i]])
        yield u, {"right": u.words, "of another utterance": other.words, "random": rng.choices(vocabulary, k=len(u.words)),
                  "one wrong": [*u.words[:i], one, *u.words[i + 1:]], "one missing": u.words[:i] + u.words[i + 1:]}


def scores(model, corpus, n=160):
    """The score of each alignment, by the kind of its words; those without an alignment have the worst."""
    from prosody_ser.data import read_manifest
    from prosody_ser.inference import Predictor
    rng, predictor, found = random.Random(0), Predictor(model, "cpu"), {}
    rows = [u for split in ("val", "test") for u in read_manifest(f"{corpus}/{split}.jsonl", corpus) if len(u.words or ()) > 1]
    for u, kinds in wrong_words(rng.sample(rows, n), rng):
        for kind, words in kinds.items():
            score = predictor(u, words=words)["alignment_score"]
            found.setdefault(kind, []).append(-1e9 if score is None else score)
    return found, float(predictor.model.asr_nats)


def main():
    """Prints a line a length and a way, or a table of models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 30], help="lengths of the recording")
    parser.add_argument("--models", nargs="+", help="folders of trained models")
    parser.add_argument("--corpus", help="folder of the demo corpus")
    parser.add_argument("--cells", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cells:
        print(*align(args.minutes[0], args.cells))
        return
    if args.models:
        from sklearn.metrics import roc_auc_score

        from prosody_ser.alignment import MIN_ALIGNMENT_SCORE
        for model in args.models:
            found, nats = scores(model, args.corpus)
            right = found["right"]
            print(f"{model}: {nats:.2f} nats per token")
            for kind, values in found.items():
                auc = roc_auc_score([1] * len(right) + [0] * len(values), right + values)
                below = sum(v < MIN_ALIGNMENT_SCORE for v in values) / len(values)
                print(f"  {kind:22} AUC {auc:.3f}, below the floor {100 * below:5.1f} %, median {sorted(values)[len(values) // 2]:.2f}")
        return
    for minutes in args.minutes:
        for name, cells in {"in segments": 2**22, "in one piece": 2**62}.items():
            command = [sys.executable, __file__, "--minutes", str(minutes), "--cells", str(cells)]
            seconds, gb = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
            print(f"{minutes:g} min {name:12} {seconds:6.1f} s {gb:6.2f} GB")


if __name__ == "__main__":
    main()
