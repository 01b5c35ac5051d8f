"""What must hold for any input, tried on many: manifests, tokens, batches, CTC, alignment, decoding, metrics, JSON, names."""
import itertools
import json
import math
import unicodedata
import warnings
from collections import Counter
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, recall_score

from prosody_ser.alignment import align_logits, align_words, uniform_spans
from prosody_ser.batches import DurationBatchSampler, batches_by_length
from prosody_ser.ctc import infeasible, regularised_ctc
from prosody_ser.data import ManifestError, Utterance, read_manifest, rows_digest, write_manifest
from prosody_ser.decoding import HeadLogits, beam_decode, greedy_decode
from prosody_ser.evaluation import intervals, read_predictions, score, write_predictions
from prosody_ser.folder import to_json, write_json
from prosody_ser.model import Collator
from prosody_ser.text import clean, name_key, path_key, plain_name
from prosody_ser.tokenizer import SentencePieceTokenizer

torch.set_num_threads(1)
BLANK = 0


def tried(n):
    """So many examples, the same ones each time."""
    return settings(derandomize=True, max_examples=n, deadline=None, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


# ------------------------------------------------------------------------------------------------------------ manifests

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
WORD = TEXT.filter(lambda w: clean(w) != "")
NAME = TEXT.filter(lambda x: (name_key(x) or "nan") not in {"nan", "<na>", "null", "none"})
PATH = TEXT.filter(lambda p: p.strip() and "\0" not in p)
SECONDS = st.floats(0, 1e6, allow_nan=False) | st.integers(0, 10**6)


@st.composite
def utterances(draw):
    """A legal row, as a program may hold it: names in any spelling, numbers as speakers."""
    words = draw(st.none() | st.lists(WORD, min_size=1, max_size=5))
    marks = None if words is None else draw(st.none() | st.lists(st.integers(0, 1), min_size=len(words), max_size=len(words)))
    start, end = draw(st.sampled_from([(None, None), (0, None)]) | st.tuples(SECONDS, SECONDS).filter(lambda x: x[0] < x[1]))
    times = None if words is None else draw(st.none() | st.lists(st.lists(SECONDS, min_size=2, max_size=2), min_size=len(words), max_size=len(words)))
    return Utterance(draw(PATH), words, marks, draw(st.none() | st.integers(0, 999) | NAME), draw(st.none() | NAME | st.integers() | st.integers(-9, 9).map(float)),
                     draw(st.none() | TEXT | st.integers()), start, end, times, corpus=draw(st.none() | NAME))


@tried(150)
@given(rows=st.lists(utterances(), min_size=1, max_size=4))
def test_manifest_round_trip(folder, rows):
    """What is written is read, but for the spelling of names, which is settled once: then the rows and their fingerprint stay."""
    def fields(u):
        return {f: getattr(u, f) for f in Utterance.__dataclass_fields__ if f not in ("source", "audio_base_path")}
    write_manifest(rows, folder / "rows.jsonl")
    read = read_manifest(folder / "rows.jsonl")
    for u, v in zip(rows, read, strict=True):
        emotion = plain_name(u.emotion) if isinstance(u.emotion, str) else u.emotion
        assert fields(v) == fields(u) | dict(emotion=emotion, speaker=plain_name(u.speaker), corpus=plain_name(u.corpus))
        assert type(v.emotion) is type(emotion) and v.text == (u.words and " ".join(u.words))
    write_manifest(read, folder / "again.jsonl")
    assert read_manifest(folder / "again.jsonl") == [SimpleUtterance(u, str(folder / "again.jsonl")) for u in read]
    assert rows_digest(read_manifest(folder / "again.jsonl")) == rows_digest(read)


def SimpleUtterance(u, path):
    """The same row of another file."""
    return Utterance(**{f: getattr(u, f) for f in Utterance.__dataclass_fields__ if f not in ("source", "audio_base_path")}, source=path + u.source[u.source.rindex(":"):])


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=6)
FIELD = st.sampled_from(["words", "prosody_annotations", "emotion", "speaker", "id", "start", "end", "onset", "offset", "word_times", "duration", "text", "label", "other"])


