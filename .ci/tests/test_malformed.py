"""Broken manifests, audio, tokenizers, models and settings, made by a generator: each ends in the one right error or the one right
result, never in a traceback, in less than 5 seconds of computing."""
import json
import math
import shutil
import time
import warnings
from dataclasses import fields

import numpy as np
import pytest
import soundfile as sf
from conftest import read, write

from prosody_ser.audio import load_utterance
import prosody_ser.train  # noqa: F401  what the commands import is not counted with the first one
from prosody_ser.cli import main
from prosody_ser.config import ConfigError, TrainConfig
from prosody_ser.data import ManifestError, read_manifest
from prosody_ser.parsing import from_parameters

RNG = np.random.default_rng(0)
QUICK = dict(backbone="tiny", vocab_size=30, num_epochs=1, batch_size=4, num_workers=0)


def flags(**settings):
    """Settings as a command line; a text that begins with a dash stays a value."""
    return [f"--{k}={v}" for k, v in settings.items()]


def training(corpus, folder, **more):
    """A short training's command line."""
    manifests = {f"{s}_jsonl": corpus / f"{s}.jsonl" for s in ("train", "val", "test")}
    return ["train", *flags(**dict(audio_base_path=corpus, **manifests, save_dir=folder / "run", tokenizer_path=folder / "tok.model") | QUICK | more)]


def told(argv, command):
    """Exit code and text of a command. Whatever is raised but SystemExit is a traceback, and fails the test."""
    begin = time.process_time()
    code, text = command(*argv)
    assert time.process_time() - begin < 5
    assert "Traceback" not in text
    return code, text


def refused(argv, command, *parts):
    """The command ends with an error that holds these parts."""
    code, text = told(argv, command)
    assert code, f"accepted: {text[-500:]}"
    missing = [p for p in map(str, parts) if p.lower() not in text.lower()]
    assert not missing, f"{missing} not in: {text[-1500:]}"


def no(message, *values):
    """Values that are refused with this message."""
    return [(v, "refused", message) for v in values]


def yes(value, *values):
    """Values that are read as this one."""
    return [(v, "read", value) for v in values]


# ---- fields of a row

ABSENT = object()                                  # the field is left out
FIELDS = {
    "audio_filepath": no("audio_filepath is missing", ABSENT, None, 3, 2.5, True, [], {}, "", " ", "\t", ["a.wav"], "a\0.wav"),
    "words": no("words must be a list of non-empty strings", 5, 2.5, True, {}, "me kɔ", [1, 2], [None, "a"], [[], "a"], ["", "a"], [" ", "a"], ["a", "\n"], [], "NaN")
    + no("prosody_annotations without words", ABSENT, None, math.nan) + no("1 words but 2", ["a"]) + no("3 words but 2", ["a", "b", "c"]),
    "prosody_annotations": no("prosody_annotations must be a list of 0 and 1", 1, "01", True, {}, [2, 0], ["0", "1"], [1.5, 1], [-1, 0], [None, 0], [[0], [1]], [math.nan] * 2, ["x"] * 2)
    + no("2 words but 1", [0]) + no("2 words but 3", [0, 1, 1]) + no("2 words but 0", []) + yes([1, 0], [True, False], [1.0, 0.0]) + yes(None, ABSENT, None, math.nan),
    "emotion": no("emotion must be", [], {}, True, 1.5, -1, "", " ", "\n", ["joy"], {"joy": "1"}, math.inf, 10**9, 10**30, "nan", "<NA>", "null")
    + yes("joy", " joy\t") + yes(2, 2.0) + yes(None, ABSENT, None, math.nan),
    "speaker": no("speaker must be", [], {}, True, ["a"], {"id": 1}, "nan", "None", "<NA>", "null", math.inf) + yes(None, ABSENT, "", " ", None, math.nan) + yes("7", 7, 7.0, " 7"),
    "start": no("is not a stretch of time", "a", [], {}, -1, -0.1, True, 1e9, math.inf, "0.1", "", 0.8, "0:01") + yes(None, ABSENT, None, math.nan) + yes(0, 0),
    "end": no("is not a stretch of time", "a", [], {}, -1, 0, True, math.inf, "0.1", "") + yes(None, ABSENT, None, math.nan) + yes(0.5, 0.5),
}
ROWS = [pytest.param(field, *case, int(RNG.integers(12)), id=f"{field}-{i}") for field, cases in FIELDS.items() for i, case in enumerate(cases)]


