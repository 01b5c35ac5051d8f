"""The field's formats in and out: right rows, what is lost is said, bad input gets one sentence, nothing is written over."""
import json
import re
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import SHARED, needs, read, write

from prosody_ser.convert import convert
from prosody_ser.corpus import prepare
from prosody_ser.data import ManifestError, read_manifest
from prosody_ser.folder import FolderError
from prosody_ser.labels import is_soft, shares_of

DATA = SHARED / "data"


def hum(path, seconds=1.0, level=.1):
    """A short sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, level * np.sin(np.arange(int(16000 * seconds)) / 20), 16000)
    return path


def text(path, content):
    """A text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def refused(*args, **more):
    """What is said; and nothing is left of the attempt."""
    out = Path(args[1])
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises((ManifestError, ValueError)) as e:
        convert(*args, **more)
    assert (sorted(out.rglob("*")) if out.exists() else None) in (before, [])
    assert "\n" not in str(e.value)
    return str(e.value)


def rows(folder, name="all"):
    """The rows of a converted corpus, whose sound is there."""
    found = read_manifest(folder / f"{name}.jsonl")
    return {u.id or Path(u.audio_filepath).stem: u for u in found}


@pytest.fixture
def manifest(tmp_path):
    """Three rows with every label, one of them a part of a file."""
    hum(tmp_path / "c/a.wav", 1), hum(tmp_path / "c/b.wav", 2, .2), hum(tmp_path / "c/sub/a.wav", .5, .3)
    return write(tmp_path / "c/train.jsonl", [
        dict(audio_filepath="a.wav", words=["bra", "fie"], prosody_annotations=[0, 1], emotion="anger", speaker="ama", id="u1"),
        dict(audio_filepath="b.wav", words=["kɔ"], emotion="joy", speaker="kofi", id="u2", start=.5, end=1.25),
        dict(audio_filepath="sub/a.wav", speaker="kofi", id="u3", words=["ha", "me"], prosody_annotations=[1, 0])])


def same(a, b):
    """The labels of two rows."""
    for field in ("words", "prosody_annotations", "emotion", "speaker"):
        assert getattr(a, field) == getattr(b, field), field


@pytest.mark.parametrize("to", ["manifest", "nemo", "parquet", "audformat"])
def test_rows_with_audio_alone_come_back(tmp_path, to, capsys):
    """Without a label, words or speaker, whole or a part; nobody is called by the name of a folder, and that is said."""
    pytest.importorskip("audformat"), pytest.importorskip("pyarrow")
    given = [dict(emotion="anger", words=["a", "b"], prosody_annotations=[0, .5]), {}, dict(emotion={"anger": .5, "joy": .5}), dict(start=.25, end=.75), dict(words=["c"]), dict(speaker="ama")]
    rows = [dict(audio_filepath=f"audio/{i}.wav") | r for i, r in enumerate(given)]
    for r in rows:
        hum(tmp_path / "c" / r["audio_filepath"])
    convert(write(tmp_path / "c/train.jsonl", rows), tmp_path / "out", to)
    assert "no speaker in 5 of 6 utterances" in capsys.readouterr().out
    base = {"manifest": tmp_path / "c"}.get(to)
    convert(tmp_path / "out", tmp_path / "back", audio_base_path=base)
    back = read_manifest(tmp_path / "back/train.jsonl")
    assert [Path(u.audio_filepath).name[0] for u in back] == list("012345")
    for u, r in zip(back, given, strict=True):
        assert (u.words, u.prosody_annotations, u.emotion, u.speaker) == tuple(map(r.get, ("words", "prosody_annotations", "emotion", "speaker")))
    assert re.search(r"speakers or films +1\n", capsys.readouterr().out)           # ama; audio is nobody


def test_an_audformat_table_of_another_scheme_makes_no_rows(tmp_path):
    """A row of a table that has emotions is a row, labelled or not; one of a table that has none of ours is not."""
    audformat = pytest.importorskip("audformat")
    db = audformat.Database("x")
    db.schemes["emotion"], db.schemes["gain"] = audformat.Scheme("str"), audformat.Scheme("float")
    for name, scheme, files, values in (("emotions", "emotion", ["a.wav", "b.wav"], ["joy", None]), ("gains", "gain", ["a.wav", "c.wav"], [1., 2.])):
        db[name] = audformat.Table(audformat.filewise_index(files))
        db[name][scheme] = audformat.Column(scheme_id=scheme)
        db[name][scheme].set(values)
    for f in "abc":
        hum(tmp_path / f"db/{f}.wav")
    db.save(str(tmp_path / "db"), storage_format="csv")
    convert(tmp_path / "db", tmp_path / "out")
    assert [(u.audio_filepath, u.emotion) for u in read_manifest(tmp_path / "out/all.jsonl")] == [("a.wav", "joy"), ("b.wav", None)]


def test_an_audformat_column_without_a_scheme_cuts_nothing(tmp_path):
    """Segments of which only loudness is told make no rows, and do not take a file's label from it."""
    audformat = pytest.importorskip("audformat")
    db = audformat.Database("x")
    db.schemes["emotion"] = audformat.Scheme("str")
    db["emotions"] = audformat.Table(audformat.filewise_index(["a.wav", "b.wav"]))
    db["emotions"]["emotion"] = audformat.Column(scheme_id="emotion")
    db["emotions"]["emotion"].set(["joy", "fear"])
    db["vad"] = audformat.Table(audformat.segmented_index(["a.wav", "a.wav", "c.wav"], ["0s", "0.5s", "0s"], ["0.5s", "1s", "1s"]))
    db["vad"]["energy"] = audformat.Column()
    db["vad"]["energy"].set([.1, .2, .3])
    for f in "abc":
        hum(tmp_path / f"db/{f}.wav")
    db.save(str(tmp_path / "db"), storage_format="csv")
    convert(tmp_path / "db", tmp_path / "out")
    found = [(u.audio_filepath, u.start, u.emotion) for u in read_manifest(tmp_path / "out/all.jsonl")]
    assert found == [("a.wav", None, "joy"), ("b.wav", None, "fear")]


def test_a_table_gives_durations(tmp_path, capsys):
    """A duration after a start is its end, by any name; one that contradicts the end is told, one that is none refused."""
    hum(tmp_path / "t/a.wav", 30)
    table = text(tmp_path / "t/all.csv", "file,start,duration,label\na.wav,10.0,2.0,joy\na.wav,20,3,anger\n")
    convert(table, tmp_path / "o1")
    assert [(u.start, u.end) for u in read_manifest(tmp_path / "o1/all.jsonl")] == [(10.0, 12.0), (20, 23)]
    convert(text(table, "file,onset,offset,duration\na.wav,10.0,12.0,\na.wav,20,23,1\n"), tmp_path / "o2")
    assert [(u.start, u.end) for u in read_manifest(tmp_path / "o2/all.jsonl")] == [(10.0, 12.0), (20, 23)]
    told = capsys.readouterr().out
    assert f"    1 times that differ, of which the end counts: {table}:3: duration 1, but start and end are 3 s apart" in told
    text(table, "file,begin,duration\na.wav,10.0,two\n")
    assert f"{table}:2: duration 'two' is no length in seconds. Give a number" in refused(table, tmp_path / "o3")


