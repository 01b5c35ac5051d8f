"""A corpus in one tar: written, read, damaged, half written, of another corpus, copied to another disk."""
import errno
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from unittest.mock import patch

import numpy as np
import pytest
import soundfile as sf
from conftest import read, write

from prosody_ser import pack as pack_room
from prosody_ser.audio import AudioStream, check_audio, decode_audio, hear_all, load_audio, load_utterance
from prosody_ser.batches import SpeechDataset
from prosody_ser.data import read_manifest
from prosody_ser.files import find_audio
from prosody_ser.folder import StorageError
from prosody_ser.pack import PackError, open_pack, stage_audio
from prosody_ser.text import ManifestError

SPLITS = "train", "val", "test"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A film of 20 s of 16-bit samples that reach full scale, of which rows name parts; and a file at 44.1 kHz."""
    folder, rng = tmp_path_factory.mktemp("film"), np.random.default_rng(1)
    (folder / "film").mkdir()
    sf.write(folder / "film" / "kɔ.wav", rng.integers(-32768, 32768, 320000).astype(np.int16), 16000)
    sf.write(folder / "b.flac", .3 * rng.normal(size=(44100, 2)).clip(-3, 3), 44100)
    times = [(0.5, 2.25), (2.25, 2.75), (None, 0.5), (19.0, None), (3.0, 3.7)]
    rows = [dict(audio_filepath="film/kɔ.wav", words=["bra"], emotion="joy", speaker="ama", start=a, end=b) for a, b in times]
    write(folder / "film.jsonl", [*rows, dict(audio_filepath="b.flac", words=["ha"], emotion="anger", speaker="esi")])
    return folder


def make(command, folder, out, *more, manifests=None):
    """A pack of a folder's manifests."""
    manifests = manifests or sorted(folder.glob("*.jsonl"))
    code, said = command("pack", *manifests, "--audio_base_path", folder, "--out", out, *more)
    assert code == 0, said
    return said


def same(rows, folder, base):
    """Whether the audio of rows is the same from two places."""
    return all(np.array_equal(load_utterance(u, folder), load_utterance(u, base)) for u in rows)


def test_parts_are_what_the_manifest_says(film, tmp_path, command):
    said = make(command, film, tmp_path / "c.tar", manifests=[film / "film.jsonl", film / "film.jsonl"])
    assert "6 sounds of 12 rows" in said and "clipped" not in said and "differ" not in said
    rows = read_manifest(film / "film.jsonl")
    assert same(rows[:5], film, tmp_path / "c.tar")                     # 16 kHz, 16 bit: sample by sample
    there, packed = load_utterance(rows[5], film), load_utterance(rows[5], tmp_path / "c.tar")
    assert there.shape == packed.shape and 0 < np.abs(there - packed).max() <= 0.5 / 32768
    np.testing.assert_array_equal(check_audio(rows[:5], tmp_path / "c.tar"), [1.75, 0.5, 0.5, 1, 0.7])
    a, b = (load_audio(base / "film/kɔ.wav", 0.5, 2.25, most=1) for base in (film, tmp_path / "c.tar"))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(ManifestError, match=r"kɔ.wav, 1 to 2 s, is not in the pack. .*pack again"):
        decode_audio(tmp_path / "c.tar/film/kɔ.wav", 1.0, 2.0)
    with pytest.raises(ManifestError, match=r"none.wav is not in the pack"):
        find_audio(tmp_path / "c.tar/none.wav")


def test_a_timeline_has_the_times_of_the_file(film, tmp_path, command):
    make(command, film, tmp_path / "c.tar")
    loose, packed = (AudioStream(base / "film/kɔ.wav", 0.5, 2.25) for base in (film, tmp_path / "c.tar"))
    assert (packed.start, packed.seconds, packed.notes) == (loose.start, loose.seconds, loose.notes) == (0.5, 1.75, {})
    np.testing.assert_array_equal(np.concatenate(list(packed)), np.concatenate(list(loose)))


