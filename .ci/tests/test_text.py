"""Text from anywhere: encodings, JSON of any form, special pieces, unknown words, words that were never said."""
import io
import json
import unicodedata
import warnings

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import SHARED, needs, read, write

from prosody_ser.audit import audit_manifests, fix_manifest
from prosody_ser.config import TrainConfig
from prosody_ser.data import ManifestError, clean, read_manifest, read_rows, read_sentences, rows_digest
from prosody_ser.decoding import LMError, WordLM, train_lm
from prosody_ser.evaluate import evaluate_model
from prosody_ser.evaluation import asr_metrics, edit_counts, read_predictions, score, write_predictions
from prosody_ser.inference import Predictor
from prosody_ser.model import Collator, create_model, load_checkpoint
from prosody_ser.tokenizer import SentencePieceTokenizer, TokenizerError
from prosody_ser.train import prepare_training

AKAN = SHARED / "data" / "akan"
ROWS = [dict(audio_filepath=f"{i}.wav", words=words, emotion="joy") for i, words in enumerate((["kɔ", "fie"], ["bra"], ["me", "kɔ"]))]
TEXT = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)
FORMS = {"lines": TEXT, "windows": TEXT.replace("\n", "\r\n"), "array": json.dumps(ROWS), "array, a row a line": "[" + TEXT.strip().replace("\n", ",\n") + "]",
         "pretty": json.dumps(ROWS, indent=2), "pretty objects": "\n".join(json.dumps(r, indent=1) for r in ROWS), "blank before": "\n \n" + TEXT}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_one_manifest_in_any_form(tmp_path, form, encoding):
    """The rows are the same, whatever the encoding, the form of the JSON and the name of the file; so are sentences and the fixed copy."""
    file = tmp_path / "rows.txt"
    file.write_bytes(FORMS[form].encode(encoding))
    rows = read_manifest(file)
    assert [u.words for u in rows] == [r["words"] for r in ROWS] and len({u.source for u in rows}) == 3
    assert rows_digest(rows) == rows_digest(read_manifest(write(tmp_path / "plain.jsonl", ROWS)))
    assert read_sentences(file) == [r["words"] for r in ROWS]
    assert fix_manifest(file, tmp_path / "fixed.jsonl") == {} and read(tmp_path / "fixed.jsonl") == ROWS


