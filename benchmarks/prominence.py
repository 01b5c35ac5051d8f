"""What are acoustic prominence marks worth? Listeners' marks of Berlin EmoDB against each method, each cue and each way to place words.

    python benchmarks/prominence.py --corpus EMODB [--runs CROSSVAL] --out nbs/results/prominence.json

CROSSVAL is the folder of `prosody-ser crossval` on the corpus, one fold a speaker, with a tokenizer of letters and the heads asr and
prosody: each model places the words of the speaker that it has never heard, and its prominence head stands beside. ROC-AUC of the scores, and
F1 at the threshold that was best on the other speakers; 95 % intervals by drawing speakers. Long words are prominent words in this corpus,
so beside them stands what knows no sound at all, the number of letters of a word, and the ROC-AUC among words of equally many letters. The last lines are the thresholds and slopes of all speakers, which the package has.
"""
import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
from common import commit, write_json

from prosody_ser.audio import load_utterance
from prosody_ser.data import read_manifest
from prosody_ser.evaluation import intervals, read_predictions, score
from prosody_ser.prominence import CUES, _Aligner, even_times, hear_words, prominence_scores

def aligners(runs):
    """Speaker -> the aligner of the model that has not heard it; and what the prominence heads say, file -> (W,)."""
    found, heads = {}, {}
    for fold in sorted(Path(runs).glob("fold_*/seed_0")) if runs else ():
        records = read_predictions(fold)
        aligner = _Aligner(fold / "best_model", "cpu")
        found |= dict.fromkeys({r["speaker"] for r in records}, aligner)
        heads |= {r["audio_filepath"]: np.array(r["prominence"]) for r in records if "prominence" in r}
    return found, heads


def best_threshold(marks, scores):
    """The score above which F1 is best; half way to the next one."""
    order = np.argsort(-scores, kind="stable")
    hits = marks[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(marks) + 1) + marks.sum())
    ranked = scores[order]
    f1[:-1][ranked[:-1] == ranked[1:]] = 0                       # no threshold lies between equal scores
    i = int(f1.argmax())
    return float(ranked[i] + ranked[min(i + 1, len(ranked) - 1)]) / 2


def records_of(rows, scores, limits):
    """Predictions with probabilities that are above .5 where a score is above the limit of its speaker."""
    return [dict(id=u.audio_filepath, speaker=u.speaker, group=u.speaker, emotion=None, prosody_annotations=u.prosody_annotations,
                 prominence=(1 / (1 + np.exp(limits[u.speaker] - np.asarray(s, float)))).tolist()) for u, s in zip(rows, scores, strict=True)]


def measured(rows, scores, fixed=None):
    """ROC-AUC of all scores, F1 at the thresholds of the other speakers (or a fixed one), with intervals."""
    def joined(keep):
        return [np.concatenate([np.asarray(x, float) for u, x in zip(rows, xs, strict=True) if keep(u)])
                for xs in ([u.prosody_annotations for u in rows], scores)]
    speakers = sorted({u.speaker for u in rows})
    limits = {s: best_threshold(*joined(lambda u, s=s: u.speaker != s)) if fixed is None else fixed for s in speakers}
    same = dict.fromkeys(speakers, float(np.mean(list(limits.values()))))
    found = {}
    for key, way in (("roc_auc", same), ("f1", limits)):          # one threshold for all: the order of the scores is theirs
        records = records_of(rows, scores, way)
        values = score(records) | intervals(records)[0]
        found |= {key + end: round(values[f"prosody/{key}{end}"], 4) for end in ("", "_low", "_high")}
    return found | dict(same_length=same_length(rows, scores), words=len(joined(bool)[0]), floor_f1=round(values["prosody/f1_floor"], 4)), joined(lambda u: True)


def same_length(rows, scores):
    """ROC-AUC among words of equally many letters, all their pairs together: what length alone cannot tell."""
    letters, marks, values = (np.concatenate(x) for x in zip(*[([len(w) for w in u.words], u.prosody_annotations, s)
                                                              for u, s in zip(rows, scores, strict=True)], strict=True))
    won = pairs = 0
    for n in set(letters.tolist()):
        yes, no = (values[(letters == n) & (marks == m)] for m in (1, 0))
        order = np.sign(yes[:, None] - no[None])
        won, pairs = won + (order + 1).sum() / 2, pairs + order.size
    return round(won / pairs, 4)


def curve(marks, scores):
    """The threshold with the best F1, and the slope of a logistic curve through the marks."""
    from sklearn.linear_model import LogisticRegression
    slope = LogisticRegression(C=1e6).fit(scores[:, None], marks).coef_[0, 0]
    return dict(threshold=round(best_threshold(marks, scores), 3), slope=round(float(slope), 3))


def main():
    """Prints a table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder with train.jsonl, val.jsonl, test.jsonl and their audio")
    parser.add_argument("--runs", help="folder of a cross-validation with char tokenizer")
    parser.add_argument("--out", required=True, help="JSON file")
    args = parser.parse_args()
    rows = [u for s in ("train", "val", "test") for u in read_manifest(f"{args.corpus}/{s}.jsonl", args.corpus)]
    rows = [u for u in rows if u.prosody_annotations and len(u.words) > 1]
    samples, speakers = [load_utterance(u) for u in rows], [u.speaker for u in rows]
    align, heads = aligners(args.runs)
    spans = {"CTC": [align[u.speaker](x, u.words) for u, x in zip(rows, samples, strict=True)]} if align else {}
    spans["even"] = [even_times(u.words, len(x) / 16000) for u, x in zip(rows, samples, strict=True)]
    spans["given"] = [u.word_times for u in rows]
    subsets = [list(c) for n in (1, 2, 3) for c in combinations(CUES, n)]
    found, curves, placed = {}, {}, {}
    for by, places in spans.items():
        some = [i for i, p in enumerate(places) if p is not None]
        placed[by] = len(some)
        if not some:
            continue
        heard = [hear_words(samples[i], places[i]) for i in some]
        mine, names = [rows[i] for i in some], [speakers[i] for i in some]
        for method in ("linear", "wavelet"):
            for cues in subsets:
                cut = [h._replace(values={c: h.values[c] for c in cues}, tracks={c: h.tracks[c] for c in cues}) for h in heard]
                name = f"{by} spans, {method}: {' + '.join(cues)}"
                found[name], pair = measured(mine, prominence_scores(cut, names, method))
                curves[name] = curve(*pair)
    found["no sound: number of letters"], _ = measured(rows, [[len(w) for w in u.words] for u in rows])
    if heads:
        mine = [u for u in rows if u.audio_filepath in heads]
        logits = [np.log(p := heads[u.audio_filepath].clip(1e-5, 1 - 1e-5)) - np.log1p(-p) for u in mine]
        found["trained head, speaker held out"], _ = measured(mine, logits, 0.0)
    floor = found["no sound: number of letters"]["floor_f1"]
    for name, r in found.items():
        print(f"{name:46} AUC {r['roc_auc']:.3f} ({r['roc_auc_low']:.3f} to {r['roc_auc_high']:.3f})  F1 {r['f1']:.3f} ({r['f1_low']:.3f} to "
              f"{r['f1_high']:.3f})  same length {r['same_length']:.3f}  {r['words']} words", curves.get(name, ""))
    print("floor, all words prominent:", floor, "; utterances placed:", placed)
    write_json(Path(args.out), dict(commit=commit(), utterances=len(rows), speakers=len(set(speakers)), placed=placed, floor_f1=floor,
                                    rows=found, curves=curves))


if __name__ == "__main__":
    main()