def test_keep_keeps_bytes(film, tmp_path, command):
    said = make(command, film, tmp_path / "c.tar", "--keep")
    assert "2 sounds of 6 rows" in said
    with tarfile.open(tmp_path / "c.tar") as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar}
    assert found["000000.wav"] == (film / "film/kɔ.wav").read_bytes()
    assert found["000001.flac"] == (film / "b.flac").read_bytes()
    assert [r["start"] for r in json.loads(found["000000.json"])["rows"][:2]] == [0.5, 2.25]
    rows = read_manifest(film / "film.jsonl")
    assert same(rows, film, tmp_path / "c.tar")
    whole = decode_audio(tmp_path / "c.tar/film/kɔ.wav", 1.0, 2.0)[0]       # any part of a whole file
    np.testing.assert_array_equal(whole, decode_audio(film / "film/kɔ.wav", 1.0, 2.0)[0])


def _read_all(base, manifest, queue):
    rows = read_manifest(manifest)
    queue.put([float(np.abs(load_utterance(u, base)).sum()) for u in rows])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_read_at_the_same_time(corpus, tmp_path, command, start):
    make(command, corpus, tmp_path / "c.tar", "--shard_mb", "0.1")
    base, manifest = str(tmp_path / "c-*.tar"), corpus / "train.jsonl"
    rows = read_manifest(manifest)
    hear_all(rows, base)                                                # open before the processes begin
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    workers = [context.Process(target=_read_all, args=(base, manifest, queue)) for _ in range(3 if start == "fork" else 1)]
    for w in workers:
        w.start()
    found = [queue.get(timeout=60) for _ in workers]
    for w in workers:
        w.join()
    assert found == [[float(np.abs(load_utterance(u, corpus)).sum()) for u in rows]] * len(workers)
    hear_all(rows, base, threads=8)


def test_parts_of_a_pack(corpus, tmp_path, command):
    said = make(command, corpus, tmp_path / "c.tar", "--shard_mb", "0.1")
    parts = sorted(tmp_path.glob("c-*.tar"))
    assert len(parts) > 2 and f"'{tmp_path}/c-*.tar'" in said and all(p.stat().st_size < 130_000 for p in parts)
    rows = [u for s in SPLITS for u in read_manifest(corpus / f"{s}.jsonl")]
    assert same(rows, corpus, tmp_path / "c-*.tar")
    with pytest.raises(PackError, match=rf"1 of the {len(parts)} parts .* number 0 is not. Name all: .*in quotes"):
        open_pack(parts[1])
    parts[1].unlink()
    other = tmp_path / "other"
    shutil.copytree(tmp_path, other)
    with pytest.raises(PackError, match=rf"{len(parts) - 1} of the {len(parts)} parts .* number 1 is not"):
        open_pack(other / "c-*.tar")
    make(command, corpus, other / "c-more.tar")
    with pytest.raises(PackError, match="parts of 2 packs"):
        open_pack(other / "c-*.tar")