def test_what_is_no_manifest(tmp_path):
    """The message names file, line and cure, for training and for the audit."""
    bad = {"cut off": ("[" + TEXT.strip().replace("\n", ",\n") + ",", "rows.json:3: the array has no end"),
           "latin": (TEXT.replace("ɔ", "é").encode("latin-1"), "rows.json:1: not UTF-8 (byte 0xE9, 'é' in Latin-1"),
           "gzip": (b"\x1f\x8b\x08\0", "rows.json: this is a gzip file, not text. Unpack it"),
           "binary": (b"\0\0\1\2\3" * 9, "rows.json: this is a binary file"), "utf-16 without mark": (TEXT.encode("utf-16-le"), "UTF-16 without a byte-order mark"),
           "csv": ("audio_filepath,words\na.wav,bra\n", "rows.json:1: not JSON"), "object of columns": ('{"audio_filepath": {"0": "a"}}', "rows.json:1: audio_filepath is missing"),
           "half a pair": (TEXT.replace("fie", "f\\ud83de"), "rows.json:1: words holds half a surrogate pair, '\\ud83d'"),
           "half a pair, lower": (TEXT.replace('"joy"', '"\\uDE00"'), "rows.json:1: emotion holds half a surrogate pair, '\\ude00'"),
           "nothing to see": (TEXT.replace('"bra"', '"\\u200b\\ufeff"'), "rows.json:2: words must be a list of non-empty strings")}
    for name, (data, said) in bad.items():
        (tmp_path / "rows.json").write_bytes(data if isinstance(data, bytes) else data.encode())
        with pytest.raises(ManifestError) as e:
            read_manifest(tmp_path / "rows.json")
        assert said in str(e.value), name
        found = audit_manifests([tmp_path / "rows.json"])[1]
        assert [f.severity for f in found][0] == "error" and said in found[0].examples[0] + ": ", name
    (tmp_path / "rows.json").write_text(TEXT.replace("fie", "\\ud83d\\ude00"), encoding="utf-8")        # a whole pair is a character
    assert read_manifest(tmp_path / "rows.json")[0].words == ["kɔ", "😀"]
    text = json.dumps(ROWS, indent=1).replace('"0.wav"', '"0.wav", oops')                                    # the others are read
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    rows, problems = read_rows(tmp_path / "rows.json")
    assert [u.audio_filepath for u in rows] == ["1.wav", "2.wav"] and [p.source[-2:] for p in problems] == [":2"]


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.json", "text"])
def test_lm_and_tokenizer_learn_words_alone(tmp_path, command, name):
    """From a manifest of any form and name, or from text, the same model and the same pieces: never JSON, marks or invisible letters."""
    plain, models = "\n".join(" ".join(r["words"]) for r in ROWS) + "\n", []
    odd = plain.replace("kɔ fie", "k\u200bɔ\u2028fie\x85").replace("bra", "\x0bbra\u00ad")
    for data in (plain, "\ufeff" + plain.replace("\n", "\r\n"), plain.encode("utf-16"), odd, *FORMS.values()):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        for argv in (["lm", tmp_path / name, "--lm_path", tmp_path / "m.arpa", "--order", 2],
                     ["tokenizer", tmp_path / name, "--tokenizer_path", tmp_path / "m.model", "--model_type", "char", "--vocab_size", 30]):
            assert command(*argv)[0] == 0
        models.append(((tmp_path / "m.arpa").read_text(encoding="utf-8"), (tmp_path / "m.model").read_bytes()))
    assert models == models[:1] * len(models)
    assert "\tkɔ fie" in models[0][0] and "audio" not in models[0][0] and "\ufeff" not in models[0][0]
    for data, said in {"bra café".encode("latin-1"): f"{name}:1: not UTF-8", b"\0\0\xff" * 9: "binary file", b'["bra", "fie"]': "must be a JSON object"}.items():
        (tmp_path / name).write_bytes(data)
        for argv in (["lm", tmp_path / name, "--lm_path", tmp_path / "m.arpa"], ["tokenizer", tmp_path / name, "--tokenizer_path", tmp_path / "m.model"]):
            code, printed = command(*argv)
            assert code == 1 and said in printed and "Traceback" not in printed


def test_predictions_in_any_encoding(tmp_path):
    """Separators of lines inside a word end no record; files saved again on Windows are read; others are refused with their line."""
    record = dict(id="a", emotion=None, text="a\u2028b\x85c", hypothesis="a b c", blank_rate=.5, tokens=1, reference_tokens=1, feasible=True)
    write_predictions(tmp_path / "p.jsonl", [record] * 2)
    text = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "p.jsonl").write_bytes(text.replace("\n", "\r\n").encode(encoding))
        assert read_predictions(tmp_path / "p.jsonl") == [record] * 2
    assert score([record])["asr/wer"] == 0
    for data, said in {b"\xe9": "p.jsonl:1: not UTF-8", text.encode() + b"oops": "p.jsonl:3: not JSON", TEXT.encode(): "p.jsonl:1: no prediction"}.items():
        (tmp_path / "p.jsonl").write_bytes(data)
        with pytest.raises(ManifestError, match=said):
            read_predictions(tmp_path / "p.jsonl")


def test_an_unknown_letter_is_an_error():
    """⁇ is right in no error rate, and a transcript's own ⁇ is not the decoder's."""
    def rates(text, hypothesis):
        record = dict(id="a", emotion=None, text=text, hypothesis=hypothesis, blank_rate=.5, tokens=1, reference_tokens=1, feasible=True)
        return [score([record])[f"asr/{k}"] for k in ("wer", "wer_normalised", "cer", "cer_normalised")]

    assert rates("me kɔ fie", "me k⁇ fie") == pytest.approx([1 / 3, 1 / 3, 1 / 9, 1 / 9])
    assert rates("me fie", "me ⁇ fie") == pytest.approx([1 / 2, 1 / 2, 2 / 6, 2 / 6])
    assert rates("fie", "fie⁇") == pytest.approx([1, 1, 1 / 3, 1 / 3])
    assert rates("fie⁇", "fie⁇") == pytest.approx([1, 1, 2 / 5, 1 / 3])               # raw: fie??; normalised: fie
    assert rates("me kɔ", "me kɔ") == rates("\ufeffme\u00a0kɔ\u200b\n", "me kɔ") == [0] * 4


