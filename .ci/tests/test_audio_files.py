"""Audio is taken at its word: what a file says it is and how long, what its numbers mean, where it lies."""
import io
import json
import os
import struct
import unicodedata
import warnings
from dataclasses import replace

import numpy as np
import pytest
import soundfile as sf
from conftest import write
from test_commands import TINY, command, manifests

from prosody_ser.audio import check_audio, given_samples, hear, load_audio, load_utterance, open_stream
from prosody_ser.audit import audit
from prosody_ser.data import ManifestError, Utterance, read_manifest, read_rows
from prosody_ser.files import find_audio

RATE = 16000
T = np.arange(2 * RATE) / RATE
VOICE = (0.3 * np.sin(2 * np.pi * 220 * T) * np.sin(np.pi * T) ** 2).astype("float32")      # 2 s, ends and begins silent
NOISE = (VOICE + 0.1 * np.random.default_rng(0).normal(size=len(T))).astype("float32")


def encoded(samples=VOICE, **form):
    """The bytes of a sound file."""
    file = io.BytesIO()
    sf.write(file, samples, RATE, **form)
    return file.getvalue()


def heard(path, **stretch):
    """Samples, and the warnings told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return load_audio(path, **stretch), [str(w.message) for w in told]


def fault(path, **stretch):
    """The one line that a file that cannot be used is answered with; it speaks of no manifest."""
    with pytest.raises(ManifestError) as told:
        load_audio(path, **stretch)
    text = str(told.value)
    assert "\n" not in text and "row" not in text and "audio_filepath" not in text, text
    return text


def file(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


CUT = [("wav", "WAV", "PCM_16"), ("wav", "WAV", "FLOAT"), ("wav", "WAVEX", "PCM_24"), ("wav", "WAV", "IMA_ADPCM"), ("wav", "RF64", "PCM_16"),
       ("w64", "W64", "PCM_16"), ("aiff", "AIFF", "PCM_16"), ("aifc", "AIFF", "ULAW"), ("au", "AU", "PCM_16"), ("sph", "NIST", "PCM_16")]


@pytest.mark.parametrize("ending,form,subtype", CUT)
def test_a_cut_file_is_named_with_both_lengths(tmp_path, ending, form, subtype):
    """Whole it is heard as it is; of its half the message has the seconds that are there and those that were."""
    data = encoded(format=form, subtype=subtype)
    whole = file(tmp_path, f"whole.{ending}", data)
    samples, told = heard(whole)
    assert told == [] and abs(len(samples) - len(VOICE)) < 1100 and np.abs(samples[:32000] - VOICE).max() < 0.02
    text = fault(file(tmp_path, f"cut.{ending}", data[:len(data) // 2]))
    assert text.startswith(f"{tmp_path}/cut.{ending}: the file is cut off: ") and text.endswith("Copy it again."), text
    there, was = map(float, text.split("(")[1].split(" s)")[0].split(" of "))
    assert there == pytest.approx(1, abs=0.06) and was == pytest.approx(2, abs=0.06), text


def test_cut_flac_ogg_mp3(tmp_path):
    """They tell how far they go, as far as the format knows it."""
    data = encoded(np.tile(NOISE, 4), format="FLAC")
    text = fault(file(tmp_path, "a.flac", data[:len(data) // 2]))
    assert "cut off or damaged: " in text and " of 8.00 s can be decoded" in text
    assert 2 < float(text.split("damaged: ")[1].split()[0]) < 4.1
    for subtype in ("VORBIS", "OPUS"):
        data = encoded(np.tile(NOISE, 4), format="OGG", subtype=subtype)
        text = fault(file(tmp_path, "a.ogg", data[:len(data) // 2 + 7]))
        assert "the file is cut off: it ends within a page" in text
    data = encoded(np.tile(NOISE, 4), format="MP3")
    text = fault(file(tmp_path, "a.mp3", data[:len(data) // 2]))
    there, was = text.split("cut off: ")[1].split(" s are there")[0].split(" of ")
    assert float(there) == pytest.approx(4, abs=0.2) and float(was) == pytest.approx(8, abs=0.1)


def test_unfinished_headers_are_read_to_the_end(tmp_path):
    """A recorder that died or wrote into a pipe left 0 or the largest number: all its samples are heard."""
    data = encoded(format="WAV", subtype="PCM_16")
    for n, tells in ((0, True), (20000, True), (0xFFFFFFFF, False), (0x7FFFF000, False)):
        samples, told = heard(file(tmp_path, "pipe.wav", data[:40] + struct.pack("<I", n) + data[44:]))
        np.testing.assert_array_equal(samples, heard(file(tmp_path, "true.wav", data))[0])
        assert ("header was never finished" in " ".join(told)) == tells
    au = encoded(format="AU", subtype="PCM_16")
    assert len(heard(file(tmp_path, "zero.au", au[:8] + bytes(4) + au[12:]))[0]) == len(VOICE)
    assert "second recording" in fault(file(tmp_path, "two.wav", data + data))


def test_mp3_of_varying_rate_without_its_tag(tmp_path):
    """It is heard to its end, and its samples are those of the tagged file."""
    sound = np.concatenate([NOISE, NOISE, NOISE, 0.001 * NOISE])
    with sf.SoundFile(tagged := io.BytesIO(), "w", RATE, 1, format="MP3", bitrate_mode="VARIABLE", compression_level=0.2) as f:
        f.write(sound)
    tagged = tagged.getvalue()
    untagged = tagged[tagged.index(b"\xff\xf3", 4):]                 # behind the frame that bears the tag
    assert b"Xing" in tagged[:200] and b"Xing" not in untagged
    path = file(tmp_path, "untagged.mp3", untagged)
    assert sf.info(path).duration < 6                                # what the header's first rate makes believe
    right, told = heard(file(tmp_path, "tagged.mp3", tagged))
    assert told == [] and len(right) == len(sound)
    samples, _ = heard(path)
    assert 8 <= len(samples) / RATE < 8.2
    late = min(range(1, 1500), key=lambda i: np.abs(samples[i:i + 100000] - right[:100000]).max())
    np.testing.assert_allclose(samples[late:late + 100000], right[:100000], atol=1e-3)
    np.testing.assert_allclose(load_audio(path, 1, 2), samples[RATE:2 * RATE], atol=1e-6)


KINDS = {"voice.m4a": (b"\0\0\0\x18ftypM4A \0\0\0\0", "MP4 (M4A, AAC). Convert it: ffmpeg -i"),
         "rec.wav": (b"\x1aE\xdf\xa3\x01\0\0\0", "WebM or Matroska. Convert it: ffmpeg -i"),
         "lfs.wav": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer, not the sound itself. Get the file: git lfs pull"),
         "annex.wav": (b"/annex/objects/SHA256E-s9--0.wav\n", "a git-annex pointer, not the sound itself. Get the file: git annex get"),
         "sphere.wav": (b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n".ljust(2000, b"\1"), "NIST SPHERE, compressed. Convert it: sph2pipe"),
         "login.wav": (b"<!doctype html><html>", "a web page, not the sound. Download it again"),
         "call.raw": (np.int16(9999 * NOISE).tobytes(), "Where it is raw samples, give it a header, such as: ffmpeg -f s16le -ar 16000 -ac 1 -i"),
         "zeros.wav": (bytes(4000), "nothing but zeros. Copy it again"), "empty.wav": (b"", "empty (0 bytes). Copy it again"),
         "notes.wav": ("ɛyɛ\n".encode() * 20, "text, not sound"), "amr.wav": (b"#!AMR\n\1\2", "AMR. Convert it: ffmpeg -i"),
         "zip.wav": (b"PK\3\4\1\2", "an archive. Unpack it")}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_sound_file_is_called_by_its_name(tmp_path, monkeypatch, name):
    """On a machine without ffmpeg, whatever is installed here."""
    monkeypatch.setenv("PATH", str(tmp_path))
    data, what = KINDS[name]
    text = fault(file(tmp_path, name, data))
    assert text.startswith(f"{tmp_path}/{name}: cannot be decoded: ") and what in text, text


def test_wrong_endings_do_not_matter(tmp_path):
    """A WAV called .raw or .mp3 is a WAV."""
    for name in ("a.raw", "a.mp3", "a"):
        np.testing.assert_allclose(heard(file(tmp_path, name, encoded(format="WAV")))[0], VOICE, atol=1e-4)


def test_folders_pipes_and_names(tmp_path, monkeypatch):
    """Another Unicode form is the same name; what else may be meant is told, and what is there instead."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my wavs").mkdir()
    sound = encoded(format="WAV")
    file(tmp_path, "my wavs/" + unicodedata.normalize("NFD", "Kofí_é.wav"), sound)
    file(tmp_path, "my wavs/a b.wav", sound)
    samples, told = heard("my wavs/" + unicodedata.normalize("NFC", "Kofí_é.wav"))
    np.testing.assert_allclose(samples, VOICE, atol=1e-4)
    assert len(told) == 1 and "another Unicode form" in told[0]
    assert heard("./my wavs/../my wavs/a b.wav")[1] == []
    for name in ("my wavs\\a b.wav", "my wavs/A B.WAV", "my wavs/a b.mp3"):
        assert "my wavs/a b.wav is there: if that is meant" in fault(name)
    monkeypatch.setenv("HOME", str(tmp_path / "my wavs"))
    assert f"{tmp_path}/my wavs/a b.wav is there" in fault("~/a b.wav")
    assert "this is a folder. Name the files in it: my wavs/*.wav" in fault("my wavs")
    assert "too long (3000 letters)" in fault("x" * 3000) and len(fault("x" * 3000)) < 250
    assert "NUL" in fault("a\0b.wav")
    assert fault("gone/a.wav").endswith("There is no folder gone.")
    os.symlink("nowhere", tmp_path / "link.wav")
    assert "a link to nowhere, which is not there" in fault("link.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    assert "neither a file nor a folder" in fault("pipe.wav")            # and does not wait for it
    assert find_audio("my wavs/a b.wav") == "my wavs/a b.wav"


def test_antiphase_gives_the_left_channel(tmp_path):
    """Channels that cancel out are not averaged to silence; others are averaged as ever."""
    for right in (-1, -0.98):
        sf.write(tmp_path / "anti.wav", np.stack([VOICE, right * VOICE], 1), RATE, subtype="FLOAT")
        samples, told = heard(tmp_path / "anti.wav")
        np.testing.assert_array_equal(samples, VOICE)
        assert len(told) == 1 and "antiphase" in told[0]
    for right in (1, 0, 0.5):
        sf.write(tmp_path / "both.wav", np.stack([VOICE, right * VOICE], 1), RATE, subtype="FLOAT")
        samples, told = heard(tmp_path / "both.wav")
        np.testing.assert_allclose(samples, (1 + right) / 2 * VOICE, atol=1e-7)
        assert told == []


PCM = np.round(VOICE * 32767).astype(np.int16)
GIVEN = {"int16": PCM, "int32": PCM.astype(np.int32) << 16, "16 bits in int32": PCM.astype(np.int32), "int64": PCM.astype(np.int64), "list": PCM.tolist(),
         "uint16": (PCM.astype(int) + 32768).astype(np.uint16), "uint8": (PCM // 256 + 128).astype(np.uint8), "int8": (PCM // 256).astype(np.int8),
         "float64": PCM / 32768, "16 bits in floats": PCM.astype(np.float32), "offset": VOICE + 0.2}


@pytest.mark.parametrize("name", GIVEN)
def test_given_samples_mean_the_same_in_each_type(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(given_samples(GIVEN[name], RATE), VOICE, atol=0.01 if name.endswith("int8") else 2e-4)


def test_scales_in_files(tmp_path):
    """Each width of file gives the same samples; floats of 16-bit numbers are divided, of an unknown scale refused."""
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"):
        sf.write(tmp_path / "a.wav", VOICE, RATE, subtype=subtype)
        samples, told = heard(tmp_path / "a.wav")
        np.testing.assert_allclose(samples, VOICE, atol=0.008 if subtype == "PCM_U8" else 4e-5)
        assert told == [] or subtype == "PCM_U8", subtype            # of 8 bits the writer rounds down: an offset of half a step
    for subtype in ("FLOAT", "DOUBLE"):
        sf.write(tmp_path / "a.wav", VOICE * 32768, RATE, subtype=subtype)
        samples, told = heard(tmp_path / "a.wav")
        np.testing.assert_allclose(samples, VOICE, atol=1e-6)
        assert len(told) == 1 and "divided by 32768" in told[0]
        np.testing.assert_array_equal(heard(tmp_path / "a.wav", start=0, end=0.1)[0], samples[:1600])    # the scale is the file's
    for scale, cure in ((30, "It is too loud"), (2 ** 23, "Divide them"), (2 ** 31, "Divide them")):
        sf.write(tmp_path / "a.wav", VOICE * scale, RATE, subtype="FLOAT")
        assert f"where full scale is 1. {cure}" in fault(tmp_path / "a.wav")
    sf.write(tmp_path / "a.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    assert "NaN or infinite" in fault(tmp_path / "a.wav")


def both_faults(path, **times):
    """What is said of a file by either way to read it."""
    said = []
    for read in (lambda: load_utterance(Utterance(str(path), **times)), lambda: list(open_stream(Utterance(str(path), **times)))):
        with pytest.raises(ManifestError) as e:
            read()
        said.append(str(e.value))
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize("peak, cure", [(2.48, "too loud: turn it down where it was made, or divide all samples by 2.48"), (127, "128 for 8 bit"), (8e6, "8388608 for 24 bit")])
def test_the_cure_fits_the_peak(tmp_path, peak, cure):
    """A float file that is a little too loud is not one of whole numbers."""
    x = np.sin(np.arange(16000) * 0.1)
    sf.write(tmp_path / "a.wav", x * peak / np.abs(x).max(), 16000, "FLOAT")
    said = both_faults(tmp_path / "a.wav")
    assert cure in said and ("32768" not in said)


def test_no_samples_and_too_few(tmp_path):
    """A header alone is called that; start and end are spoken of only where there are some."""
    for subtype in ("PCM_16", "FLOAT"):
        sf.write(tmp_path / "empty.wav", np.zeros(0), 16000, subtype)
        for times in (dict(), dict(start=0.0, end=1.0), dict(start=2.0)):
            assert "the file has no samples, only a header" in (said := both_faults(tmp_path / "empty.wav", **times)) and "start" not in said
    sf.write(tmp_path / "short.wav", np.ones(300) * 0.1, 16000)
    assert "0.019 s of audio" in (said := both_faults(tmp_path / "short.wav")) and "Record it again" in said and "start" not in said
    sf.write(tmp_path / "whole.wav", np.ones(16000) * 0.1, 16000)
    assert "Check start/end" in both_faults(tmp_path / "whole.wav", start=0.5, end=0.52)


@pytest.mark.parametrize("offset", [0.01, 0.4, -0.2])
def test_an_offset_is_taken_away(tmp_path, offset):
    sf.write(tmp_path / "a.wav", VOICE + offset, RATE, subtype="FLOAT")
    samples, told = heard(tmp_path / "a.wav")
    np.testing.assert_allclose(samples, VOICE, atol=1e-3)
    assert len(told) == 1 and f"an offset of {offset:.3f} is taken away" in told[0]


TIMES = {(200, 1200): "They look like milliseconds: divide by 1000", (None, 1200): "They look like milliseconds: divide by 1000",
         (3200, 19200): "They look like samples: divide by 16000", (0.2, 9.0): "beyond the file's end at 2.00 s", (2.05, None): "beyond the file's end",
         (1.99, 2): "the least is 0.05 s"}


@pytest.mark.parametrize("start,end", TIMES)
def test_times_in_another_unit(tmp_path, start, end):
    """They are refused with line, file and cure, and not read to the end of the file."""
    sf.write(tmp_path / "a.wav", VOICE, RATE)
    write(tmp_path / "m.jsonl", [dict(audio_filepath="a.wav", start=0.5, end=1.5), dict(audio_filepath="a.wav", start=start, end=end)])
    good, bad = read_manifest(tmp_path / "m.jsonl", tmp_path)
    assert load_utterance(good).shape == (RATE,)
    assert load_utterance(replace(good, end=2.06)).shape == (24000,)                 # rounded up by who wrote it
    for use in (load_utterance, lambda u: check_audio([good, u])):
        with pytest.raises(ManifestError) as told:
            use(bad)
        assert f"{tmp_path / 'm.jsonl'}:2: {tmp_path / 'a.wav'}: " in str(told.value) and TIMES[start, end] in str(told.value)


@pytest.mark.parametrize("times", [dict(start="0.2"), dict(start=True, end=2), dict(end=True), dict(start=1.2, end=0.2), dict(start=-0.1), dict(end=10 ** 400)])
def test_times_that_are_none(tmp_path, times):
    """The manifest refuses them: true is no second."""
    write(tmp_path / "m.jsonl", [dict(audio_filepath="a.wav") | times])
    right, problems = read_rows(tmp_path / "m.jsonl")
    assert right == [] and [p.kind for p in problems] == ["start, end"]


def test_whole_numbers_of_seconds(tmp_path):
    """An audit of segments whose starts are integers in some rows and fractions in others."""
    sf.write(tmp_path / "a.wav", VOICE, RATE)
    times = [(0, 1), (0.5, 1.5), (1, None)]
    write(tmp_path / "m.jsonl", [dict(audio_filepath="a.wav", start=s, end=e, words=["a"], emotion="joy") for s, e in times])
    found = {f.check: f for f in audit(dict(m=read_manifest(tmp_path / "m.jsonl", tmp_path)), audio_base_path=tmp_path)}
    assert "audio" not in found and "median 1.0 s" in found["durations"].examples[0]


def test_the_audit_tells_what_was_mended(tmp_path):
    """Each kind has its finding; a fault is a fault, and the length that its row claims counts nowhere."""
    sf.write(tmp_path / "ok.wav", VOICE, RATE)
    sf.write(tmp_path / "antiphase.wav", np.stack([0.5 * VOICE, -0.5 * VOICE], 1), RATE, subtype="FLOAT")
    sf.write(tmp_path / "offset.wav", 0.7 * VOICE + 0.2, RATE, subtype="FLOAT")
    sf.write(tmp_path / "scale.wav", 30000 * VOICE, RATE, subtype="FLOAT")
    data = encoded(0.6 * VOICE, format="WAV", subtype="PCM_16")
    file(tmp_path, "header.wav", data[:40] + bytes(4) + data[44:])
    file(tmp_path, unicodedata.normalize("NFD", "é.wav"), encoded(0.4 * VOICE, format="WAV"))
    file(tmp_path, "cut.wav", data[:len(data) // 2])
    rows = [Utterance(f"{name}.wav", source=f"m:{i}") for i, name in enumerate(["ok", "antiphase", "offset", "scale", "header", "\u00e9", "cut"], 1)]
    rows.append(Utterance("ok.wav", start=0, end=60, source="m:8"))
    found = {f.check: f for f in audit(dict(m=rows), audio_base_path=tmp_path)}
    for check, i in {"antiphase": 2, "offset": 3, "numbers in floats": 4, "unfinished files": 5, "file names": 6}.items():
        assert found[check].count == 1 and found[check].examples[0].startswith(f"m:{i}: "), check
    assert found["audio"].count == 2 and "long" not in found and "longest 2.0 s" in found["durations"].examples[0]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert check_audio(rows[:6] + rows[1:2], tmp_path).tolist() == [2] * 7
    told = sorted(str(w.message) for w in told)
    assert len(told) == 5 and told[-1].startswith("2 of 7 utterances were mended, such as m:2: its channels cancel out"), told
    assert hear(rows[6], tmp_path).keys() == {"problem"}


def test_commands(corpus, tmp_path):
    """Training, evaluation and prediction hear the same and tell it; what one of them refuses all refuse."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for path in corpus.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, change in {"train1": lambda x: np.stack([x, -x], 1), "test1": lambda x: x + 0.2}.items():
        sf.write(folder / f"{name}.wav", change(sf.read(corpus / f"{name}.wav")[0]), RATE, subtype="FLOAT")
    common = ["--audio_base_path", folder, "--tokenizer_path", tmp_path / "tok.model"]
    training = ["prosody_ser.train", *common, *manifests(folder), "--save_dir", tmp_path / "run", *TINY]
    done = command(*training)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout + done.stderr
    assert "rows have channels that cancel out" in told and "rows have a constant offset" in told
    model = ["--checkpoint_path", tmp_path / "run/best_model"]
    evaluation = ["prosody_ser.evaluate", *common, *model, "--test_jsonl", folder / "test.jsonl", "--output_dir", tmp_path / "eval"]
    done = command(*evaluation)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 of 6 utterances were mended" in done.stderr and "test.jsonl:2: an offset of 0.200 is taken away" in done.stderr
    done = command("prosody_ser.cli", "predict", folder / "test1.wav", corpus / "test1.wav", *model)
    shifted, plain = map(json.loads, done.stdout.splitlines())
    assert shifted["emotion"] == plain["emotion"] and shifted["probabilities"] == pytest.approx(plain["probabilities"], abs=1e-2)
    assert "test1.wav: an offset of 0.200 is taken away" in done.stderr
    data = (corpus / "test1.wav").read_bytes()
    for name in ("train1", "test1"):
        file(folder, f"{name}.wav", data[:len(data) // 2])
    refused = [command(*training, "--save_dir", tmp_path / "other"), command(*evaluation), command("prosody_ser.cli", "predict", folder / "test1.wav", *model)]
    for done in refused:
        assert done.returncode == 1 and "the file is cut off: " in done.stderr and "Traceback" not in done.stderr, done.stderr