@pytest.mark.parametrize("field, value, end, expected, at", ROWS)
def test_field(corpus, tmp_path, command, field, value, end, expected, at):
    """A row whose field holds something else; the message names file and line."""
    rows = read(corpus / "train.jsonl")
    rows[at] |= dict(words=["me", "kɔ"], prosody_annotations=[0, 1], start=0.0, end=0.7)
    rows[at][field] = value
    if value is ABSENT:
        del rows[at][field]
    path = write(tmp_path / "m.jsonl", rows)
    if end == "refused":
        refused(training(corpus, tmp_path, train_jsonl=path), command, f"{path}:{at + 1}", expected)
    else:
        assert getattr(read_manifest(path)[at], field) == expected


# ---- lines and files

def line(text):
    """A manifest whose fourth line is this."""
    return lambda good: b"\n".join([*good[:3], text if isinstance(text, bytes) else text.encode(), *good[4:]])


GOOD = b'{"audio_filepath": "a.wav", "words": ["me"]'
LINES = {                                            # all are refused with the number of the line
    "half": line(GOOD), "half a string": line(b'{"audio_filepath": "a.w'), "bare text": line("fie"), "a number": line("7"), "a list": line("[1, 2]"), "a text": line('"a.wav"'),
    "true": line("true"), "null": line("null"), "empty object": line("{}"), "empty list": line("[]"), "trailing comma": line(GOOD + b",}"), "single quotes": line("{'audio_filepath': 'a.wav'}"),
    "comment": line(b"// " + GOOD + b"}"), "hash": line("# a.wav"), "csv": line("a.wav,joy,me"), "yaml": line("audio_filepath: a.wav"), "two objects": line(GOOD + b"}" + GOOD + b"}"),
    "text after it": line(GOOD + b"} x"), "NUL": line(b"\0\0\0\0"), "NUL inside": line(b'{"audio_filepath": "a\0.wav"}'), "Latin-1": line(b'{"audio_filepath": "\xe9.wav"}'),
    "half a UTF-8 letter": line(b'{"audio_filepath": "\xc9'), "half a pair": line(b'{"audio_filepath": "a.wav", "words": ["\\ud83d"]}'), "unquoted key": line("{audio_filepath: 'a.wav'}"),
    "deep": line("[" * 100000 + "]" * 100000), "deep object": line('{"a":' * 100000 + "1" + "}" * 100000), "huge integer": line(GOOD + b', "emotion": ' + b"9" * 5000 + b"}"),
    "HTML": line("<!DOCTYPE html><html>"), "a merge's mark": line("<<<<<<< HEAD"), "ellipsis": line("..."), "control letter": line(b'{"audio_filepath": "a\x01.wav", "words": 3}'),
    "a word of 9,000 marks": line(GOOD + b', "prosody_annotations": [' + b"0," * 9000 + b"0]}"), "keys of another tool": line('{"path": "a.wav", "sentence": "me"}'),
}
FILES = {                                            # what is no manifest at all is told as such
    "empty": b"", "newlines": b"\n\n\n", "spaces": b"   \n  ", "PNG": b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "gzip": b"\x1f\x8b\x08\0" + bytes(range(100)), "zip": b"PK\x03\x04" + bytes(50),
    "WAV": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "CSV": b"audio_filepath,emotion\na.wav,joy\n", "HTML": b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "number": b"7", "text": b"hello",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "zeros": bytes(4096), "empty array": b"[]", "empty object": b"{}", "half an array": b'[{"audio_filepath": "a.wav"},',
    "pickle": b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}\x94.", "random": RNG.bytes(3000),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", LINES)
def test_line(corpus, tmp_path, command, kind, split):
    path = tmp_path / "m.jsonl"
    path.write_bytes(LINES[kind]((corpus / f"{split}.jsonl").read_bytes().splitlines()))
    refused(training(corpus, tmp_path, **{f"{split}_jsonl": path}), command, path if "NUL" in kind else f"{path}:4")    # a text has no NUL