def user_defined(**options):
    """A model as the project's first scripts made it: its special pieces are user-defined symbols."""
    made, letters = io.BytesIO(), "<>|/lnkupdsbrafieme"
    settings = dict(vocab_size=60, hard_vocab_limit=False, model_type="char", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=3,
                    user_defined_symbols=["<pad>", "<blank>"])
    spm.SentencePieceTrainer.train(sentence_iterator=iter([*letters, "bra fie", "me kɔ"]), model_writer=made, **settings | options)
    return SentencePieceTokenizer.from_bytes(made.getvalue())


def ours(folder, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = ["bra fie", "me kɔ", "<blank> bra", "a<s>b </s> <unk>", "<pad>", "< > / | l n k u p d s"] * 3
        return SentencePieceTokenizer(60, folder / kind, model_type=kind).train_tokenizer(text)


def test_special_pieces_are_text(tmp_path):
    """No transcript yields CTC's blank or another special id, for any kind of tokenizer; a decoder's are left out."""
    tokenizers = [ours(tmp_path, kind) for kind in ("bpe", "unigram", "char")] + [user_defined(), user_defined(byte_fallback=True, vocab_size=400, model_type="bpe")]
    for tokenizer in tokenizers:
        special = {tokenizer.pad_id, tokenizer.blank_id, tokenizer.sp.bos_id(), tokenizer.sp.eos_id()}
        assert tokenizer.blank_id == tokenizer.sp.piece_to_id("<blank>") and len(special) == 4
        for word in ("<blank>", "bra<blank>fie", "<s>", "</s>", "<pad>", "<unk>", "<|HAPPY|>bra", "[laughter]", "▁", "a▁b"):
            assert special.isdisjoint(tokenizer.encode(word)), word
        assert tokenizer.decode([tokenizer.blank_id, *tokenizer.encode("bra"), tokenizer.pad_id, tokenizer.sp.eos_id()]) == "bra"
        rows = [dict(words=["<blank>", "bra"], prosody=None, emotion=-100, row=0, audio=np.zeros(400, np.float32))]
        assert special.isdisjoint(Collator(tokenizer)(rows)["targets"].flatten().tolist())
    assert user_defined().can_write("<s>") and not user_defined().can_write("<blank>")        # letters, and an unknown piece


@needs(AKAN)
def test_the_akan_tokenizer_is_what_it_was(tmp_path):
    """Its ids are SentencePiece's own for every word of the corpus without odd white space; the file that is saved is the file."""
    file = AKAN / "akan_mtl_tokenizer.model"
    tokenizer = SentencePieceTokenizer(model_path=file, vocab_size=16000).load_tokenizer()
    plain = spm.SentencePieceProcessor(model_file=str(file))
    words = {w for s in ("train", "val") for u in read_manifest(AKAN / f"{s}.jsonl") for w in u.words}
    assert (tokenizer.blank_id, tokenizer.pad_id, tokenizer.unk_id) == (4, 3, 0)
    assert all(tokenizer.encode(w) == plain.encode(w) for w in words if not any(map(str.isspace, w))) and len(words) > 6000
    assert all(tokenizer.encode(w) == plain.encode(" ".join(w.split())) for w in words)
    tokenizer.save(tmp_path / "copy.model")
    assert (tmp_path / "copy.model").read_bytes() == file.read_bytes()
    share, told = tokenizer.unknown_words(read_manifest(AKAN / "train.jsonl"), "train.jsonl")
    assert share == pytest.approx(.02, abs=.001) and "'because', 'just', 'car'" in told and "--character_coverage 1" in told


def config(corpus, folder, **more):
    files = {f"{s}_jsonl": str(corpus / f"{s}.jsonl") for s in ("train", "val", "test")}
    few = dict(backbone="tiny", vocab_size=30, num_epochs=1, num_workers=0, tokenizer_path=str(folder / "tok.model"), save_dir=str(folder / "run"))
    return TrainConfig(audio_base_path=str(corpus), **files | few | more)


def test_training_counts_unknown_words(corpus, tmp_path, capsys):
    """Most words unknown to tokenizer or language model, in any split: refused before training. Some: a line with an example and its place."""
    foreign = SentencePieceTokenizer(20, tmp_path / "foreign", model_type="char").train_tokenizer(["QOX ZƐ"])
    with pytest.raises(TokenizerError, match=r"train.jsonl: the tokenizer cannot write 28 of 28 words \(100.0 %\), such as 'bra'.*--retrain_tokenizer"):
        prepare_training(config(corpus, tmp_path, tokenizer_path=foreign.model_path))
    shouted = write(tmp_path / "test.jsonl", [r | dict(words=[w.upper() for w in r["words"]]) for r in read(corpus / "test.jsonl")])
    with pytest.raises(TokenizerError, match="test.jsonl: the tokenizer.*Spelled in lower case, 100 % would be known"):
        prepare_training(config(corpus, tmp_path, test_jsonl=str(shouted)))
    train_lm([["BRA", "HA"], ["ME", "KƆ", "FIE"]], tmp_path / "up.arpa", 2)
    with pytest.raises(LMError, match="up.arpa: 100 % of its words cannot be written by the tokenizer.*Spelled in lower case, 100 %"):
        prepare_training(config(corpus, tmp_path, lm_path=str(tmp_path / "up.arpa")))
    rows = read(corpus / "train.jsonl")
    rows[2]["words"][1] = "<blank>"
    capsys.readouterr()
    prepare_training(config(corpus, tmp_path, train_jsonl=str(write(tmp_path / "train.jsonl", rows))))
    told = capsys.readouterr().out
    assert "cannot write 1 of 28 words (3.6 %), such as '<blank>' (the first in" in told and "train.jsonl:3)" in told and "warning: tags: 1 of" in told


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that has learned nothing."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = SentencePieceTokenizer(30, folder / "tok", model_type="char").train_tokenizer(["me kɔ fie", "bra ha"] * 4)
    torch.manual_seed(0)
    create_model(["anger", "joy"], tokenizer).save_pretrained(folder / "best_model")
    return load_checkpoint(folder / "best_model")


def test_evaluation_counts_unknown_words(corpus, model, tmp_path):
    """A tokenizer that does not know the transcripts, or a language model in capitals, is told of or refused before decoding."""
    rows, options = read_manifest(corpus / "test.jsonl"), dict(device="cpu", num_workers=0)
    assert "unknown_words" not in evaluate_model(model, rows, corpus, decode_method="greedy", **options).settings
    for u in rows:
        u.words = [w.upper() for w in u.words]
    scores = evaluate_model(model, rows, corpus, tmp_path / "report", decode_method="greedy", **options)
    assert any(w.startswith("beware: the transcripts: the tokenizer cannot write 14 of 14 words") for w in scores.warnings)
    assert "cannot write 14 of 14" in (tmp_path / "report/report.html").read_text(encoding="utf-8")
    train_lm([["bra", "ha"], ["me", "kɔ", "fie"]], tmp_path / "lm.arpa", 2)
    with pytest.raises(LMError, match="lm.arpa: 100 % of the words of the transcripts are not in it.*Spelled in lower case, 100 %"):
        evaluate_model(model, rows, corpus, lm_path=str(tmp_path / "lm.arpa"), **options)


def test_language_model_files(tmp_path):
    """What packs a file is seen from its content, and spaces that KenLM takes for letters stay in words."""
    import gzip
    train_lm([["kɔ", "fie"], ["bra"]], tmp_path / "lm.arpa", 2)
    text = (tmp_path / "lm.arpa").read_text(encoding="utf-8")
    (tmp_path / "packed").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "plain.gz").write_text(text, encoding="utf-8")
    assert [set(WordLM(tmp_path / f, []).words) for f in ("packed", "plain.gz")] == [{"kɔ", "fie", "bra", "<s>", "</s>", "<unk>"}] * 2
    (tmp_path / "latin.arpa").write_bytes(text.replace("ɔ", "é").encode("latin-1"))
    with pytest.raises(LMError, match="latin.arpa: not UTF-8"):
        WordLM(tmp_path / "latin.arpa", [])
    with pytest.raises(LMError, match="sentence 2 .*<s>"):
        train_lm([["bra"], ["me", "<s>", "fie"]], tmp_path / "x.arpa")