def test_text_instead_of_words(tmp_path):
    """A manifest row may give text, as NeMo does."""
    u, = read_manifest(write(tmp_path / "m.jsonl", [dict(audio_filepath="a.wav", text="bra  fie", offset=1, duration=2.5)]))
    assert (u.words, u.start, u.end) == (["bra", "fie"], 1, 3.5)


def test_parquet_there_and_back(tmp_path, manifest, capsys):
    """Sound of whole files keeps its bytes, a part is cut out; two files of one name stay two; labels are the same."""
    pq = pytest.importorskip("pyarrow.parquet")
    made = convert(manifest, tmp_path / "p", "parquet")
    assert made["train"] == 3 and list(made["notes"].values()) == [1] and "cut out of longer files" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "p/data/train-00000-of-00001.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["audio"]["_type"] == "Audio" and features["emotion"]["names"] == ["anger", "joy"]
    made = convert(tmp_path / "p", tmp_path / "back")
    assert Path(made["audio_base_path"]) == tmp_path / "back" and made["train"] == 3
    old, new = rows(tmp_path / "c", "train"), rows(tmp_path / "back", "train")
    for name in ("u1", "u2", "u3"):
        same(old[name], new[name])
    assert (tmp_path / "back" / new["u3"].audio_filepath).read_bytes() == (tmp_path / "c/sub/a.wav").read_bytes()
    assert (tmp_path / "back" / new["u1"].audio_filepath).read_bytes() == (tmp_path / "c/a.wav").read_bytes()
    cut, rate = sf.read(tmp_path / "back" / new["u2"].audio_filepath)
    whole, _ = sf.read(tmp_path / "c/b.wav")
    assert np.abs(cut - whole[8000:20000]).max() < 1e-4 and rate == 16000


