"""ONNX: every family says in onnxruntime what it says in PyTorch, alone, in ragged batches and in chunks; and a machine without PyTorch predicts."""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT
from test_numerics import SMALL, made, noise, small_model  # noqa: F401  (made: a fixture)

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[onnx]'")

from prosody_ser import alignment  # noqa: E402
from prosody_ser.cli import main  # noqa: E402
from prosody_ser.export import ExportError, _about, _check_graph, _graphs, _quantise, export_onnx  # noqa: E402
from prosody_ser.folder import FolderError  # noqa: E402
from prosody_ser.inference import Predictor  # noqa: E402
from prosody_ser.model import Collator, create_model  # noqa: E402
from prosody_ser.onnx import OnnxError, OnnxPredictor  # noqa: E402
from prosody_ser.tokenizer import TokenizerError  # noqa: E402

torch.set_num_threads(1)
SECONDS = 1.3, 0.05, 2.71, 0.6


def same(a, b, eps=2e-3):
    """Two answers to 1e-3, and as much for the rounding of scores and times to three digits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], eps) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y, eps) for x, y in zip(a, b, strict=True))
    return abs(a - b) <= eps if type(a) is float and type(b) is float else a == b


def speech(seconds, seed=0):
    """A hum that rises and falls, and noise."""
    t = np.arange(round(16000 * seconds)) / 16000
    return (0.2 * np.sin(2 * np.pi * (150 + 60 * np.sin(3 * t)) * t) * np.sin(np.pi * t) ** 2 + 0.02 * np.random.default_rng(seed).normal(size=len(t))).astype(np.float32)


@pytest.fixture(scope="module", params=SMALL)
def exported(request, made, tmp_path_factory):  # noqa: F811
    """A small random model of each family, whose CTC places words, in PyTorch and in ONNX."""
    model = small_model(made, request.param, max_seconds=3.0, emotion_temperature=2.5, norm_temperature=0.8, usual=dict(distance=1.0, seconds=0.2), whisper_tail_seconds=0.5 if request.param == "whisper" else 0.0)
    model.asr_nats.fill_(0.0)
    folder = tmp_path_factory.mktemp("onnx") / request.param
    about = export_onnx(model, folder)
    assert max(about["differs"].values()) < 1e-4 and about["precision"] == "float32"
    return Predictor(model, "cpu", "greedy"), OnnxPredictor(folder, threads=1)


# ------------------------------------------------------------------------------------------------------- as in PyTorch

def test_ragged_batch(exported):
    """Logits of all heads and the probabilities, to 1e-3, of a batch of other sizes and lengths than were traced."""
    torchs, ours = exported
    model, rows = torchs.model, [speech(s, i) for i, s in enumerate(SECONDS)]
    batch = Collator(model.processor.tokenizer)([dict(audio=r, words=["me", "kɔ"][:1 + i % 2], prosody=None, emotion=0, row=i) for i, r in enumerate(rows)])
    with torch.no_grad():
        out = model(**batch)
        lengths, dense = out.lengths, out.asr_logits
    found = ours.encode(rows)
    assert [len(f["ser"]) for f in found] == lengths.tolist()
    padded = {t: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(f[t]) for f in found], batch_first=True).numpy() for t in model.config.tasks}
    emotion, distance = ours._run("ser", padded["ser"], lengths.numpy())
    np.testing.assert_allclose(distance, out.emotion_distance, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(emotion, out.emotion_logits, atol=1e-3)
    np.testing.assert_allclose(torch.tensor(emotion).softmax(-1), out.emotion_logits.softmax(-1), atol=1e-3)
    tokens, = ours._run("asr", padded["asr"])
    words, = ours._run("prosody", padded["prosody"], lengths.numpy(), out.spans.numpy())
    for i, n in enumerate(lengths.tolist()):
        np.testing.assert_allclose(tokens[i, :n], dense[i, :n], atol=1e-3)
        np.testing.assert_allclose(words[i, :1 + i % 2], out.prosody_logits[i, :1 + i % 2], atol=1e-3)


@pytest.mark.parametrize("seconds", [0.05, 0.06, 1.234, 3.0, 3.01, 7.7])
def test_answers(exported, seconds):
    """The same dict, for recordings of a chunk of 3 s and of several, for decoded words, given ones, more than there are frames, and none."""
    torchs, ours = exported
    for words in (None, "me kɔ fie", ["bra"], "bra ha me kɔ fie " * 40, []):
        wanted, found = dict(torchs(speech(seconds), words=words)), ours(speech(seconds), words=words)
        assert same(wanted, found), (words, wanted, found)
        assert json.loads(json.dumps(found)) == found
    assert set(found) == {"seconds", "emotion", "probabilities", "unusual", "transcript", "aligned", "alignment_score", "words"}


def test_batch_is_alone(exported):
    """What a recording says does not depend on what it is encoded with; group norm hears the padding, as in PyTorch."""
    torchs, ours = exported
    rows = [speech(s, i) for i, s in enumerate((1.3, 7.7, 0.6))]
    for row, together in zip(rows, ours.encode(rows), strict=True):
        for task, h in ours.encode([row])[0].items():
            assert h.shape == together[task].shape
            if torchs.model.backbone.masked:
                np.testing.assert_allclose(h, together[task], atol=1e-3)


def test_alignment_that_is_not_usable(made, tmp_path):  # noqa: F811
    """An even split until CTC places words, or where prominence is not to use it: as in PyTorch."""
    model, folder = small_model(made, "tiny"), tmp_path / "out"
    files = export_onnx(model, folder)["files"]
    for name, settings, nats in (("untrained", {}, float("inf")), ("uniform", dict(prosody_alignment="uniform"), 0.0), ("usable", {}, alignment.USABLE_NATS)):
        model.asr_nats.fill_(nats)
        model.config.prosody_alignment = settings.get("prosody_alignment", "ctc")
        (folder / "onnx.json").write_text(json.dumps(_about(model, False) | dict(files=files)))
        wanted, found = (p(speech(2), words="me kɔ fie") for p in (Predictor(model, "cpu", "greedy"), OnnxPredictor(folder)))
        assert same(dict(wanted), found) and (found["alignment_score"] is None) == (name == "untrained")


@pytest.mark.parametrize("tasks", ["ser", "asr", "ser prosody"])
def test_some_heads(made, tmp_path, tasks):  # noqa: F811
    """A head that is absent has no graph, and its part of the answer is absent; layers may be unmixed, and pooling of any kind."""
    tokenizer = made[1] if "asr" in tasks else None
    model = create_model(["a", "b"] if "ser" in tasks else None, tokenizer, tasks=tasks.split(), layer_mix="prosody" in tasks, pooling="attentive")
    export_onnx(model, tmp_path / "out")
    assert {p.stem for p in (tmp_path / "out").glob("*.onnx")} == {"encoder", *tasks.split()}
    for words in (None, "me kɔ"):
        wanted, found = (p(speech(1.1), words=words) for p in (Predictor(model, "cpu", "greedy"), OnnxPredictor(tmp_path / "out")))
        assert same(dict(wanted), found), (wanted, found)


def test_files_and_arrays(made, tmp_path):  # noqa: F811
    """Any rate, any type, a manifest's stretch; what is mended or cannot be written is told as in PyTorch."""
    from prosody_ser.data import Utterance
    model = small_model(made, "tiny")
    export_onnx(model, tmp_path / "out")
    torchs, ours = Predictor(model, "cpu", "greedy"), OnnxPredictor(tmp_path / "out")
    sf.write(tmp_path / "a.wav", np.stack([speech(2), speech(2)], 1), 44100)
    for audio, rate in ((tmp_path / "a.wav", 16000), (str(tmp_path / "a.wav"), 16000), (np.round(speech(2) * 32767).astype(np.int16), 8000), (Utterance(str(tmp_path / "a.wav"), start=0.2, end=0.5), 16000)):
        assert same(dict(torchs(audio, rate)), ours(audio, rate))
    with pytest.warns(UserWarning, match="1 of 2 words have letters without a piece, such as 'QX'"):
        ours(speech(1), words=["me", "QX"])
    with pytest.warns(UserWarning, match="silent"):
        ours(np.zeros(8000))
    with pytest.raises(ValueError, match="one channel"):
        ours(np.zeros((2, 8000)))
    with pytest.raises(ValueError, match="no such audio file"):
        ours("gone.wav")