def test_words_that_were_not_said(corpus, model, monkeypatch):
    """An alignment with what a clear CTC head wrote is one; with other words it has a low score and is none. Unknown words are told of."""
    predictor, tokenizer = Predictor(model, "cpu", "greedy"), model.processor.tokenizer
    monkeypatch.setattr(model, "asr_nats", torch.tensor(0.))
    heard, V = tokenizer.encode_words(["me", "kɔ", "fie"])[0], len(tokenizer)

    def clear(hidden):
        """Each token for a frame, a blank after it."""
        logits = torch.zeros(1, hidden.shape[1], V)
        path = torch.full((hidden.shape[1],), tokenizer.blank_id)
        path[:2 * len(heard):2] = torch.tensor(heard)
        logits[0, torch.arange(len(path)), path] = 8.
        from prosody_ser.decoding import HeadLogits
        return HeadLogits(logits, torch.eye(V), torch.zeros(V))

    monkeypatch.setattr(model, "token_logits", clear)
    said = {text: predictor(corpus / "test0.wav", words=text) for text in ("me kɔ fie", "me bra fie", "bra ha", "me kɔ", "fie kɔ me")}
    assert {text: p["aligned"] for text, p in said.items()} == {text: text == "me kɔ fie" for text in said}
    right, wrong = said["me kɔ fie"], said["me bra fie"]
    assert right["alignment_score"] == 0 and [w["score"] for w in right.words] == [0, 0, 0]
    assert wrong["alignment_score"] < -1.5 and min(wrong.words, key=lambda w: w["score"])["word"] in ("bra", "me")
    assert predictor(corpus / "test0.wav")["transcript"] == "me kɔ fie" and predictor(corpus / "test0.wav")["aligned"]
    assert json.loads(json.dumps(wrong)) == wrong
    with pytest.warns(UserWarning, match="1 of 2 words have letters without a piece, such as 'QUX'"):
        assert not predictor(corpus / "test0.wav", words=["QUX", "me"])["aligned"]