def test_webdataset_reads_a_pack(film, tmp_path, command):
    webdataset = pytest.importorskip("webdataset")
    make(command, film, tmp_path / "c.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "c.tar"), shardshuffle=False).decode())
    rows = read(film / "film.jsonl")
    assert [s["json"] for s in samples] == [{k: v for k, v in r.items() if v is not None} for r in rows]
    for s, u in zip(samples, read_manifest(film / "film.jsonl"), strict=True):
        heard, rate = sf.read(io.BytesIO(s["flac"]), dtype="float32")
        np.testing.assert_array_equal(heard, load_utterance(u, tmp_path / "c.tar"))
        assert rate == 16000


def damage(path, place, data=b"\xff" * 64):
    """Write over a few bytes of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def test_a_damaged_member_is_named_and_the_others_work(corpus, tmp_path, command):
    make(command, corpus, tmp_path / "c.tar")
    rows = read_manifest(corpus / "train.jsonl")
    member = find_audio(tmp_path / "c.tar" / rows[3].audio_filepath)
    damage(tmp_path / "c.tar", member.place + 300)
    why = rf"train3.wav: member {member.name} of .*c.tar is damaged: .* Copy the pack again"
    with pytest.raises(ManifestError, match=rf"train.jsonl:4: .*{why}"):
        load_utterance(rows[3], tmp_path / "c.tar")
    assert same(rows[:3] + rows[4:], corpus, tmp_path / "c.tar")
    with pytest.raises(ManifestError, match=rf"^1 of 12 utterances have no usable audio:\n.*{why}"):
        hear_all(rows, tmp_path / "c.tar")
    code, said = command("audit", corpus / "train.jsonl", "--audio_base_path", tmp_path / "c.tar")
    assert code == 1 and said.count("is damaged") == 1


def test_a_tar_that_is_not_whole(corpus, tmp_path, command):
    make(command, corpus, tmp_path / "c.tar")
    data, manifest = (tmp_path / "c.tar").read_bytes(), corpus / "train.jsonl"
    for n in (len(data) // 2, len(data) - 512, len(data) - 1024, len(data) - 1536, 700):
        (tmp_path / "half.tar").write_bytes(data[:n])
        with pytest.raises(PackError, match="half.tar: the pack has no end: it is still being written or copied"):
            hear_all(read_manifest(manifest), tmp_path / "half.tar")         # one sentence, not one a row
    (tmp_path / "other.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(corpus / "train0.wav")
    for path in ("other.tar", "none.tar"):
        code, said = command("audit", manifest, "--audio_base_path", tmp_path / path)
        assert code == 1 and said.count("\n") < 3 and ("no whole pack" in said or "not a whole pack" in said or "no such pack" in said)


def test_an_index_of_another_tar(corpus, film, tmp_path, command):
    make(command, corpus, tmp_path / "a.tar")
    make(command, corpus, tmp_path / "b.tar")                           # the same rows, and so the same sizes
    a, b = ((tmp_path / f"{x}.tar").read_bytes() for x in "ab")
    at = json.loads(a[-1536:-1024])["at"]
    assert len(a) == len(b) and a != b
    (tmp_path / "mixed.tar").write_bytes(a[:at] + b[at:])
    with pytest.raises(PackError, match="mixed.tar: the index is of another tar. Copy the pack anew, or pack again"):
        load_utterance(read_manifest(corpus / "train.jsonl")[0], tmp_path / "mixed.tar")
    half = at // 2 // 512 * 512
    (tmp_path / "later.tar").write_bytes(a[:half] + b[half:at] + a[at:])    # from the middle on it is another's
    rows = read_manifest(corpus / "train.jsonl")
    assert same(rows, corpus, tmp_path / "later.tar")                   # the same bytes
    (tmp_path / "longer.tar").write_bytes(bytes(512) + a)
    with pytest.raises(PackError, match="is of another tar"):
        open_pack(tmp_path / "longer.tar")
    damage(tmp_path / "a.tar", at + 50)
    with pytest.raises(PackError, match="the index is damaged"):
        open_pack(tmp_path / "a.tar")


def test_a_pack_that_is_packed_again_is_read_anew(corpus, tmp_path, command):
    make(command, corpus, tmp_path / "c.tar", manifests=[corpus / "val.jsonl"])
    rows = read_manifest(corpus / "train.jsonl")
    with pytest.raises(ManifestError, match="not in the pack"):
        hear_all(rows, tmp_path / "c.tar")
    with pytest.raises(ManifestError, match="nothing is written over"):
        with pack_room.writing(tmp_path / "c.tar"):
            pass
    make(command, corpus, tmp_path / "new.tar")
    os.replace(tmp_path / "new.tar", tmp_path / "c.tar")
    find_audio(tmp_path / "c.tar" / "val0.wav")
    assert same(rows, corpus, tmp_path / "c.tar")


def test_what_cannot_be_packed_is_told_and_nothing_is_left(corpus, tmp_path, command):
    rows = read(corpus / "train.jsonl")
    rows[1]["audio_filepath"] = str(corpus / "train1.wav")
    rows[2]["audio_filepath"] = "none.wav"
    manifest = write(tmp_path / "m.jsonl", rows)
    code, said = command("pack", manifest, "--audio_base_path", corpus, "--out", tmp_path / "c.tar")
    assert code == 1 and "2 of 12 utterances have no usable audio" in said and "m.jsonl:2" in said and "m.jsonl:3" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl"]
    code, said = command("pack", manifest, "--audio_base_path", corpus, "--out", tmp_path / "c.zip")
    assert code == 1 and "ends in .tar" in said


def test_samples_beyond_full_scale_are_told(tmp_path, command):
    sf.write(tmp_path / "a.wav", np.float32([.5, 1.5, -.5] * 3000), 16000, subtype="FLOAT")
    write(tmp_path / "m.jsonl", [dict(audio_filepath="a.wav", emotion="joy"), dict(audio_filepath="a.wav", emotion="anger")])
    said = make(command, tmp_path, tmp_path / "c.tar")
    assert "1 sounds go beyond full scale" in said and "m.jsonl:1" in said and "rows that differ, such as" in said and "m.jsonl:2" in said
    make(command, tmp_path, tmp_path / "k.tar", "--keep")
    np.testing.assert_array_equal(load_audio(tmp_path / "k.tar/a.wav"), load_audio(tmp_path / "a.wav"))


def test_what_is_known_of_a_pack_moves_with_it(corpus, tmp_path, command):
    make(command, corpus, tmp_path / "c.tar")
    rows, index = read_manifest(corpus / "train.jsonl"), tmp_path / "audio_index.jsonl"
    hear_all(rows, tmp_path / "c.tar", index=index)
    shutil.copy(tmp_path / "c.tar", tmp_path / "moved.tar")
    before = index.read_bytes()
    with patch("prosody_ser.audio.hear", side_effect=AssertionError):
        hear_all(rows, tmp_path / "moved.tar", index=index)
    assert index.read_bytes() == before


@pytest.fixture
def packed(corpus, tmp_path, command):
    """A pack in a folder of its own, and another folder to stage to."""
    (tmp_path / "drive").mkdir()
    make(command, corpus, tmp_path / "drive/c.tar", "--shard_mb", "0.1")
    return tmp_path / "drive/c-*.tar", tmp_path / "stage"


def test_a_staged_pack_is_the_same_and_is_used_again(corpus, packed):
    source, stage = packed
    base = stage_audio(str(source), str(stage))
    rows = read_manifest(corpus / "train.jsonl")
    assert base.startswith(str(stage)) and same(rows, corpus, base)
    with patch.object(pack_room, "_copy", side_effect=AssertionError):
        assert stage_audio(str(source), str(stage)) == base
    shard = sorted(source.parent.glob("*.tar"))[1]
    copy = next(stage.rglob(shard.name))
    copy.write_bytes(copy.read_bytes()[:-2000])                         # of another size: not believed
    assert stage_audio(str(source), str(stage)) == base and copy.read_bytes() == shard.read_bytes()


def test_half_a_copy_goes_on_and_is_checked(packed, corpus):
    source, stage = packed
    shard = sorted(source.parent.glob("*.tar"))[0]
    data, real = shard.read_bytes(), pack_room._copy
    copy = stage / open_pack(source).shards[0].id / shard.name
    copy.parent.mkdir(parents=True)
    half = copy.with_name(f"{copy.name}.new")
    for begun in (data[:50_000], data[:20_000] + bytes(30_000), data + b"more"):        # right; wrong; too long
        copy.unlink(missing_ok=True)
        half.write_bytes(begun)
        with patch.object(pack_room, "_copy", wraps=real) as copies:
            base = stage_audio(str(source), str(stage))
        assert copy.read_bytes() == data and not list(stage.rglob("*.new"))
        again = [c for c in copies.call_args_list if c.args[0] == str(shard)]
        assert len(again) == (2 if begun[20_000:50_000] == bytes(30_000) else 1)
        assert same(read_manifest(corpus / "train.jsonl"), corpus, base)


def test_a_mount_that_breaks_while_it_is_copied(packed, corpus):
    source, stage = packed
    shards, real = sorted(source.parent.glob("*.tar")), pack_room._copy

    def breaks(path, target, *more):
        if path != str(shards[1]):
            return real(path, target, *more)
        target.with_name(f"{target.name}.new").write_bytes(shards[1].read_bytes()[:5000])
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", path)
    with patch.object(pack_room, "_copy", breaks), pytest.raises(StorageError) as e:
        stage_audio(str(source), str(stage))
    assert "\n" not in str(e.value) and "Bring the disk back and start the same command again" in str(e.value)
    assert f"of {len(shards)} files are whole there" in str(e.value)
    assert not list(stage.rglob(shards[1].name))                        # only under another name
    assert same(read_manifest(corpus / "train.jsonl"), corpus, stage_audio(str(source), str(stage)))


def test_loose_files_are_staged(corpus, film, tmp_path):
    rows = read_manifest(film / "film.jsonl")
    base = stage_audio(str(film), str(tmp_path / "s"), rows)
    assert same(rows, film, base) and sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["b.flac", "kɔ.wav"]
    with patch.object(pack_room, "_copy", side_effect=AssertionError):
        stage_audio(str(film), str(tmp_path / "s"), rows)
    (tmp_path / "s2").mkdir()
    with patch.object(pack_room.shutil, "disk_usage") as usage:
        usage.return_value.free = 1000
        with pytest.raises(StorageError, match="are to be copied, .* are free. Make room"):
            stage_audio(str(film), str(tmp_path / "s2"), rows)
    rows[0].audio_filepath = "../x.wav"
    with pytest.raises(PackError, match="film.jsonl:1: .*leads out of --audio_base_path"):
        stage_audio(str(film), str(tmp_path / "s"), rows)
    with pytest.raises(PackError, match="give --audio_base_path"):
        stage_audio("", str(tmp_path / "s"), rows)


def test_train_evaluate_and_predict_from_a_pack(corpus, packed, tmp_path, command):
    from prosody_ser.evaluate import players
    from prosody_ser.run import Run
    source, stage = packed
    manifests = [x for s in SPLITS for x in (f"--{s}_jsonl", corpus / f"{s}.jsonl")]
    small = ["--backbone", "tiny", "--vocab_size", "30", "--tokenizer_type", "char", "--num_epochs", "1", "--eval_steps", "0"]
    for name, base, more in (("loose", corpus, ()), ("pack", source, ("--num_workers", "2", "--stage_dir", stage))):
        how = [*small, *manifests, "--save_dir", tmp_path / name, "--num_workers", "0", *more]
        code, said = command("train", "--audio_base_path", base, *how)
        assert code == 0, said
    loose, packed_run = (read(tmp_path / name / "test/predictions.jsonl") for name in ("loose", "pack"))
    assert loose == packed_run and len(loose) == 6
    assert Run(tmp_path / "pack").settings["audio_base_path"] == str(source)        # not the copy, which may go
    assert list(stage.rglob("*.tar")) and "<audio" in players(loose[:1], source)[0]
    code, said = command("evaluate", "--checkpoint_path", tmp_path / "loose/best_model", "--test_jsonl", corpus / "test.jsonl",
                         "--audio_base_path", source, "--output_dir", tmp_path / "eval")
    assert code == 0 and read(tmp_path / "eval/predictions.jsonl") == loose, said
    answers = [command("predict", tmp_path / "loose/best_model", corpus / "test.jsonl", "--audio_base_path", base) for base in (corpus, source)]
    assert answers[0] == answers[1] and answers[0][0] == 0


def test_a_pattern_without_quotes_is_told(corpus, packed, command):
    parts = sorted(packed[0].parent.glob("*.tar"))
    code, said = command("evaluate", "--checkpoint_path", "m", "--test_jsonl", corpus / "test.jsonl", "--audio_base_path", *parts)
    assert code == 2 and "in quotes: --audio_base_path 'corpus-*.tar'" in said


def test_a_mount_that_breaks_in_training(corpus, packed):
    from prosody_ser.files import open_audio
    source, _ = packed
    data = SpeechDataset(read_manifest(corpus / "train.jsonl"), str(source), ["anger", "joy"])
    with patch.object(pack_room.os, "pread", side_effect=OSError(errno.EIO, "Input/output error")):
        with pytest.raises(ManifestError, match=r"train.jsonl:1: .*train0.wav: may not be read \(Input/output error\)"):
            data[0]
    assert len(data[0]["audio"])
    with pytest.raises(ManifestError):
        open_audio(source / "none.wav")