# -------------------------------------------------------------------------------------------------------- eight bits

def test_int8(exported, tmp_path):
    """A smaller encoder whose matrices are integers, near the full one, for every family."""
    import onnx
    torchs, ours = exported
    shutil.copytree(ours.folder, tmp_path / "int8")
    encoder, about = tmp_path / "int8/encoder.onnx", json.loads((tmp_path / "int8/onnx.json").read_text())
    _quantise(encoder)
    assert encoder.stat().st_size < about["files"]["encoder.onnx"] and "MatMulInteger" in {n.op_type for n in onnx.load(encoder).graph.node}
    about["files"]["encoder.onnx"] = encoder.stat().st_size
    (tmp_path / "int8/onnx.json").write_text(json.dumps(about))
    small = OnnxPredictor(tmp_path / "int8", threads=1)
    row = speech(1.3)
    for task, h in ours.encode([row])[0].items():
        other = small.encode([row])[0][task]
        assert 0 < np.abs(h - other).max() < 0.5 * np.abs(h).max() and np.corrcoef(h.ravel(), other.ravel())[0, 1] > 0.98
    assert set(small(row)) == set(ours(row))


# ------------------------------------------------------------------------------------------------------ without PyTorch

@pytest.fixture(scope="module")
def usual(made, tmp_path_factory):  # noqa: F811
    """A model on disk, its export, and a recording."""
    folder = tmp_path_factory.mktemp("usual")
    model = small_model(made, "tiny")
    model.asr_nats.fill_(0.0)
    model.save_pretrained(folder / "model")
    export_onnx(folder / "model", folder / "out")
    sf.write(folder / "speech.wav", speech(2.2), 22050)
    return folder, dict(Predictor(folder / "model", "cpu", "greedy")(folder / "speech.wav", words="me kɔ fie"))