@tried(200)
@given(more=st.dictionaries(FIELD, JSON, max_size=4))
def test_any_row_is_read_or_refused_by_name(folder, more):
    """Whatever JSON a row holds, it is a sound utterance, or a ManifestError that names file and line: never another exception."""
    (folder / "any.jsonl").write_text(json.dumps({"audio_filepath": "a.wav"}) + "\n" + json.dumps({"audio_filepath": "b.wav"} | more) + "\n", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            u = read_manifest(folder / "any.jsonl")[1]
        except ManifestError as e:
            assert "any.jsonl:2: " in str(e)
            return
    assert u.words is None or (u.words and all(clean(w) for w in u.words))
    assert u.prosody_annotations is None or (len(u.prosody_annotations) == len(u.words) and set(u.prosody_annotations) <= {0, 1})
    assert u.emotion is None or (type(u.emotion) is str and u.emotion) or 0 <= u.emotion <= 999
    assert (u.start or 0) < (math.inf if u.end is None else u.end) and (u.start or 0) >= 0
    write_manifest([u], folder / "again.jsonl")
    json.loads((folder / "again.jsonl").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert rows_digest(read_manifest(folder / "again.jsonl")) == rows_digest([u])


# ---------------------------------------------------------------------------------------------------------------- names

@tried(300)
@given(x=TEXT | st.floats() | st.integers() | st.none())
@example("ΐ").via("its capital has three characters")
@example("ẞ ß").via("a capital, and a letter that has none of its own")
@example("é\u2003 e\u0301")
def test_names_have_one_form(x):
    name = plain_name(x)
    assert plain_name(name) == name and name != "" and (name is None or name == " ".join(unicodedata.normalize("NFC", name).split()))
    key = name_key(x)
    assert (key is None) == (name is None) and name_key(key) == key == name_key(name)
    for form in ("NFC", "NFD"):
        assert isinstance(x, str) is False or name_key(unicodedata.normalize(form, x)) == key


LETTERS = "abczABCZ ɛɔŋƐƆŊéÉüßẞñøæÆΐΰϊίαΩςσΣбЁёŉǰẖ\u0301\u0308"


@tried(300)
@given(x=st.text(LETTERS, max_size=6))
@example("Ταΐζω")
def test_names_have_one_key_in_any_case(x):
    for case in (str.lower, str.upper, str.casefold, str.swapcase):
        assert name_key(case(x)) == name_key(x), case
        assert name_key(unicodedata.normalize("NFD", case(x))) == name_key(x), case


@tried(200)
@given(parts=st.lists(st.sampled_from(["a", "é", "e\u0301", ".", "b.wav"]), min_size=1, max_size=5))
def test_paths_have_one_key(parts):
    path = "/".join(parts)
    assert path_key(path_key(path)) == path_key(path) == path_key("./" + path) == path_key(unicodedata.normalize("NFD", path.replace("/", "//")))


@tried(200)
@given(x=TEXT)
def test_clean_text_stays(x):
    assert clean(clean(x)) == clean(x) and not {"▁", "⁇", "\u200b"} & set(clean(x))


# ----------------------------------------------------------------------------------------------------------------- JSON

@tried(300)
@given(content=JSON)
def test_json_is_what_every_reader_takes(folder, content):
    """NaN and infinities become null and all else comes back."""
    def without(x):
        if isinstance(x, dict):
            return {k: without(v) for k, v in x.items()}
        if isinstance(x, list):
            return [without(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    for layout in ({}, dict(indent=2), dict(ensure_ascii=False)):
        assert json.loads(to_json(content, **layout), parse_constant=pytest.fail) == without(content)
    write_json(folder / "x.json", content)
    assert json.loads((folder / "x.json").read_text(encoding="utf-8"), parse_constant=pytest.fail) == without(content)
    write_predictions(folder / "p.jsonl", [dict(id="a", more=content), dict(id="b")])
    assert read_predictions(folder / "p.jsonl") == [dict(id="a", more=without(content)), dict(id="b")]


# ------------------------------------------------------------------------------------------------------------ tokenizer

KNOWN, UNKNOWN = "abklnpdus</>ɛɔé\u0301'1", "zŋ漢😀"


@pytest.fixture(scope="module", params=["char", "bpe", "unigram"])
def tokenizer(request, folder):
    """A model of every kind that has seen the letters KNOWN."""
    rng = np.random.default_rng(0)
    text = ["".join(rng.choice([*KNOWN, " ", " "], 30)) for _ in range(300)] + [" ".join(KNOWN)] * 9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SentencePieceTokenizer(60, folder / request.param, model_type=request.param, character_coverage=1).train_tokenizer(text)


TOKEN_WORD = st.text([*KNOWN, *UNKNOWN, " ", "▁", "⁇", "\u200b", "\n"], min_size=1, max_size=7) | st.sampled_from(["<pad>", "<blank>", "<unk>", "<s>", "</s>", "▁a"])


@tried(150)
@given(words=st.lists(TOKEN_WORD.filter(clean), max_size=5))
def test_tokens_spell_the_words(tokenizer, words):
    """Decoding gives the words back where all letters are known; the words with other letters are counted as unknown."""
    ids, owner = tokenizer.encode_words(words)
    parts = [[i for i, o in zip(ids, owner, strict=True) if o == n] for n in range(len(words))]
    wanted, letters = [clean(w) for w in words], set(KNOWN)
    assert owner == sorted(owner) and set(owner) == set(range(len(words))) and sum(parts, []) == ids
    assert not {tokenizer.blank_id, tokenizer.pad_id} & set(ids) and all(0 <= i < len(tokenizer) for i in ids)
    known = [set(w) <= letters | {" "} for w in wanted]
    assert [tokenizer.decode(p) == w for p, w in zip(parts, wanted, strict=True)] == known == [tokenizer.can_write(w) for w in words]
    assert [tokenizer.unk_id in p for p in parts] == [not k for k in known]
    if all(known):
        assert tokenizer.decode(ids) == " ".join(wanted)
    assert tokenizer.unknown_words([Utterance("a.wav", words or None)])[0] == (known.count(False) / len(words) if words else 0)
    noise = [x for i in ids for x in (tokenizer.blank_id, i, tokenizer.pad_id)]
    assert tokenizer.decode(noise) == tokenizer.decode(ids)


# -------------------------------------------------------------------------------------------------------------- batches

@st.composite
def samples(draw, i):
    """A row of a data set."""
    words = draw(st.none() | st.lists(st.text(KNOWN, min_size=1, max_size=4), min_size=1, max_size=4))
    marks = None if words is None else draw(st.none() | st.lists(st.integers(0, 1), min_size=len(words), max_size=len(words)))
    audio = draw(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=9))
    return dict(audio=np.array(audio, np.float32), words=words, prosody=marks, emotion=draw(st.sampled_from([-100, 0, 3])), row=i)


@tried(60)
@given(rows=st.integers(1, 5).flatmap(lambda n: st.tuples(*map(samples, range(n)))), data=st.data(), spells=st.booleans())
def test_collation(tokenizer, rows, data, spells):
    """Each row is in the batch as it is alone, padded behind, wherever it stands."""
    collate, order = Collator(tokenizer if spells else None), data.draw(st.permutations(range(len(rows))))
    batch = collate(list(rows))
    for n, r in enumerate(rows):
        words = r["words"] or []
        ids, owner = tokenizer.encode_words(words) if spells else ([], [])
        for key, value, pad in (("audio", r["audio"].tolist(), 0.0), ("targets", ids, -100), ("token_word", owner, -100), ("prosody", r["prosody"] or [], -100)):
            assert batch[key][n].tolist() == value + [pad] * (batch[key].shape[1] - len(value)), key
        assert [batch[k][n].item() for k in ("audio_lengths", "target_lengths", "word_counts", "emotion", "row")] == [len(r["audio"]), len(ids), len(words), r["emotion"], r["row"]]
    assert batch["audio"].shape[1] == batch["audio_lengths"].max() and batch["targets"].shape[1] == batch["target_lengths"].max()
    assert batch["prosody"].shape[1] == max(1, batch["word_counts"].max())
    other = collate([rows[i] for i in order])
    assert batch.keys() == other.keys() and all(torch.equal(other[k], batch[k][list(order)]) for k in batch)


LENGTHS = st.lists(st.floats(0.01, 60) | st.sampled_from([1.0, 2.0, 600.0]), min_size=1, max_size=40)


@tried(250)
@given(seconds=LENGTHS, size=st.integers(1, 9), limit=st.none() | st.floats(0.5, 100), by_length=st.booleans(), world=st.integers(1, 4), epoch=st.integers(0, 2), data=st.data())
def test_batches_hold_every_row_once(seconds, size, limit, by_length, world, epoch, data):
    """Also at several processes: they take equally many steps and share rows only where there are fewer batches of one row than processes."""
    times = data.draw(st.none() | st.lists(st.integers(1, 3), min_size=len(seconds), max_size=len(seconds)))
    samplers = [DurationBatchSampler(seconds, size, limit, by_length, 3, lambda: epoch, world, rank, times) for rank in range(world)]
    made = [list(s) for s in samplers]
    assert made == [list(s) for s in samplers]                                                  # by seed and epoch alone
    batches = sum(made, [])
    assert {len(m) for m in made} == {len(samplers[0])} and {len(s) for s in samplers} == {len(made[0])}
    wanted, found = Counter(dict(enumerate(times or [1] * len(seconds)))), Counter(i for b in batches for i in b)
    assert found >= wanted and found.total() - wanted.total() < world
    assert found == wanted or all(len(b) == 1 for b in batches)
    for b in batches:
        assert 1 <= len(b) <= size and (limit is None or len(b) == 1 or len(b) * max(seconds[i] for i in b) <= limit * (1 + 1e-9))
    if epoch == 0:
        assert max(seconds) in [seconds[i] for m in made for i in m[0]]                         # memory is tried at the first step


@tried(200)
@given(seconds=LENGTHS, size=st.integers(1, 9), world=st.integers(1, 4), budget=st.floats(0.5, 60))
def test_batches_for_evaluation(seconds, size, world, budget):
    """Every row is seen, in equally many batches of equal sizes on each process."""
    made = [batches_by_length(seconds, size, world, rank, budget) for rank in range(world)]
    assert {i for m in made for b in m for i in b} == set(range(len(seconds)))
    assert all(len({len(b) for b in step}) == 1 for step in zip(*made, strict=True))
    assert world > 1 or sorted(sum(made[0], [])) == list(range(len(seconds)))
    for b in sum(made, []):
        assert 1 <= len(b) <= size and (len(b) == 1 or len(b) * max(seconds[i] for i in b) <= size * budget * (1 + 1e-9))


# ------------------------------------------------------------------------------------------------------------------ CTC

@st.composite
def ctc_batches(draw, most=7, tokens=4, V=5, rows=3, least=0):
    """Lengths and targets of a few rows, feasible or not, and a seed for the scores."""
    B, T, L = draw(st.integers(1, rows)), draw(st.integers(max(1, least), most)), draw(st.integers(0, tokens))
    frames = draw(st.lists(st.integers(least, T), min_size=B, max_size=B))
    lengths = draw(st.lists(st.integers(0, L), min_size=B, max_size=B))
    targets = [draw(st.lists(st.integers(1, V - 1), min_size=n, max_size=n)) + [-100] * (L - n) for n in lengths]
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    hidden, weight, bias = (torch.randn(*shape, generator=g, dtype=torch.double) for shape in ((B, T, 3), (V, 3), (V,)))
    targets = torch.tensor(targets, dtype=torch.long).reshape(B, L)
    return SimpleNamespace(hidden=hidden, weight=2 * weight, bias=bias, labels=(torch.tensor(frames), targets, torch.tensor(lengths)))


def feasible_path(frames, target):
    """Whether a path exists, from its definition."""
    return frames >= len(target) + sum(a == b for a, b in itertools.pairwise(target))


def one_by_one(logits, frames, targets, lengths):
    """torch's loss of each row alone, in float64; 0 where no path exists."""
    losses = []
    for z, t, y, n in zip(logits, frames.tolist(), targets, lengths.tolist(), strict=True):
        fits = t > 0 and feasible_path(t, y[:n].tolist())
        losses.append(F.ctc_loss(z[:t, None].log_softmax(-1), y[None, :n], [t], [n], BLANK, "none")[0] if fits else z.sum() * 0)
    return torch.stack(losses)


@tried(150)
@given(case=ctc_batches(), long=st.booleans(), chunk=st.integers(1, 9))
def test_lean_ctc_is_ctc(case, long, chunk):
    """Loss and gradients are those of torch's loss on the whole logits, with rows that have no path, no token or no frame."""
    frames, targets, lengths = case.labels
    assert infeasible(*case.labels).tolist() == [not feasible_path(t, y[:n].tolist()) for t, y, n in zip(frames.tolist(), targets, lengths.tolist(), strict=True)]
    plain = dict(reduction="sum", entropy_weight=0.0, blank_penalty=0.0, label_smoothing=0.0, confidence_penalty=0.0)
    head = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = regularised_ctc(*head, *case.labels, blank=BLANK, chunk=chunk, cells=0 if long else 2**23, **plain)["loss"]
    naive = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    wanted = one_by_one(F.linear(*naive), *case.labels).sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(torch.autograd.grad(loss, head), torch.autograd.grad(wanted, naive), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------ alignment

def collapse(path):
    """What a path of tokens says."""
    return tuple(token for token, _ in itertools.groupby(path) if token != BLANK)


def spelled(spans, target, T):
    """The path that the spans of tokens describe."""
    path = [BLANK] * T
    for (first, last), token in zip(spans, target, strict=True):
        path[first:last] = [token] * (last - first)
    return tuple(path)


@tried(60)
@given(case=ctc_batches(most=5, tokens=3, V=4, rows=2), cells=st.sampled_from([1, 2**22]), lean=st.booleans())
def test_alignment_is_the_best_path(case, cells, lean):
    """No path of those that say the transcript is better; spans are in order, within the utterance, one for each token."""
    head = case.hidden, case.weight, case.bias
    logits = F.linear(*head)
    frames, targets, lengths = case.labels
    found = align_logits(HeadLogits(*head) if lean else logits, *case.labels, BLANK, cells).tolist()
    for z, t, y, n, spans in zip(logits.tolist(), frames.tolist(), targets.tolist(), lengths.tolist(), found, strict=True):
        assert spans[n:] == [[-1, -1]] * (len(spans) - n)
        scores = {p: sum(z[i][v] for i, v in enumerate(p)) for p in itertools.product(range(4), repeat=t) if collapse(p) == tuple(y[:n])}
        if not scores or not n:
            assert spans == [[-1, -1]] * len(spans)
            continue
        ends = [x for span in spans[:n] for x in span]
        assert ends == sorted(ends) and 0 <= ends[0] and ends[-1] <= t and all(a < b for a, b in spans[:n])
        path = spelled(spans[:n], y[:n], t)
        assert collapse(path) == tuple(y[:n]) and scores[path] == pytest.approx(max(scores.values()), abs=1e-9)


@tried(150)
@given(case=ctc_batches(most=12, tokens=6, least=1), data=st.data())
def test_words_have_frames(case, data):
    """Every word of every row has frames of its own utterance, in order; those that CTC places fill it without a gap."""
    frames, targets, lengths = case.labels
    owner = torch.full_like(targets, -100)
    counts = []
    for n, size in enumerate(lengths.tolist()):                                      # words of one token or more, in order
        begins = [0] + data.draw(st.lists(st.integers(0, 1), min_size=max(0, size - 1), max_size=max(0, size - 1)))
        owner[n, :size] = torch.tensor(begins).cumsum(0)[:size]
        counts.append(1 + sum(begins) if size else 0)
    counts = torch.tensor(counts)
    spans, aligned, _ = align_words(F.linear(case.hidden, case.weight, case.bias), *case.labels, owner, counts, BLANK)
    even = uniform_spans(frames, counts, spans.shape[1])
    for n, (t, w) in enumerate(zip(frames.tolist(), counts.tolist(), strict=True)):
        row = spans[n].tolist()
        assert row[w:] == [[-1, -1]] * (len(row) - w)
        assert all(0 <= a < b <= t for a, b in row[:w]) and row[:w] == sorted(row[:w])
        if w and aligned[n]:
            assert row[0][0] == 0 and row[w - 1][1] == t and all(x[1] == y[0] for x, y in itertools.pairwise(row[:w]))
        else:
            assert row == even[n].tolist() and (not w or not feasible_path(t, targets[n, :lengths[n]].tolist()))


# ------------------------------------------------------------------------------------------------------------- decoding

def log_probability(logits, sentence):
    """Of all paths (T, V) that say a sentence."""
    T = len(logits)
    if not feasible_path(T, sentence):
        return -math.inf
    if not T:
        return 0.0
    return -F.ctc_loss(logits[:, None].log_softmax(-1), torch.tensor([sentence], dtype=torch.long).reshape(1, -1), [T], [len(sentence)], BLANK, "none").item()


@tried(80)
@given(case=ctc_batches(most=6), lean=st.booleans())
def test_greedy_is_the_best_path_collapsed_and_beam_is_no_worse(case, lean):
    frames, head = case.labels[0], (case.hidden, case.weight, case.bias)
    logits = F.linear(*head)
    scores = HeadLogits(*head) if lean else logits
    greedy = greedy_decode(scores, frames, BLANK)
    assert greedy == [list(collapse(z[:t].argmax(-1).tolist())) for z, t in zip(logits, frames.tolist(), strict=True)]
    beam = beam_decode(scores, frames, BLANK, beam=200, top_k=5, blank_skip=None)
    for z, t, one, other in zip(logits, frames.tolist(), beam, greedy, strict=True):
        assert log_probability(z[:t], one) >= log_probability(z[:t], other) - 1e-9


@tried(40)
@given(case=ctc_batches(most=4, V=4, rows=2))
def test_beam_is_the_sum_over_all_paths(case):
    """A beam that holds all sentences finds the one whose paths sum to most."""
    frames, logits = case.labels[0], F.linear(case.hidden, case.weight, case.bias)
    found = beam_decode(logits, frames, BLANK, beam=300, top_k=4, blank_skip=None)
    for z, t, sentence in zip(logits.log_softmax(-1).tolist(), frames.tolist(), found, strict=True):
        sums = Counter()
        for path in itertools.product(range(4), repeat=t):
            sums[collapse(path)] += math.exp(sum(z[i][v] for i, v in enumerate(path)))
        assert sums[tuple(sentence)] == pytest.approx(max(sums.values()), rel=1e-9) and sum(sums.values()) == pytest.approx(1)


# -------------------------------------------------------------------------------------------------------------- metrics

EMOTIONS = "anger", "joy", "fear"


@st.composite
def records(draw, i):
    """A prediction, with labels or without."""
    words = draw(st.lists(st.sampled_from("a b bb Ab. é".split()), max_size=4))
    n = len(words)
    p = np.array(draw(st.tuples(*[st.floats(0.01, 1)] * 3)))
    p = dict(zip(EMOTIONS, (p / p.sum()).round(5).tolist(), strict=True))
    return dict(id=f"u{i}", audio_filepath=f"{i}.wav", speaker=None, group=draw(st.sampled_from([None, "one", "two", "three"])), emotion=draw(st.sampled_from([None, *EMOTIONS])),
                predicted_emotion=max(p, key=p.get), probabilities=p, text=" ".join(words) or None, words=words, hypothesis=" ".join(draw(st.lists(st.sampled_from("a b bb ⁇".split()), max_size=5))),
                prosody_annotations=draw(st.none() | st.lists(st.integers(0, 1), min_size=n, max_size=n)) if n else None,
                prominence=draw(st.lists(st.floats(0, 1) | st.just(0.5), min_size=n, max_size=n)), blank_rate=0.5, tokens=3, reference_tokens=3, feasible=True)


ROWS = st.integers(1, 8).flatmap(lambda n: st.tuples(*map(records, range(n))))
IN_ONE = {f"{k}{end}" for k in ("ser/wa", "ser/ua", "ser/macro_f1", "ser/weighted_f1", "ser/ece", "ser/aurc", "prosody/f1", "prosody/precision", "prosody/recall", "prosody/accuracy", "prosody/roc_auc")
          for end in ("", "_floor", "_low", "_high")} | {"asr/empty_rate", "asr/blank_rate", "asr/deletions", "asr/substitutions"}


@tried(70)
@given(rows=ROWS, data=st.data())
def test_metrics_are_those_of_known_libraries(rows, data):
    """WER of jiwer, UA and F1 of scikit-learn; bounds, floors, and no word about the order of rows."""
    m = score(rows)
    assert all(0 <= m[k] <= 1 for k in m if k in IN_ONE) and all(math.isfinite(v) and v >= 0 for v in m.values())
    shuffled = score(data.draw(st.permutations(rows)))
    assert shuffled.keys() == m.keys() and shuffled == pytest.approx(m, abs=1e-9)
    emotion = [(r["emotion"], r["predicted_emotion"]) for r in rows if r["emotion"]]
    assert ("ser/ua" in m) == bool(emotion)
    if emotion:
        true, said = zip(*emotion, strict=True)
        options = dict(labels=sorted(set(true)), zero_division=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = {"ser/ua": balanced_accuracy_score(true, said), "ser/wa": np.mean(np.array(true) == said), "ser/macro_f1": f1_score(true, said, average="macro", **options),
                      "ser/weighted_f1": f1_score(true, said, average="weighted", **options), "ser/n": len(true), "ser/ua_floor": 1 / len(set(true)), "ser/wa_floor": max(Counter(true).values()) / len(true)}
        assert {k: m[k] for k in wanted} == pytest.approx(wanted)
    spoken = [(r["text"], r["hypothesis"]) for r in rows if r["text"]]
    assert ("asr/wer" in m) == bool(spoken)
    if spoken:
        true, said = map(list, zip(*spoken, strict=True))
        assert m["asr/wer"] == pytest.approx(jiwer.wer(true, said)) and m["asr/cer"] == pytest.approx(jiwer.cer(true, said)) and m["asr/n"] == len(true)
        assert m["asr/substitutions"] + m["asr/deletions"] + m["asr/insertions"] == pytest.approx(m["asr/wer"])
    marks = [x for r in rows for x in r["prosody_annotations"] or ()]
    assert ("prosody/f1" in m) == bool(marks)
    if marks:
        said = [p > 0.5 for r in rows if r["prosody_annotations"] for p in r["prominence"]]
        wanted = {f"prosody/{n}": f(marks, said, zero_division=0) for n, f in dict(f1=f1_score, precision=precision_score, recall=recall_score).items()}
        assert {k: m[k] for k in wanted} == pytest.approx(wanted) and m["prosody/n"] == len(marks)


@tried(40)
@given(rows=ROWS, seed=st.integers(0, 9))
def test_intervals_are_within_bounds(rows, seed):
    """No end of an interval is outside of what the score can be, and each interval has two ends in order, for scores that are there."""
    assume(any(r["emotion"] or r["text"] for r in rows))
    ends, drawn = intervals(rows, 30, seed)
    m = score(rows)
    assert {k.rsplit("_", 1)[0] for k in ends} <= m.keys() and set(drawn) == {k.split("/")[0] for k in m}
    for k in {k.rsplit("_", 1)[0] for k in ends}:
        low, high = ends[f"{k}_low"], ends[f"{k}_high"]
        assert 0 <= low <= high and (high <= 1 or k not in IN_ONE), k
    assert intervals(rows, 30, seed)[0] == ends