def test_datasets_reads_it(tmp_path, manifest):
    """With an Audio feature, the names of the emotions, and the sound."""
    datasets = pytest.importorskip("datasets")
    convert(manifest, tmp_path / "p", "parquet")
    found = datasets.load_dataset(str(tmp_path / "p"), cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(found.features["audio"], datasets.Audio) and found.features["emotion"].names == ["anger", "joy"]
    found = found.cast_column("audio", datasets.Audio(decode=False))
    assert [r["emotion"] for r in found] == [0, 1, None] and found[0]["prosody_annotations"] == [0, 1]
    assert found[0]["audio"]["bytes"] == (tmp_path / "c/a.wav").read_bytes()


def test_rows_without_a_split_on_the_hub(tmp_path, manifest):
    """All is a word of the Hub's own: such rows are train there, or unsplit beside a train."""
    datasets = pytest.importorskip("datasets")
    manifest.rename(tmp_path / "c/rest.jsonl")
    convert(tmp_path / "c/rest.jsonl", tmp_path / "p", "parquet")
    assert datasets.load_dataset(str(tmp_path / "p"), cache_dir=str(tmp_path / "cache"))["train"].num_rows == 3


def test_parquet_of_others(tmp_path):
    """A struct or bytes; ClassLabel without label; paths that would lead elsewhere; splits by file and folder."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sound = hum(tmp_path / "a.wav").read_bytes()
    (tmp_path / "hub/test").mkdir(parents=True)
    noted = dict(huggingface=json.dumps(dict(info=dict(features=dict(audio=dict(_type="Audio"), label=dict(names=["sad", "happy"], _type="ClassLabel"))))))
    cells = dict(audio=[dict(bytes=sound, path="../../evil.wav"), dict(bytes=sound, path=None)], label=[1, -1], sentence=["bra fie", "ha"], when=[date(2020, 1, 1)] * 2)
    pq.write_table(pa.table(cells).replace_schema_metadata(noted), tmp_path / "hub/validation-00000-of-00001.parquet")
    pq.write_table(pa.table(dict(audio=[sound], label=["sad"])), tmp_path / "hub/test/0000.parquet")
    made = convert(tmp_path / "hub/validation-00000-of-00001.parquet", tmp_path / "out/in", columns="words=sentence")
    assert made["val"] == 2 and {"left out: columns that mean nothing here (--columns OURS=THEIRS)": 1} == made["notes"]
    first, second = read_manifest(tmp_path / "out/in/val.jsonl")
    assert (first.emotion, first.words, first.audio_filepath, second.emotion) == ("happy", ["bra", "fie"], "audio/evil.wav", None)
    assert not list(tmp_path.glob("evil*")) and not list((tmp_path / "out").glob("evil*"))
    assert convert(tmp_path / "hub", tmp_path / "both")["test"] == 1
    pq.write_table(pa.table(dict(text=["bra"])), tmp_path / "none.parquet")
    assert "none.parquet: no column holds audio or names it; there are text. Say which" in refused(tmp_path / "none.parquet", tmp_path / "x")
    pq.write_table(pa.table(dict(audio=[dict(bytes=sound, path="a"), dict(bytes=None, path=None)])), tmp_path / "hole.parquet")
    assert "hole.parquet:2: the row has neither sound nor the path" in refused(tmp_path / "hole.parquet", tmp_path / "x")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "none.parquet").read_bytes()[:50])
    assert "cut.parquet: no Parquet table can be read" in refused(tmp_path / "cut.parquet", tmp_path / "x")


def test_nemo_there_and_back(tmp_path, manifest):
    """Whole paths, text, duration and offset; nothing is lost on the way back."""
    convert(manifest, tmp_path / "n", "nemo")
    found = read(tmp_path / "n/train.jsonl")
    assert [(r["text"], r["duration"], r.get("offset")) for r in found] == [("bra fie", 1.0, None), ("kɔ", .75, .5), ("ha me", .5, None)]
    assert all(Path(r["audio_filepath"]).is_file() for r in found)
    made = convert(tmp_path / "n", tmp_path / "back")
    assert made["notes"] == {} and Path(made["audio_base_path"]) == tmp_path / "c"
    old, new = rows(tmp_path / "c", "train"), rows(tmp_path / "back", "train")
    for name, u in old.items():
        same(u, new[name])
        assert (u.start, u.end, u.audio_filepath) == (new[name].start, new[name].end, new[name].audio_filepath)


def test_audformat_there_and_back(tmp_path, manifest):
    """Tables for splits, schemes with labels, segments; the sound is named where it lies."""
    audformat = pytest.importorskip("audformat")
    made = convert(manifest, tmp_path / "a", "audformat")
    assert any("which must stay" in n for n in made["notes"])
    db = audformat.Database.load(str(tmp_path / "a"))
    assert db.schemes["emotion"].labels == ["anger", "joy"] and db["train"].split_id == "train" and not list((tmp_path / "a").glob("*.pkl"))
    assert sorted(db.get("emotion")["emotion"].dropna()) == ["anger", "joy"]
    convert(tmp_path / "a", tmp_path / "back")
    old, new = read_manifest(manifest), read_manifest(tmp_path / "back/train.jsonl")
    key = {(u.audio_filepath, u.start, u.end): u for u in new}
    for u in old:
        same(u, key[u.audio_filepath, u.start, u.end])
    (tmp_path / "a/db.train.pkl").write_bytes(b"cos\nsystem\n")
    assert "db.train.pkl: a pickle can hold a program" in refused(tmp_path / "a", tmp_path / "x")


def test_audformat_of_others(tmp_path):
    """Speakers with labels of their own, what is said of a file holds for its segments, dev is val, other names are said."""
    audformat = pytest.importorskip("audformat")
    pd = pytest.importorskip("pandas")
    for name in "ab":
        hum(tmp_path / f"db/wav/{name}.wav", 2)
    db = audformat.Database("x", "s", "other")
    db.schemes["feeling"], db.schemes["speaker"] = audformat.Scheme("str", labels=["sad", "glad"]), audformat.Scheme("str", labels={"s1": dict(gender="female")})
    db.splits["dev"] = audformat.Split("dev")
    db["segments"] = audformat.Table(audformat.segmented_index(["wav/a.wav", "wav/a.wav"], pd.to_timedelta([0, 1], unit="s"), pd.to_timedelta([1, 2], unit="s")), split_id="dev")
    db["segments"]["feeling"] = audformat.Column(scheme_id="feeling")
    db["segments"]["feeling"].set(["sad", "glad"])
    db["files"] = audformat.Table(audformat.filewise_index(["wav/a.wav", "wav/b.wav"]))
    db["files"]["speaker"] = audformat.Column(scheme_id="speaker")
    db["files"]["speaker"].set(["s1", "s1"])
    db.save(str(tmp_path / "db"), storage_format="csv")
    assert "no scheme emotion or transcription; there are feeling, gender, speaker" in refused(tmp_path / "db", tmp_path / "x")
    made = convert(tmp_path / "db", tmp_path / "out", columns="emotion=feeling", emotion_map="glad=joy")
    assert (made["val"], made["all"]) == (2, 1)
    first, second = read_manifest(tmp_path / "out/val.jsonl")
    assert [(u.start, u.end, u.emotion, u.speaker) for u in (first, second)] == [(None, 1, "sad", "s1"), (1, 2, "joy", "s1")]
    last, = read_manifest(tmp_path / "out/all.jsonl")
    assert (last.emotion, last.speaker, last.audio_filepath) == (None, "s1", "wav/b.wav")


def kaldi(tmp_path):
    """Two data folders, with paths as a recipe in s5 has them."""
    hum(tmp_path / "s5/wav/r1.wav", 3)
    hum(tmp_path / "s5/wav/r2.wav", 1)
    folder = tmp_path / "s5/data/train"
    text(folder / "wav.scp", "r1 wav/r1.wav\n")
    text(folder / "segments", "u1 r1 0.5 1.5\nu2 r1 1.5 -1\n")
    text(folder / "text", "u1 bra fie\nu2 kɔ\nu7 ha\n")
    text(folder / "utt2spk", "u1 ama\nu2 kofi\n")
    text(folder / "utt2emo", "u1 anger\nu2 joy\n")
    text(tmp_path / "s5/data/dev/wav.scp", f"u3 {tmp_path}/s5/wav/r2.wav\n")
    return folder


def test_kaldi(tmp_path):
    """Segments, words, speakers, emotions; two folders are two splits; what is left out is said."""
    kaldi(tmp_path)
    made = convert(tmp_path / "s5/data", tmp_path / "out")
    assert (made["train"], made["val"], made["notes"]) == (2, 1, {"left out: in text, but without audio": 1})
    found = rows(tmp_path / "out", "train")
    assert [(u.start, u.end, u.words, u.speaker, u.emotion) for u in found.values()] == [(.5, 1.5, ["bra", "fie"], "ama", "anger"), (1.5, None, ["kɔ"], "kofi", "joy")]
    assert all((Path(made["audio_base_path"]) / u.audio_filepath).is_file() for u in [*found.values(), *rows(tmp_path / "out", "val").values()])


def test_kaldi_runs_nothing(tmp_path):
    """A command, an archive, an id twice, a segment of nothing: one sentence with file, line and cure."""
    folder, ran = kaldi(tmp_path), tmp_path / "ran"
    for line, said in ((f"r0 touch {ran} |", "is a command, which is never run here. Run it yourself"), ("r0 raw.ark:17", "is a place in an archive. Unpack it"), ("r1 wav/r1.wav", "r1 comes a second time")):
        text(folder / "wav.scp", f"r1 wav/r1.wav\n{line}\n")
        message = refused(folder, tmp_path / "x")
        assert "wav.scp:2: " in message and said in message and not ran.exists()
    text(folder / "wav.scp", "r1 wav/r1.wav\n")
    for line, said in (("u1 r9 0 1", "is no recording of wav.scp"), ("u1 r1 1", "with start and end"), ("u1 r1 2 1", "is not a stretch of time"), ("u1 r1 a b", "is not a stretch of time")):
        text(folder / "segments", line + "\n")
        message = refused(folder, tmp_path / "x")
        assert "segments:1: " in message and said in message, message


def test_table(tmp_path):
    """Names that manifests know, others by a map, numbers, lists, a column of splits; emotions by other names."""
    for name in "abc":
        hum(tmp_path / f"t/{name}.wav")
    text(tmp_path / "t/x.csv", 'Path,text,feels,prosody_annotations,split,age\na.wav,"bra, fie",Angry,"[0 1]",train,30\nb.wav,kɔ,calm,1,dev,\nc.wav,,xxx,,train,\n')
    made = convert(tmp_path / "t/x.csv", tmp_path / "out", columns="emotion=feels", emotion_map="angry=anger,calm=neutral,xxx=")
    assert (made["train"], made["val"], list(made["notes"].values())) == (2, 1, [1])
    a, c = read_manifest(tmp_path / "out/train.jsonl")
    assert (a.words, a.prosody_annotations, a.emotion) == (["bra,", "fie"], [0, 1], "anger") and (c.words, c.emotion) == (None, None)
    b, = read_manifest(tmp_path / "out/val.jsonl")
    assert (b.prosody_annotations, b.emotion) == ([1], "neutral")
    text(tmp_path / "t/y.tsv", "audio\temotion\na.wav\t2\n")
    convert(tmp_path / "t/y.tsv", tmp_path / "y")
    assert read(tmp_path / "y/all.jsonl") == [dict(audio_filepath="a.wav", emotion=2)]


def test_a_given_column_wins(tmp_path):
    """The table has a column of our name, too: it is left out, and said."""
    hum(tmp_path / "a.wav")
    made = convert(text(tmp_path / "x.csv", "path,said,words\na.wav,bra fie,0.97\n"), tmp_path / "o", columns="words=said")
    assert read(tmp_path / "o/all.jsonl")[0]["words"] == ["bra", "fie"] and list(made["notes"].values()) == [1]


def test_a_folder_of_manifests(tmp_path, manifest):
    """What prepare writes: all rows beside their splits, and folds below. No row comes twice, none is lost."""
    for name in ("all", "val", "dev", "folds/0/train"):
        (tmp_path / "c/folds/0").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"c/{name}.jsonl").write_bytes(manifest.read_bytes())
    made = convert(tmp_path / "c", tmp_path / "o")
    assert {k: v for k, v in made.items() if type(v) is int} == dict(train=3, val=6) and list(made["notes"].values()) == [1]


def test_table_of_no_use(tmp_path):
    """File, line and cure; a map the wrong way round does not pass."""
    hum(tmp_path / "a.wav")
    x = text(tmp_path / "x.csv", "path;text;label\na.wav;bra;angry\n")
    assert "x.csv:1: there is no 'mood'; there are path, text, label" in refused(x, tmp_path / "o", columns="emotion=mood")
    assert "--columns mood: write NAME=NAME" in refused(x, tmp_path / "o", columns="mood")
    assert "no row has the emotion 'anger'; there are angry" in refused(x, tmp_path / "o", emotion_map="anger=angry")
    for content, said in (("sound;text\na.wav;bra\n", "x.csv:1: no column holds audio or names it; there are sound, text"), ("path,text\na.wav,bra\na.wav,bra,fie\n", "x.csv:3: 3 cells under a head of 2"),
                          ("path,text,prosody_annotations\na.wav,bra fie,1\n", "x.csv:2: 2 words but 1 prosody_annotations"), ("path,start\na.wav,soon\n", "x.csv:2: start 'soon'"), ("path\n", "not one utterance"), ('path,text\na.wav,"bra\na.wav,fie\n', "x.csv:2: unexpected end of data. Close the quotes"), ("path,text,text\na.wav,bra,fie\n", "two columns are called 'text'"), ("path,text\n,bra\n", "x.csv:2: audio_filepath is missing")):
        assert said in refused(text(x, content), tmp_path / "o"), content
    assert "no such file or folder" in refused(tmp_path / "gone", tmp_path / "o")
    hum(tmp_path / "wavs/a.wav")
    assert "wavs: no format that is read. Name a file of" in refused(tmp_path / "wavs", tmp_path / "o")
    text(tmp_path / "two/a.csv", "path\n"), text(tmp_path / "two/a.jsonl", "{}\n")
    assert "files of several formats" in refused(tmp_path / "two", tmp_path / "o")


def table(tmp_path, content, name="x.csv"):
    """A table beside the sounds a, b and c that it may name."""
    for n in "abc":
        hum(tmp_path / f"{n}.wav", .2)
    return text(tmp_path / name, content)


def test_a_quote_in_a_tsv_swallows_no_rows(tmp_path):
    """Common Voice writes quotes as letters: one that has no partner, or one many rows on, or another cell's. Those about a cell are seen as such."""
    head = "path\tsentence\tage\n"
    for n, (rows, said) in enumerate(((['"Bra fie', "kɔ", 'ha me"'], ['"Bra fie', "kɔ", 'ha me"']), (['"Bra', "kɔ", "ha"], ['"Bra', "kɔ", "ha"]), (['"Bra" fie', "kɔ", "ha"], ['"Bra" fie', "kɔ", "ha"]),
                                      (['"Bra ""fie"""', '"kɔ"', "ha"], ['Bra "fie"', "kɔ", "ha"]), (['"Bra\nfie"', "kɔ", "ha"], ["Bra fie", "kɔ", "ha"]))):
        x = table(tmp_path, head + "".join(f"{name}.wav\t{row}\t30\n" for name, row in zip("abc", rows, strict=True)), "x.tsv")
        convert(x, tmp_path / f"o{n}")
        assert [u.text for u in read_manifest(tmp_path / f"o{n}/all.jsonl")] == said
    convert(table(tmp_path, head + 'a.wav\t"Bra\t3"\nb.wav\tkɔ\t4\n', "x.tsv"), tmp_path / "two")
    assert [u.text for u in read_manifest(tmp_path / "two/all.jsonl")] == ['"Bra', "kɔ"]


def test_a_quote_in_a_csv_is_told_where_it_begins(tmp_path):
    """Neither at the end of the file nor where the next quote stands; a line break in a cell is none."""
    rows = 'path,text,emotion\na.wav,kɔ,joy\nb.wav,"bra,joy\na.wav,kɔ,joy\nc.wav,{},joy\n'
    for last, said in (("fie", "unexpected end of data"), ('fie"', "a cell goes on to line 5, over what may be rows. Close its quotes, or take the line breaks out"), ('"fie"', "expected after")):
        message = refused(table(tmp_path, rows.format(last)), tmp_path / "o")
        assert "x.csv:3: " in message and said in message and "Close " in message, message
    convert(table(tmp_path, 'path,text,emotion\na.wav,"bra,\nfie",joy\nb.wav,kɔ,joy\n'), tmp_path / "o")
    assert [u.text for u in read_manifest(tmp_path / "o/all.jsonl")] == ["bra, fie", "kɔ"]
    for cells, rows in (('path,text\na.wav,"Hello,\nhe said, fine"\n', ["Hello, he said, fine"]), ('path,text,emotion\na.wav,"bra\nfie, ha",joy\n', ["bra fie, ha"])):
        convert(table(tmp_path, cells), tmp_path / rows[0])
        assert [u.text for u in read_manifest(tmp_path / rows[0] / "all.jsonl")] == rows
    assert "x.csv:4: 1 words but 2" in refused(table(tmp_path, 'path,text,prosody_annotations\na.wav,"bra\nfie",0 1\nb.wav,kɔ,1 0\n'), tmp_path / "p")


@pytest.mark.parametrize("head, field", [("path,Text,text", "text"), ("path,text,transcription", "text"), ("path,Speaker,speaker", "speaker"), ("path,speaker,speaker_id", "speaker"),
                                         ("path,label,emotion", "emotion"), ("path,file,emotion", "audio_filepath"), ("path,start,begin", "start")])
def test_two_columns_of_one_field(tmp_path, head, field):
    """Which one is meant nobody can know: both are named, and the cure; asked for, the other one is left out and told."""
    one, two = head.split(",")[:2] if field == "audio_filepath" else head.split(",")[1:]
    value = ("a.wav", "a.wav", "0") if field == "audio_filepath" else ("a.wav", "0", "0.5")
    x = table(tmp_path, f"{head}\n{','.join(value)}\n")
    message = refused(x, tmp_path / "o")
    assert f"x.csv:1: the columns {one!r} and {two!r} are both {field}. Say which of them it is: --columns {field}=COLUMN." in message
    made = convert(x, tmp_path / "o", columns=f"{field}={two}")
    assert made["notes"] == {"left out: columns that another one replaces (--columns OURS=THEIRS)": 1}
    row, = read(tmp_path / "o/all.jsonl")
    assert str(row.get("words" if field == "text" else field)).strip("[]'") == value[head.split(",").index(two)]


def test_columns_named_twice(tmp_path, capsys):
    """No name of --columns or --emotion_map is lost; text that is not the words is told."""
    x = table(tmp_path, "path,a,b\na.wav,joy,fear\n")
    assert "--columns: emotion is named twice" in refused(x, tmp_path / "o", columns="emotion=a,emotion=b")
    assert "--columns: two fields are to be 'a'" in refused(x, tmp_path / "o", columns="emotion=a,speaker=a")
    assert "--emotion_map: joy is named twice" in refused(x, tmp_path / "o", columns="emotion=a", emotion_map="joy=x,joy=y")
    made = convert(table(tmp_path, "path,words,text\na.wav,bra fie,bra fie\nb.wav,bra,kɔ\n"), tmp_path / "o")
    assert made["notes"] == {"left out: text beside words that say something else": 1} and "x.csv:3" in capsys.readouterr().out


def test_cells_that_say_nothing(tmp_path, capsys):
    """What R, pandas and Excel write for an empty cell is one; unknown, ? and - are no class and no person. Each is told; a map keeps it."""
    cells = ["NA", "N/A", "#N/A", "n/a", "nan", "NaN", "null", "unknown", "Unknown", "-", "?", ".", "joy", "none"]
    x = table(tmp_path, "path,text,emotion,speaker,start\n" + "".join(f"a.wav,null ha,{c},{'None' if c == 'none' else c},{'NA' if c == 'NA' else 0}\n" for c in cells) + "b.wav,NA,joy,Na,0\n")
    made = convert(x, tmp_path / "o")
    found = read_manifest(tmp_path / "o/all.jsonl")
    assert [u.emotion for u in found] == [None] * 12 + ["joy", "none", "joy"]       # none is a class in some corpora, as in manifests
    assert [u.speaker for u in found] == [None] * 12 + ["joy", None, "Na"]
    assert (found[0].start, found[0].words, found[-1].words) == (None, ["null", "ha"], None)
    assert made["notes"]["left out: cells NA of emotion, read as empty"] == 1 and made["notes"]["left out: cells None of speaker, read as empty"] == 1
    told = capsys.readouterr().out
    assert "1 left out: the emotion unknown, read as empty; --emotion_map unknown=NAME keeps it: x.csv:9\n" in told and "1 left out: cells NA of text, read as empty: x.csv:16\n" in told
    convert(x, tmp_path / "kept", emotion_map="unknown=other,NA=neutral")
    kept = read_manifest(tmp_path / "kept/all.jsonl")
    assert [u.emotion for u in kept][7:9] == ["other"] * 2 and (kept[0].emotion, kept[1].emotion, kept[0].speaker) == ("neutral", None, None)


def test_the_audiofolder_of_the_hub(tmp_path):
    """metadata.csv in the folder of each split, with paths from there; two files of one name are two."""
    for split, seconds in dict(train=.2, test=.4).items():
        hum(tmp_path / f"hub/{split}/a.wav", seconds)
        text(tmp_path / f"hub/{split}/metadata.csv", "file_name,transcription,emotion\na.wav,bra fie,joy\n")
    made = convert(tmp_path / "hub", tmp_path / "o")
    assert {k: v for k, v in made.items() if type(v) is int} == dict(train=1, test=1) and made["notes"] == {}
    assert [read(tmp_path / f"o/{n}.jsonl")[0]["audio_filepath"] for n in ("train", "test")] == ["train/a.wav", "test/a.wav"]


def test_common_voice(tmp_path):
    """Its columns are known, its clips found, and its tables without audio left out by name; a table that says file_name otherwise stays as it was."""
    hum(tmp_path / "cv/clips/a.wav"), hum(tmp_path / "cv/clips/b.wav")
    for split, name in dict(train="a", dev="b").items():
        text(tmp_path / f"cv/{split}.tsv", f"client_id\tpath\tsentence\tage\nx{name}\t{name}.wav\tbra {name}\t\n")
    text(tmp_path / "cv/clip_durations.tsv", "clip\tduration[ms]\na.wav\t1000\n")
    made = convert(tmp_path / "cv", tmp_path / "o")
    assert made["notes"] == {"left out: tables without a column of audio": 1, "left out: columns that mean nothing here (--columns OURS=THEIRS)": 2}
    assert read(tmp_path / "o/val.jsonl") == [dict(audio_filepath="clips/b.wav", words=["bra", "b"], speaker="xb")]
    text(tmp_path / "cv/validated.tsv", "client_id\tpath\tsentence\nxa\ta.wav\tbra a\nxb\tb.wav\tbra b\n")
    assert convert(tmp_path / "cv", tmp_path / "again")["notes"]["that come again; leave a table out that holds the rows of others"] == 2
    (tmp_path / "cv/train.tsv").unlink(), (tmp_path / "cv/dev.tsv").unlink(), (tmp_path / "cv/validated.tsv").unlink()
    text(tmp_path / "cv/other.tsv", "clip\nb.wav\n")
    assert "clip_durations.tsv:1: no column holds audio or names it; there are clip, duration[ms]" in refused(tmp_path / "cv", tmp_path / "p")
    made = convert(table(tmp_path, "path,text,sentence\na.wav,bra,kɔ\n"), tmp_path / "q")
    assert read(tmp_path / "q/all.jsonl")[0]["words"] == ["bra"] and list(made["notes"].values()) == [1]


def test_tables_of_excel(tmp_path):
    """A first line sep=;, columns and rows that are empty, one without a name: what they hold is read or told."""
    for n, (content, lost) in enumerate((("sep=;\npath;text\na.wav;bra, fie\n", 0), ("path;text;;\na.wav;bra, fie;;\n;;;\n;;;\n", 0), ("path;text\na.wav;bra, fie;;\n\n", 0),
                                         (";path;text;\n0;a.wav;bra, fie;\n", 1), ("path;text;;\na.wav;bra, fie;;x\n", 1))):
        made = convert(table(tmp_path, content), tmp_path / f"o{n}")
        assert [(u.text, u.audio_filepath) for u in read_manifest(tmp_path / f"o{n}/all.jsonl")] == [("bra, fie", "a.wav")], content
        assert made["notes"] == ({"left out: columns without a name": 1} if lost else {})
    assert "x.csv:3: 3 cells under a head of 2" in refused(table(tmp_path, "sep=,\npath,text\na.wav,bra,fie\n"), tmp_path / "o")


WORDS = [(.4, .8, "bra"), (.8, 1.2, "fie"), (1.2, 1.6, "ntɛm")]


def textgrid(path, **tiers):
    """A TextGrid of two seconds by the library that Praat's users have; a list of pairs is a tier of points."""
    grids = pytest.importorskip("praatio.textgrid")
    hum(path.with_suffix(".wav"), 2)
    grid = grids.Textgrid()
    for name, found in tiers.items():
        kind = grids.PointTier if len(found[0]) == 2 else grids.IntervalTier
        grid.addTier(kind(name, found, 0, 2))
    grid.save(str(path), "long_textgrid", includeBlankSpaces=True)
    return path


def test_tiers_of_praat(tmp_path):
    """Marks by the borders of words, or points in them; utterances by intervals of emotion, with times of their own."""
    textgrid(tmp_path / "g/a.TextGrid", words=[(0, .4, "sil"), *WORDS], prominence=[(.81, 1.2, "x"), (1.2, 1.6, "0.3")], notes=[(0, 1, "hm")])
    textgrid(tmp_path / "g/b.TextGrid", words=WORDS, prominence=[(.5, "H*"), (1.3, "L+H*")], emotion=[(0, 2, "joy")])
    textgrid(tmp_path / "g/c.TextGrid", words=WORDS, emotion=[(.3, 1.2, "joy"), (1.2, 1.7, "anger")])
    made = convert(tmp_path / "g", tmp_path / "out")
    assert made["notes"] == {"left out: tiers that mean nothing here (--columns OURS=THEIRS)": 1}
    a, b, c, d = read_manifest(tmp_path / "out/all.jsonl")
    assert (a.audio_filepath, a.words, a.prosody_annotations, a.start, a.emotion) == ("a.wav", ["bra", "fie", "ntɛm"], [0, 1, 0.3], None, None)
    assert (b.prosody_annotations, b.emotion, b.end, b.word_times[0]) == ([1, 0, 1], "joy", None, [.4, .8])
    assert (c.start, c.end, c.words, c.emotion, c.prosody_annotations, c.word_times) == (.3, 1.2, ["bra", "fie"], "joy", None, [[.1, .5], [.5, .9]])
    assert (d.start, d.words, d.emotion) == (1.2, ["ntɛm"], "anger")


def test_tiers_that_do_not_match(tmp_path):
    """A mark between words, a word across utterances, no words, another name, no sound."""
    x = textgrid(tmp_path / "x.TextGrid", words=WORDS, prominence=[(.9, 1.3, "x")])
    assert "x.TextGrid: tier 'prominence': the mark 'x' at 0.90 s has the borders of none" in refused(x, tmp_path / "o")
    textgrid(x, words=WORDS, emotion=[(0, 1.1, "joy")])
    assert "'fie' at 0.80 s crosses the border of its utterance, 0.00 to 1.10 s" in refused(x, tmp_path / "o")
    textgrid(x, Mary=WORDS)
    assert "no tier words, emotion or transcript; there are Mary. Say which" in refused(x, tmp_path / "o")
    assert "there is no 'Ama'; there are Mary" in refused(x, tmp_path / "o", columns="words=Ama")
    assert convert(x, tmp_path / "mary", columns="words=Mary")["all"] == 1
    x.with_suffix(".wav").unlink()
    assert "no sound file x.wav" in refused(x, tmp_path / "o", columns="words=Mary")
    assert "x.TextGrid: the tiers cannot be read" in refused(text(x, "File type = no\n"), tmp_path / "o")


def test_tiers_beside_each_other(tmp_path):
    """Transcripts outside of emotions are rows without one; those with words are utterances, unless words lie outside. Silences are no class."""
    said = [(.4, .8, "bra"), (.8, 1.6, "fie ntɛm")]
    for name, tiers in dict(a=dict(emotion=[(.4, .8, "joy"), (1.7, 2, "SIL")], transcript=said), b=dict(words=WORDS, transcript=said, prominence=[(.8, 1.2, "x")]),
                            c=dict(words=[*WORDS, (1.7, 1.9, "ha")], transcript=said), d=dict(emotion=[(.4, 1.6, "joy")], transcript=[(.4, 1.6, "bra")], prominence=[(.5, .7, "x"), (.8, .9, "0")]),
                            e=dict(emotion=[(0, 2, "<sil>")], words=WORDS), f=dict(emotion=[(0, 1.2, "joy")], words=WORDS, transcript=said)).items():
        textgrid(tmp_path / f"g/{name}.TextGrid", **tiers)
    made = convert(tmp_path / "g", tmp_path / "out")
    found = [(u.audio_filepath[0], u.text, u.emotion, u.start, u.prosody_annotations) for u in read_manifest(tmp_path / "out/all.jsonl")]
    assert found == [("a", "bra", "joy", .4, None), ("a", "fie ntɛm", None, .8, None), ("b", "bra", None, .4, [0]), ("b", "fie ntɛm", None, .8, [1, 0]), ("c", "bra fie ntɛm ha", None, None, None),
                     ("d", "bra", "joy", .4, None), ("e", "bra fie ntɛm", None, None, None), ("f", "bra fie", "joy", 0, None)]
    assert made["notes"] == {"left out: silences in the tier of emotion": 2, "left out: transcript as utterances, since words lie outside of it": 1, "left out: transcript outside of every utterance": 1,
                             "left out: prominence without words": 1, "left out: words outside every utterance": 1}


def test_tiers_of_elan(tmp_path):
    """The same from an .eaf, and what prosody-ser predict writes is read."""
    elan = pytest.importorskip("pympi.Elan")
    hum(tmp_path / "e/a.wav", 2)
    eaf = elan.Eaf()
    for tier, found in dict(words=WORDS, prominence=[(.8, 1.2, "1")]).items():
        eaf.add_tier(tier)
        for start, end, value in found:
            eaf.add_annotation(tier, round(1000 * start), round(1000 * end), value)
    eaf.to_file(str(tmp_path / "e/a.eaf"))
    convert(tmp_path / "e", tmp_path / "out")
    u, = read_manifest(tmp_path / "out/all.jsonl")
    assert (u.words, u.prosody_annotations, u.word_times[2]) == (["bra", "fie", "ntɛm"], [0, 1, 0], [1.2, 1.6])
    assert "a.eaf: the tiers cannot be read" in refused(text(tmp_path / "e/a.eaf", "<x>"), tmp_path / "o")


def elan_file(path, **tiers):
    """An .eaf by the library that ELAN's users have."""
    eaf = pytest.importorskip("pympi.Elan").Eaf()
    for tier, found in tiers.items():
        eaf.add_tier(tier)
        for start, end, value in found:
            eaf.add_annotation(tier, round(1000 * start), round(1000 * end), value)
    path.parent.mkdir(parents=True, exist_ok=True)
    eaf.to_file(str(path))


@pytest.mark.parametrize("ending", ["eaf", "TextGrid"])
@pytest.mark.parametrize(("tiers", "stretch"), [
    (dict(emotion=[(0, 1.7, "joy")]), (0, 1.7)), (dict(emotion=[(0, 1.7, "joy")], words=WORDS), (0, 1.7)),
    (dict(transcript=[(0, 1.7, "bra fie")]), (0, 1.7)), (dict(emotion=[(.3, 1.7, "joy")], words=WORDS), (.3, 1.7)),
    (dict(words=WORDS), (None, None)), (dict(emotion=[(0, 6, "joy")], words=WORDS), (None, None))])
def test_the_last_annotation_is_not_the_end_of_its_sound(tmp_path, ending, tiers, stretch):
    """Only what fills the sound is all of it: neither the last annotation nor the end of the tiers says how long that is."""
    path = tmp_path / f"e/a.{ending}"
    if ending == "eaf":
        elan_file(path, **tiers)
    else:
        grids, last = pytest.importorskip("praatio.textgrid"), max(t[-1][1] for t in tiers.values())
        grid = grids.Textgrid()
        for name, found in tiers.items():
            grid.addTier(grids.IntervalTier(name, found, 0, last))
        path.parent.mkdir()
        grid.save(str(path), "long_textgrid", includeBlankSpaces=True)
    hum(tmp_path / "e/a.wav", 6)
    convert(tmp_path / "e", tmp_path / "out")
    u, = read_manifest(tmp_path / "out/all.jsonl")
    assert (u.start, u.end) == stretch and (u.word_times is None) == ("words" not in tiers)
    assert u.word_times is None or u.word_times[0] == [round(t - (stretch[0] or 0), 3) for t in (.4, .8)]


def test_tiers_of_a_sound_that_cannot_be_read_keep_their_times(tmp_path):
    elan_file(tmp_path / "e/a.eaf", emotion=[(0, 2, "joy")])
    elan_file(tmp_path / "e/b.eaf", words=WORDS)
    for name in "ab":
        text(tmp_path / f"e/{name}.wav", "no sound")
    convert(tmp_path / "e", tmp_path / "out")
    found = {u.audio_filepath: (u.start, u.end) for u in read_manifest(tmp_path / "out/all.jsonl")}
    assert found == {"a.wav": (0, 2), "b.wav": (None, None)}


def test_nothing_is_written_over(tmp_path, manifest):
    """Neither a file of the user's nor an earlier conversion; a conversion that fails leaves nothing."""
    text(tmp_path / "out/train.jsonl", "mine\n")
    with pytest.raises(FolderError, match=r"has train\.jsonl already"):
        convert(manifest, tmp_path / "out")
    assert (tmp_path / "out/train.jsonl").read_text() == "mine\n"
    with pytest.raises(FolderError):
        convert(manifest, tmp_path / "c")                                 # onto itself
    assert len(read(manifest)) == 3
    (tmp_path / "c/b.wav").unlink()
    for to in ("parquet", "nemo", "audformat"):
        pytest.importorskip(dict(parquet="pyarrow", audformat="audformat").get(to, "json"))
        assert re.search(r"train\.jsonl:2: .*b\.wav", refused(manifest, tmp_path / to, to=to))
    assert "rows whose sound is not there (--audio_base_path)" in convert(manifest, tmp_path / "kept")["notes"]


def test_command(tmp_path, manifest, command):
    """One line of the shell, and one sentence where it cannot be."""
    code, said = command("convert", manifest, tmp_path / "n", "--to", "nemo", "--emotion_map", "joy=happiness")
    assert code == 0 and "3 utterances -> " in said and read(tmp_path / "n/train.jsonl")[1]["emotion"] == "happiness"
    code, said = command("convert", manifest, tmp_path / "n", "--to", "nemo")
    assert code == 1 and said.startswith("error: ") and "nothing is written over" in said


@needs(DATA / "ravdess")
@pytest.mark.parametrize("corpus, files, speaker", [("ravdess", ["all"], "Actor_"), ("nemo", ["all"], ""), ("emodb", ["train", "val", "test"], "")])
def test_recipes_on_the_real_files(tmp_path, corpus, files, speaker):
    """The labels of the recipes are those that were read from the releases by other code."""
    folder = DATA / dict(emodb="emodb2s").get(corpus, corpus)
    counts = prepare(corpus, folder, tmp_path)
    known = {u.audio_filepath: u for name in files for u in read_manifest(folder / f"{name}.jsonl")}
    emodb = dict(enumerate("neutral anger boredom disgust fear happiness sadness".split()))
    found = read_manifest(tmp_path / "all.jsonl")
    assert counts["all"] == len(found) == len(known) and not [n for n in counts["notes"] if n.startswith("left out")]
    for u in found:
        k = known[u.audio_filepath]
        assert (u.emotion, u.speaker) == (emodb.get(k.emotion, k.emotion), speaker + k.speaker), u.audio_filepath
        if corpus != "nemo":                                              # its table of transcripts does not lie here
            assert u.words[:len(k.words)] == k.words


@needs(DATA / "nemo")
def test_nemo_in_the_release_layout(tmp_path):
    """The names of the release, and its table of transcripts: the words are those that were read from it by other code."""
    known = read(DATA / "nemo/small.jsonl")
    (tmp_path / "nemo/samples").mkdir(parents=True)
    for r in known:
        (tmp_path / "nemo" / r["source"]).symlink_to(DATA / "nemo" / r["audio_filepath"])
    lines = [f"{Path(r['source']).name}\t{r['emotion']}\t{r['text']}\t{r['text'].lower()}\t        {r['speaker']}\tx\t1" for r in known]
    text(tmp_path / "nemo/data.tsv", "\n".join(["file_id\temotion\traw_text\tnormalized_text\tspeaker_id\tgender\tage", *lines]) + "\n")
    assert prepare("nemo", tmp_path / "nemo", tmp_path / "out")["notes"] == {}
    found = {u.audio_filepath: (u.words, u.emotion, u.speaker) for u in read_manifest(tmp_path / "out/all.jsonl")}
    assert found == {r["source"]: (r["words"], r["emotion"], r["speaker"]) for r in known}


SHARED_BY_LISTENERS = [
    dict(audio_filepath="a.wav", words=["bra", "fie"], prosody_annotations=[0.25, 1], emotion={"angry": 0.5, "anger": 0.25, "joy": 0.25}, speaker="ama", id="u1"),
    dict(audio_filepath="b.wav", words=["kɔ"], emotion="Joy", speaker="kofi", id="u2"),
    dict(audio_filepath="sub/a.wav", emotion={"joy": 0.8, "xxx": 0.2}, id="u3")]


def soft_manifest(tmp_path, emotions=None):
    """Three rows of which some have shares."""
    for name in ("a", "b", "sub/a"):
        hum(tmp_path / f"c/{name}.wav")
    rows = [r | dict(emotion=e) for r, e in zip(SHARED_BY_LISTENERS, emotions or [r["emotion"] for r in SHARED_BY_LISTENERS], strict=True)]
    return write(tmp_path / "c/train.jsonl", rows)


def test_shares_under_other_names(tmp_path):
    """Two that become one are added, also with a class that has the name already; what is left out leaves the others in proportion."""
    source = soft_manifest(tmp_path)
    convert(source, tmp_path / "o", emotion_map="angry=anger,xxx=")
    assert [r["emotion"] for r in read(tmp_path / "o/train.jsonl")] == [{"anger": 0.75, "joy": 0.25}, "Joy", {"joy": 1.0}]
    convert(source, tmp_path / "none", emotion_map="joy=,xxx=,angry=anger")
    assert [r.get("emotion") for r in read(tmp_path / "none/train.jsonl")] == [{"anger": 1.0}, None, None]
    assert "no row has the emotion 'sad'; there are anger, angry, joy, xxx" in refused(source, tmp_path / "x", emotion_map="sad=anger")
    source = soft_manifest(tmp_path, [[0.5, 0.5], 1, {"1": 1}])
    convert(source, tmp_path / "named", emotion_map="0=anger,1=joy")
    assert [r["emotion"] for r in read(tmp_path / "named/train.jsonl")] == [{"anger": 0.5, "joy": 0.5}, "joy", {"joy": 1.0}]
    assert "train.jsonl:1: --emotion_map names some classes and leaves 1 an index" in refused(source, tmp_path / "x", emotion_map="0=anger")


@pytest.mark.parametrize("to", ["manifest", "nemo", "parquet", "audformat"])
@pytest.mark.parametrize("emotions", [None, [[0.6, 0.4], 1, {"0": 0.5, "1": 0.5}]])
def test_shares_there_and_back(tmp_path, to, emotions):
    """No share is rounded or lost in any format; a row with a class beside them stays one."""
    pytest.importorskip(dict(parquet="pyarrow", audformat="audformat").get(to, "json"))
    source = soft_manifest(tmp_path, emotions)
    convert(source, tmp_path / "there", to)
    assert not [n for n in convert(tmp_path / "there", tmp_path / "back")["notes"] if n.startswith("left out")]
    old, new = read_manifest(source), read_manifest(tmp_path / "back/train.jsonl")
    for a, b in zip(old, sorted(new, key=lambda u: ("sub/" in u.audio_filepath or "u3" in str(u.id), u.audio_filepath)), strict=True):
        assert (shares_of(b.emotion) if is_soft(a.emotion) else str(b.emotion).lower()) == (shares_of(a.emotion) if is_soft(a.emotion) else str(a.emotion).lower())
        assert (a.words, a.prosody_annotations, is_soft(a.emotion)) == (b.words, b.prosody_annotations, is_soft(b.emotion))


def test_shares_on_the_hub(tmp_path):
    """The column emotion has the class with the largest share, as whoever loads it would expect; the shares stand beside."""
    pq = pytest.importorskip("pyarrow.parquet")
    convert(soft_manifest(tmp_path), tmp_path / "p", "parquet")
    table = pq.read_table(tmp_path / "p/data/train-00000-of-00001.parquet")
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["emotion"]["names"]
    assert [names[i] for i in table["emotion"].to_pylist()] == ["angry", "joy", "joy"] and names == ["anger", "angry", "joy", "xxx"]
    assert table["emotion_shares"].to_pylist()[1:] == [None, {"anger": None, "angry": None, "joy": 0.8, "xxx": 0.2}]
    assert table["prosody_annotations"].to_pylist() == [[0.25, 1.0], None, None]


def test_datasets_reads_shares(tmp_path):
    """As whoever loads it from the Hub sees them."""
    datasets = pytest.importorskip("datasets")
    convert(soft_manifest(tmp_path), tmp_path / "p", "parquet")
    found = datasets.load_dataset(str(tmp_path / "p"), cache_dir=str(tmp_path / "cache"))["train"]
    found = found.cast_column("audio", datasets.Audio(decode=False))
    assert [found.features["emotion"].names[r["emotion"]] for r in found] == ["angry", "joy", "joy"]
    assert [r["emotion_shares"] for r in found] == [dict(angry=0.5, anger=0.25, joy=0.25, xxx=None), None, dict(angry=None, anger=None, joy=0.8, xxx=0.2)]
    assert found[0]["prosody_annotations"] == [0.25, 1.0]


def test_shares_in_a_table(tmp_path):
    """A cell may give them as JSON, and p-scores as numbers."""
    hum(tmp_path / "a.wav")
    convert(text(tmp_path / "x.csv", 'path;text;label;prosody_annotations\na.wav;bra fie;{"joy": 0.75, "fear": 0.25};0.25 1\n'), tmp_path / "o")
    assert read(tmp_path / "o/all.jsonl") == [dict(audio_filepath="a.wav", words=["bra", "fie"], prosody_annotations=[0.25, 1], emotion={"joy": 0.75, "fear": 0.25})]
    assert "x.csv:2: the shares of emotion add up to 0.5" in refused(text(tmp_path / "x.csv", 'path;label\na.wav;{"joy": 0.5}\n'), tmp_path / "p")