def test_for_speaker(usual):
    """Speaker norm without PyTorch: as `Predictor.for_speaker` says; an older export says what it lacks."""
    folder, _ = usual
    sounds = [speech(1 + i / 4, i) for i in range(3)]
    wanted = Predictor(folder / "model", "cpu", "greedy").for_speaker(sounds)
    plain = OnnxPredictor(folder / "out")
    heard = plain.for_speaker(sounds)
    for sound in sounds:
        assert heard(sound)["probabilities"] == pytest.approx(wanted(sound).probabilities, abs=2e-4)
    assert heard(sounds[0])["probabilities"] != plain(sounds[0])["probabilities"]
    with pytest.raises(OnnxError, match="none was given"):
        plain.for_speaker([])
    del plain.about["centre"]
    with pytest.raises(OnnxError, match="Export the model again"):
        plain.for_speaker(sounds)


SAY = "import json, sys; from prosody_ser.onnx import OnnxPredictor; print(json.dumps(OnnxPredictor('out')('speech.wav', words='me kɔ fie'))); print(*sorted(sys.modules))"
ABSENT = "torch", "transformers", "sklearn", "scipy", "pandas", "matplotlib", "tqdm", "jiwer", "accelerate", "safetensors"


def test_without_torch_by_a_finder(usual):
    """Imports that raise: in this environment, with everything else at hand."""
    folder, wanted = usual
    block = f"import sys\nclass Refuse:\n    def find_spec(self, name, *more):\n        if name.split('.')[0] in {ABSENT!r}: raise ImportError(name)\nsys.meta_path.insert(0, Refuse())\n"
    done = subprocess.run([sys.executable, "-c", block + SAY], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(json.loads(done.stdout.splitlines()[0]), wanted)


def test_import_needs_no_torch():
    """Nor does importing the room import PyTorch where it is installed."""
    code = "import sys, prosody_ser.onnx; assert not {'torch', 'transformers', 'matplotlib', 'onnxruntime'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def packages(*names):
    """The folders and files of some installed packages, and of what they need: what a fresh environment is given."""
    from importlib.metadata import distribution
    for name in names:
        d = distribution(name)
        tops = {Path(f).parts[0] for f in d.files if ".." not in f.parts and "__pycache__" not in f.parts}
        yield from (Path(d.locate_file(t)) for t in tops)


@pytest.mark.skipif(os.name == "nt", reason="links to packages")
def test_without_torch_in_an_environment(usual, tmp_path):
    """A virtual environment with onnxruntime, numpy, soundfile, soxr and sentencepiece, what these need, and nothing else."""
    folder, wanted = usual
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv/lib").glob("python3*/site-packages"))
    for path in packages("onnxruntime", "flatbuffers", "protobuf", "packaging", "numpy", "soundfile", "cffi", "pycparser", "soxr", "sentencepiece", "typing_extensions"):
        if not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    shutil.copytree(ROOT / "prosody_ser", site / "prosody_ser", ignore=shutil.ignore_patterns("__pycache__"))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    python = tmp_path / "venv/bin/python"
    assert subprocess.run([python, "-c", "import torch"], env=env, capture_output=True).returncode
    done = subprocess.run([python, "-c", SAY], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(json.loads(done.stdout.splitlines()[0]), wanted)
    assert not set(ABSENT) & set(done.stdout.splitlines()[1].split())
    start = "from prosody_ser.cli import main; main()"
    calls = [["-c", start, "predict", "out", "speech.wav"], ["-c", start, "predict", "model", "speech.wav"], ["-c", start, "serve", "model"], ["-c", start, "export", "model", "new"],
             ["-c", "import prosody_ser as ps; ps.Predictor('out')"], ["-c", "import prosody_ser as ps; ps.train"]]
    for call in calls:                                  # what needs PyTorch says so, and names what does not
        done = subprocess.run([python, *call], cwd=folder, env=env, capture_output=True, text=True)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and "is not installed here" in last and "prosody_ser.onnx.OnnxPredictor(FOLDER)(FILE)" in last, (call, done.stderr[-1500:])
        assert call[1] != start or len(done.stderr.splitlines()) == 1, (call, done.stderr[-1500:])


# --------------------------------------------------------------------------------------------------------- what is wrong

def test_command(usual, tmp_path, capsys):
    """Writes and says what; a second time over its own; not over something else, which stays as it is."""
    folder, wanted = usual
    for more in ([], ["--int8"]):
        main(["export", str(folder / "model"), str(tmp_path / "out"), *more])
        told = capsys.readouterr().out
        assert {Path(line.split("  ")[0]).name for line in told.splitlines()} == {p.name for p in (tmp_path / "out").iterdir()}      # all files, and no other
    assert json.loads((tmp_path / "out/onnx.json").read_text())["precision"] == "int8"
    OnnxPredictor(tmp_path / "out")(speech(1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/ser.onnx").write_text("mine")
    for out, why in (("mine", "mine has ser.onnx already"), ("out/onnx.json", "onnx.json")):
        with pytest.raises(SystemExit) as e:
            main(["export", str(folder / "model"), str(tmp_path / out)])
        assert why in str(e.value) and "Traceback" not in str(e.value)
    assert [(p.name, p.read_text()) for p in (tmp_path / "mine").iterdir()] == [("ser.onnx", "mine")]
    with pytest.raises(SystemExit, match="no checkpoint there"):
        main(["export", str(tmp_path / "gone"), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_what_lies_beside_stays(usual, tmp_path):
    """A file of the user's in the folder stays; graphs of heads that the new model lacks go."""
    folder, _ = usual
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    export_onnx(create_model(["a", "b"], tasks=["ser"]), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["encoder.onnx", "features.npz", "notes.txt", "onnx.json", "ser.onnx"]


@pytest.mark.parametrize("name", ["encoder.onnx", "ser.onnx", "asr.onnx", "prosody.onnx", "features.npz", "tokenizer.model", "onnx.json"])
def test_incomplete_folder(usual, tmp_path, name):
    """Each file that is missing, cut off or another's is named."""
    folder, _ = usual
    whole = (folder / "out" / name).read_bytes()
    for content in (None, whole[:len(whole) // 2], b""):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(folder / "out", tmp_path / "out")
        (tmp_path / "out" / name).unlink()
        if content is not None:
            (tmp_path / "out" / name).write_bytes(content)
        with pytest.raises(OnnxError, match=name):
            OnnxPredictor(tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(b"{}".ljust(len(whole)))
    with pytest.raises((OnnxError, TokenizerError), match=name):
        OnnxPredictor(tmp_path / "out")


def test_missing_packages(usual):
    """The extra is named, by the room that exports and by the one that predicts."""
    folder, _ = usual
    block = "import sys\nclass Refuse:\n    def find_spec(self, name, *more):\n        if name.split('.')[0] == {!r}: raise ImportError(name)\nsys.meta_path.insert(0, Refuse())\n"
    done = subprocess.run([sys.executable, "-c", block.format("onnxruntime") + SAY], cwd=folder, capture_output=True, text=True)
    assert done.returncode and "there is no onnxruntime here: pip install onnxruntime." in done.stderr
    from prosody_ser.export import _need
    with pytest.raises(ImportError, match=r"no_such_thing: pip install 'prosody-ser\[onnx\]'"):
        _need("onnxruntime", "no_such_thing")


def test_a_graph_that_differs_is_refused(usual, made):  # noqa: F811
    """The comparison after the export finds a graph of other weights."""
    folder, _ = usual
    model = small_model(made, "tiny").eval().requires_grad_(False)
    for name in ("encoder.onnx", "ser.onnx", "asr.onnx", "prosody.onnx"):
        module, inputs, _, _, batch = _graphs(copy.deepcopy(model))[name]
        assert _check_graph(folder / "out" / name, module.eval(), inputs, batch) < 1e-4
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.05)
        with pytest.raises(ExportError, match="differs from PyTorch by"):
            _check_graph(folder / "out" / name, module.eval(), inputs, batch)


def test_no_name_of_this_machine_in_the_files(usual):
    """The exporter notes source files and lines; none of that leaves."""
    folder, _ = usual
    for file in (folder / "out").iterdir():
        assert str(ROOT).encode() not in file.read_bytes() and sys.prefix.encode() not in file.read_bytes(), file