def test_clean_is_idempotent():
    """What is clean stays so, and nothing that can be seen is lost."""
    for text in ("\ufeff\u200bme\u2028kɔ\x85", "می\u200cخواهم", "a\u200db", "⁇▁", "<blank>", " a\tb "):
        assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD"), ("NFC", "NFC")])
def test_one_text_in_two_forms_of_unicode_has_no_errors(forms):
    """An accent that is written as one character or as two is the same text, in every rate; another letter is not."""
    said = "m\u00e9 k\u0254\u0301 fi\u00e9"
    reference, hypothesis = (unicodedata.normalize(form, said) for form in forms)
    found = asr_metrics([reference], [hypothesis])
    assert [found[f"asr/{k}"] for k in ("wer", "cer", "wer_normalised", "cer_normalised")] == [0, 0, 0, 0]
    assert edit_counts([reference], [hypothesis]).tolist() == [[0, 0, 0, 3]]
    assert edit_counts([""], [hypothesis]).tolist() == [[0, 0, 3, 0]]
    found = asr_metrics([reference], [hypothesis.replace("f", "b")])
    assert found["asr/wer"] == 1 / 3 and found["asr/cer"] == 1 / 10         # of the composed letters, in either form
    assert asr_metrics([reference], ["me k\u0254 fie"])["asr/wer"] == 1     # without the accents it is another text