@pytest.mark.parametrize("kind", FILES)
def test_file(corpus, tmp_path, command, kind):
    path = tmp_path / "m.jsonl"
    path.write_bytes(FILES[kind])
    refused(training(corpus, tmp_path, train_jsonl=path), command, path)


@pytest.mark.parametrize("path", ["", ".", "nowhere.jsonl", "a" * 300 + ".jsonl", "m\n.jsonl", "https://example.org/m.jsonl"])
def test_manifest_path(corpus, tmp_path, command, path):
    refused(training(corpus, tmp_path, train_jsonl=path), command, "manifest" if path else "train_jsonl is empty")


# ---- sound files: every damage is refused, or the right sound is heard; what is heard in part is told

FORMATS = {"wav": ("WAV", "PCM_16"), "24.wav": ("WAV", "PCM_24"), "float.wav": ("WAV", "FLOAT"), "ulaw.wav": ("WAV", "ULAW"), "rf64.wav": ("RF64", "PCM_16"), "w64": ("W64", "PCM_16"),
           "aiff": ("AIFF", "PCM_16"), "au": ("AU", "PCM_16"), "caf": ("CAF", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III")}
DAMAGE = {
    "a tenth": lambda b: b[:len(b) // 10], "half": lambda b: b[:len(b) // 2], "all but 5 %": lambda b: b[:len(b) * 19 // 20], "header": lambda b: b[:48], "4 bytes": lambda b: b[:4],
    "nothing": lambda b: b"", "zeros": lambda b: bytes(len(b)), "random": lambda b: np.random.default_rng(1).bytes(len(b)), "no header": lambda b: b[100:], "header of zeros": lambda b: bytes(64) + b[64:],
    "text": lambda b: b"hello\n" * 99, "JSON": lambda b: b'{"error": "not found"}', "HTML": lambda b: b"<!DOCTYPE html><html>Sign in</html>", "PNG": lambda b: b"\x89PNG\r\n\x1a\n" + b[8:],
    "pointer": lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n", "more at its end": lambda b: b + bytes(1001), "twice": lambda b: b + b, "as it is": lambda b: b,
}
SECONDS, RATE = 2.0, 16000
SOUND = (0.3 * np.sin(2 * np.pi * np.cumsum(np.linspace(120, 900, int(SECONDS * RATE))) / RATE)).astype(np.float32)


def alike(heard):
    """Whether this is the beginning of the sound, encoders' delays and losses aside."""
    n = min(len(heard), len(SOUND))
    spectrum = np.fft.irfft(np.fft.rfft(heard[:n], 2 * n) * np.fft.rfft(SOUND[:n], 2 * n).conj())
    return spectrum.max() / (np.linalg.norm(heard[:n]) * np.linalg.norm(SOUND[:n]) + 1e-9) > 0.95


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", FORMATS)
def test_sound_file(tmp_path, ending, damage):
    path = tmp_path / f"a.{ending}"
    form, subtype = FORMATS[ending]
    sf.write(path, SOUND, RATE if subtype != "OPUS" else 16000, format=form, subtype=subtype)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    row, = read_manifest(write(tmp_path / "m.jsonl", [dict(audio_filepath=path.name)]), tmp_path)
    begin = time.process_time()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            heard = load_utterance(row)
        except ManifestError as e:
            assert damage != "as it is" and "m.jsonl:1" in str(e) and path.name in str(e), str(e)
            return
    assert time.process_time() - begin < 5
    assert alike(heard), "another sound was heard"
    if len(heard) < 0.97 * len(SOUND) or damage == "as it is":
        assert (damage == "as it is") != any(path.name in str(w.message) for w in told), [str(w.message) for w in told]


# ---- tokenizers

@pytest.mark.parametrize("kind", ["empty", "random", "zeros", "PNG", "HTML", "pickle", "number", "LFS pointer", "folder", "half", "text"])
def test_tokenizer(corpus, tmp_path, command, kind):
    path = tmp_path / "tok.model"
    if kind == "folder":
        path.mkdir()
    elif kind == "half":
        main(["tokenizer", str(corpus / "train.jsonl"), *flags(tokenizer_path=path, vocab_size=30)])
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.write_bytes(FILES[kind])
    refused(training(corpus, tmp_path), command, path)


# ---- models

@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    main(list(map(str, training(corpus, folder))))
    return folder / "run/best_model"


MODEL_FILES = ["config.json", "model.safetensors", "tokenizer.model"]
MODEL_DAMAGE = {"gone": None, "empty": lambda b: b"", "half": lambda b: b[:len(b) // 2], "random": lambda b: RNG.bytes(500), "text": lambda b: b"hello", "object": lambda b: b"{}", "list": lambda b: b"[]",
                "pointer": lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n"}


def test_names_of_model_files(model):
    assert set(MODEL_FILES) <= {p.name for p in model.iterdir()}, sorted(p.name for p in model.iterdir())


def test_a_file_for_other_programs(corpus, model, tmp_path, command):
    """preprocessor_config.json is for them; without it the answer is the same."""
    shutil.copytree(model, tmp_path / "m", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    one, other = (told(["predict", "--checkpoint_path", m, corpus / "test0.wav"], command)[1].splitlines()[-1] for m in (model, tmp_path / "m"))
    assert "transcript" in one and json.loads(one) == json.loads(other)


@pytest.mark.parametrize("damage", MODEL_DAMAGE)
@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_file(corpus, model, tmp_path, command, name, damage):
    shutil.copytree(model, tmp_path / "m")
    file = tmp_path / "m" / name
    if MODEL_DAMAGE[damage] is None:
        file.unlink()
    else:
        file.write_bytes(MODEL_DAMAGE[damage](file.read_bytes()))
    refused(["predict", "--checkpoint_path", tmp_path / "m", corpus / "test0.wav"], command, tmp_path / "m")


# ---- settings

def bad_values(f):
    """Texts that cannot be a setting's value."""
    kind, choices = str(f.type), f.metadata.get("choices")
    if choices or "bool" in kind:
        return ["maybe", "", "0.5"]
    if "list[float]" in kind:
        return ["x", "nan", "inf", "-1", "1e400"]
    if "int" in kind:
        return ["x", "", "nan", "inf", "1e400", "1.5", "-1", "9" * 20]
    if "float" in kind:
        free = {"max_grad_norm", "max_batch_seconds"}
        return ["x", "", "nan", "0,5"] + ["inf", "1e400", "1e39"] * (f.name not in free) + ["-1"] * (f.name not in ("word_score",))
    return []


SETTINGS = [(f.name, v) for f in fields(TrainConfig) for v in bad_values(f)]


@pytest.mark.parametrize("name, value", SETTINGS)
def test_setting(corpus, tmp_path, command, name, value):
    refused(training(corpus, tmp_path, **{name: value}), command, f"--{name}")


WRONG_TYPES = [(f.name, v) for f in fields(TrainConfig) for v in ({"a": 1}, [[]], object) if not (f.name == "emotion_names" and v == [[]])]


@pytest.mark.parametrize("name, value", WRONG_TYPES)
def test_keyword(corpus, tmp_path, name, value):
    """The same in Python and in papermill's parameters: another type is refused by name."""
    base = dict(audio_base_path=str(corpus), train_jsonl="a.jsonl", val_jsonl="b.jsonl", save_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=name):
        from_parameters(TrainConfig, base | {name: value})


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"], ["train", "--nosuch", "1"], ["train", "--num_epoch=3"], ["train", "x"], ["predict"], ["predict", "--checkpoint_path", "nowhere", "a.wav"], ["audit"], ["audit", "no.jsonl"],
                                  ["evaluate"], ["evaluate", "--checkpoint_path", "nowhere"], ["compare", "a", "b"], ["gather", "nowhere"], ["lm"], ["tokenizer"], ["memory", "--backbone", "nosuch"], ["crossval"]],
                         ids=" ".join)
def test_command(command, argv):
    refused(argv, command)


def test_how_many():
    """The generator's size, which the page of troubles may state."""
    made = [ROWS, LINES, LINES, FILES, [1] * 6, [1] * (len(FORMATS) * (len(DAMAGE) - 1)), [1] * 11, [1] * (len(MODEL_FILES) * len(MODEL_DAMAGE)), SETTINGS, WRONG_TYPES, [1] * 18]
    assert sum(map(len, made)) > 300
