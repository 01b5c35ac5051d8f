"""What a stranger's files may do: nothing is unpickled, written outside of its folder, shown as markup or told to a tracker's reader."""
import ast
import json
import os
import pickle
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import ROOT, read, write
from test_commands import train
from test_faults import on

from prosody_ser.audit import audit_manifests
from prosody_ser.backbones import BackboneError, load_encoder
from prosody_ser.cli import main
from prosody_ser.data import read_manifest
from prosody_ser.evaluate import evaluate_model
from prosody_ser.inference import Predictor, Prediction
from prosody_ser.model import CheckpointError, load_checkpoint
from prosody_ser.run import Run

SOURCES = sorted((ROOT / "prosody_ser").glob("*.py"))


# ---------------------------------------------------------------------------------------------------------- the source

def name_of(node):
    """The dotted name of a call's function."""
    return ast.unparse(node.func)


def problems(source):
    """What of a module would run what a file says, or hand words to a shell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            names = [] if ast.unparse(node) == "from pickle import UnpicklingError" else names      # an error, which reads nothing
            yield from (f"import {n}" for n in names if n.split(".")[0] in ("pickle", "_pickle", "cPickle", "joblib", "dill", "cloudpickle", "marshal", "shelve", "yaml"))
        if not isinstance(node, ast.Call):
            continue
        given, name = {k.arg: ast.unparse(k.value) for k in node.keywords}, name_of(node)
        if name in ("eval", "exec", "compile", "__import__") or name.startswith(("os.system", "os.popen", "os.spawn", "os.exec")):
            yield name
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if name.endswith(("read_pickle", "to_pickle")) or name.startswith(("pickle.", "yaml.load", "np.loads")):
            yield name
        yield from (f"{k}={v} in {name}" for k, v in given.items() if (k in ("allow_pickle", "shell", "trust_remote_code") and v != "False") or (k == "weights_only" and v != "True"))
        if name.endswith(".eval") and node.args and not name.startswith("looked_at."):      # a frame's eval of a formula: those of the audit are its own
            yield f"{name} of a text"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_nothing_runs_what_a_file_says(path):
    assert list(problems(path.read_text(encoding="utf-8"))) == []


def test_the_search_finds_what_it_looks_for():
    for bad in ("import pickle", "from pickle import loads", "from joblib import load", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "yaml.load(x)", "eval(x)", "exec(x)", "os.system(x)",
                "subprocess.run(x, shell=True)", "AutoModel.from_pretrained(p, trust_remote_code=True)", "pd.read_pickle(p)", "frame.eval(text)"):
        assert list(problems(bad)), bad
    assert not list(problems("model.eval(); torch.load(p, weights_only=True); subprocess.run([x]); literal_eval(x)"))


# ---------------------------------------------------------------------------------------------------- pickles of others

class Payload:
    """A pickle that makes a file when it is read."""
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def evil(mark, path, form):
    """Write a malicious pickle, plain or as PyTorch's archive, and see that it is one."""
    data = dict(config="{}", state_dict={}, tokenizer=None, more=Payload(mark))
    if form == "archive":
        torch.save(data, path)
    else:
        path.write_bytes(pickle.dumps(data))
    probe = path.with_name("probe.bin")
    shutil.copy(path, probe)
    if form == "archive":
        torch.load(probe, weights_only=False)
    else:
        pickle.loads(probe.read_bytes())
    assert mark.is_dir(), "the payload does not work"
    mark.rmdir()
    probe.unlink()


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run with a checkpoint at its half, trained for two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    main(list(map(str, on(corpus, folder / "run", tokenizer_path=folder / "tok.model", num_epochs=2))))
    return folder


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["plain", "archive"])
def test_a_malicious_checkpoint_is_refused(trained, tmp_path, form, command):
    """A best_model.pt, and a folder with weights in a pickle, of a model or of a backbone: one line says what to do, and nothing runs."""
    mark = tmp_path / "mark"
    evil(mark, tmp_path / "best_model.pt", form)
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        load_checkpoint(tmp_path / "best_model.pt")
    model = tmp_path / "model"
    shutil.copytree(trained / "run/best_model", model)
    (model / "model.safetensors").unlink()
    shutil.copy(tmp_path / "best_model.pt", model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(model)
    for file in tmp_path / "best_model.pt", model:
        code, printed = command("predict", tmp_path / "any.wav", "--checkpoint_path", file)
        assert code == 1 and printed.count("\n") <= 2 and "error: " in printed and "Traceback" not in printed, printed
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    Wav2Vec2Model(Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)).save_pretrained(tmp_path / "xlsr")
    (tmp_path / "xlsr/model.safetensors").unlink()
    shutil.copy(tmp_path / "best_model.pt", tmp_path / "xlsr/pytorch_model.bin")
    with pytest.raises(BackboneError, match="cannot be read"):
        load_encoder("xlsr", tmp_path / "xlsr")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"])
def test_a_malicious_checkpoint_is_not_resumed(corpus, trained, tmp_path, name, command):
    """Whatever file of a checkpoint is a malicious pickle: nothing of it runs, and it is told which checkpoint it is."""
    shutil.copytree(trained / "run", tmp_path / "run")
    checkpoint, mark = Run(tmp_path / "run").latest_checkpoint(), tmp_path / "mark"
    evil(mark, checkpoint / name, "archive")
    assert checkpoint.name == "checkpoint-6"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    argv = on(corpus, tmp_path / "run", tokenizer_path=trained / "tok.model", num_epochs=3, resume=True)
    code, printed = command(*argv)
    assert not mark.exists()
    assert "Traceback" not in printed
    if name == "training_args.bin":                              # never read
        assert code == 0, printed
    else:
        said = "no run has written checkpoint-6/pytorch_model.bin" if name == "pytorch_model.bin" else f"{checkpoint}: cannot be read safely"
        assert code == 1 and said in printed, printed


def test_a_cut_checkpoint_is_not_resumed(corpus, trained, tmp_path, command):
    """A file that lost its end is told in the same way."""
    shutil.copytree(trained / "run", tmp_path / "run")
    checkpoint = Run(tmp_path / "run").latest_checkpoint()
    data = (checkpoint / "optimizer.pt").read_bytes()
    (checkpoint / "optimizer.pt").write_bytes(data[:len(data) // 2])
    code, printed = command(*on(corpus, tmp_path / "run", tokenizer_path=trained / "tok.model", num_epochs=3, resume=True))
    assert code == 1 and str(checkpoint) in printed and "cannot be read safely" in printed and "Traceback" not in printed, printed


def test_code_of_a_checkpoint_is_not_run(trained, tmp_path):
    """A config that asks for the code beside it (auto_map) gets ours; a backbone with code of its own is refused."""
    mark = tmp_path / "mark"
    model = tmp_path / "model"
    shutil.copytree(trained / "run/best_model", model)
    code = f"import os\nos.mkdir({str(mark)!r})\nfrom prosody_ser.model import ProsodySERConfig as C, ProsodySER as M\n"
    (model / "theirs.py").write_text(code)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | dict(auto_map={"AutoConfig": "theirs.C", "AutoModel": "theirs.M"})))
    assert load_checkpoint(model).config.model_type == "prosody_ser"
    (model / "config.json").write_text(json.dumps(settings | dict(model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModel": "theirs.M"})))
    with pytest.raises(CheckpointError):
        load_checkpoint(model)
    with pytest.raises(BackboneError):
        load_encoder("xlsr", model)
    assert not mark.exists()


# --------------------------------------------------------------------------------------------------- where files are put

def everything(folder, but=()):
    """All files below a folder, with size and time, without those of some folders."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and not any(p.is_relative_to(b) for b in but)}


@pytest.fixture(scope="module")
def outside(corpus, tmp_path_factory):
    """A corpus whose rows have ids, words and emotions that look like paths, and audio above its folder."""
    top = tmp_path_factory.mktemp("outside")
    base = top / "a/b/corpus"
    base.mkdir(parents=True)
    ids = ["../../x", "/tmp/../../etc/x", "..", "a/../../../x", "C:\\x", "-rf", "~/x", "$HOME", "x\nid", "con", ".", "\u202ex"]
    for split in ("train", "val", "test"):
        rows = read(corpus / f"{split}.jsonl")
        for i, r in enumerate(rows):
            target = top / f"a/{r['audio_filepath']}" if i % 3 else top / f"a/b/corpus/{r['audio_filepath']}"
            shutil.copy(corpus / r["audio_filepath"], target)
            r["audio_filepath"] = f"../../{r['audio_filepath']}" if i % 3 == 1 else str(target) if i % 3 else r["audio_filepath"]
            r |= dict(id=ids[i], speaker=f"../../{r['speaker']}", emotion=f"../../{r['emotion']}", words=["../../w", "/etc/w", "..", "w"][:len(r["words"])])
        write(base / f"{split}.jsonl", rows)
    return top


def test_names_of_a_manifest_are_no_places(outside, command):
    """Training with all trackers of files, a cache and timelines, evaluation, prediction with pictures, audit with fixes: each writes into the folders it was given."""
    base, work = outside / "a/b/corpus", outside / "a/b/work"
    work.mkdir()
    before = everything(outside)
    argv = on(base, work / "run", tokenizer_path=work / "tok.model", freeze_backbone=True, feature_cache=work / "cache", report_to="tensorboard", track_audio=True)
    code, printed = command(*argv)
    assert code == 0, printed
    assert (work / "run/test/report.html").is_file() and list((work / "cache").rglob("*.bin"))
    best, audio = work / "run/best_model", [base / r["audio_filepath"] for r in read(base / "test.jsonl")]
    audio += [base / ".." / "corpus" / p for p in audio[:1]]
    jobs = {"evaluate": ["evaluate", "--checkpoint_path", best, "--audio_base_path", base, "--test_jsonl", base / "test.jsonl", "--output_dir", work / "eval"],
            "predict": ["predict", *audio, "--checkpoint_path", best, "--plot_dir", work / "plots"],
            "audit": ["audit", *(base / f"{s}.jsonl" for s in ("train", "val", "test")), "--audio_base_path", base, "--fix", work / "fixed", "--plot", work / "audit.png"]}
    for name, job in jobs.items():
        code, printed = command(*job)
        assert "Traceback" not in printed and (code == 0 or name == "audit"), printed
    assert len(list((work / "plots").iterdir())) == len(audio)                # one that is named twice has two
    assert len(list((work / "fixed").iterdir())) == 3 and (work / "audit.png").is_file()
    assert everything(outside, [work]) == before
    assert not [p for p in work.rglob("*") if p.is_symlink() or not p.resolve().is_relative_to(work.resolve())]


def test_pictures_of_other_folders_have_other_names(trained, corpus, tmp_path, command):
    """No picture takes the place of another, whatever the folders are called; none is put elsewhere."""
    files = [tmp_path / "in" / name for name in ("a/b/x.wav", "a-b/x.wav", "a/b-x.wav", "x.wav", "../x.wav", "x.flac", "a/X.wav")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(corpus / "test0.wav", file)
    code, printed = command("predict", *files, "--checkpoint_path", trained / "run/best_model", "--plot_dir", tmp_path / "plots")
    assert code == 0, printed
    names = [p.name.casefold() for p in (tmp_path / "plots").iterdir()]
    assert len(set(names)) == len(files) and {p.suffix for p in (tmp_path / "plots").iterdir()} == {".png"}


# -------------------------------------------------------------------------------------------------------------- secrets

@pytest.fixture(scope="module")
def secret_run(corpus, tmp_path_factory):
    """A tracked run with keys in its environment, in a process of its own."""
    folder, keys = tmp_path_factory.mktemp("secrets"), {"WANDB_API_KEY": "d3adbeef" * 5, "HF_TOKEN": "hf_" + "Sup3rS3cret" * 3, "MLFLOW_TRACKING_PASSWORD": "Pa55w0rdPa55w0rd"}
    env = os.environ | keys | dict(WANDB_MODE="offline", WANDB_DIR=str(folder), WANDB_DATA_DIR=str(folder / "data"), WANDB_CACHE_DIR=str(folder / "cache"), WANDB_CONFIG_DIR=str(folder / "config"), PYTHONPATH=str(ROOT))
    done = train(corpus, folder, "--use_wandb", "--report_to", "tensorboard", "--checkpoint_interval", "1", cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, keys, done.stdout + done.stderr


def test_keys_are_nowhere(secret_run):
    """Neither in a file of the run, nor of its trackers, nor on the console."""
    folder, keys, printed = secret_run
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files) and any("tfevents" in p.name for p in files)
    for name, key in keys.items():
        assert key not in printed, name
        assert [p for p in files if key.encode() in p.read_bytes() or key.encode()[::-1] in p.read_bytes()] == [], name


# ------------------------------------------------------------------------------------------------------------------ HTML

EVIL = '<script>alert(1)</script><img src=x onerror=alert(1)>"\'&amp;'


class Tags(HTMLParser):
    """All tags and attributes of a page."""
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {k for k, _ in attrs}


def safe(page):
    """A page without a tag or an attribute that its text brought."""
    found = Tags(page)
    assert not found.tags & {"script", "iframe", "object", "link", "base", "form"} and not [a for a in found.attributes if a.startswith("on")], page[:2000]
    assert "<img src=x" not in page and "<script" not in page
    return True


@pytest.fixture(scope="module")
def evil_run(corpus, tmp_path_factory):
    """A run on a corpus whose every text is markup, and formulas besides."""
    folder = tmp_path_factory.mktemp("evil")
    place = EVIL.replace("/", "\u2215")
    (folder / place).mkdir()
    for split in ("train", "val", "test"):
        rows = read(corpus / f"{split}.jsonl")
        for i, r in enumerate(rows):
            shutil.copy(corpus / r["audio_filepath"], folder / place / r["audio_filepath"])
            r |= dict(audio_filepath=f"{place}/{r['audio_filepath']}", speaker=EVIL + r["speaker"], emotion=f"$\\frac$ {EVIL} {r['emotion']}", id=f"{EVIL}{i}",
                      words=[EVIL, "$\\frac$", "$x^$"][:len(r["words"])])
        write(folder / f"{split}.jsonl", rows)
    main(list(map(str, on(folder, folder / f"run {place}", tokenizer_path=folder / "tok.model", vocab_size=80, report_to="tensorboard"))))
    return folder, folder / f"run {place}"


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_report_and_notebook_views_show_text_as_text(evil_run):
    """The report, a run, its scores, a prediction, a manifest, an audit: names, words, emotions and paths are text in all of them; formulas in them too."""
    folder, place = evil_run
    page = (place / "test/report.html").read_text(encoding="utf-8")
    assert safe(page) and "&lt;script&gt;" in page
    rows = read_manifest(folder / "test.jsonl", folder)
    model = load_checkpoint(place / "best_model")
    scores = evaluate_model(model, rows, folder)
    predictor = Predictor(model, "cpu")
    answer = predictor(folder / rows[0].audio_filepath)
    assert isinstance(answer, Prediction) and answer.plot()._repr_png_()[:4] == b"\x89PNG"
    spoken = Prediction(dict(answer) | dict(words=[dict(word=EVIL, start=0.0, end=0.2), dict(word="$\\frac$", start=0.2, end=0.4)]), np.zeros(16000, np.float32))
    assert spoken.plot()._repr_png_()[:4] == b"\x89PNG"
    missing = [r for r in read(folder / "test.jsonl")]
    missing[0]["audio_filepath"] = f"{EVIL}.wav"
    missing[1]["words"] = [EVIL, EVIL, EVIL]
    _, found = audit_manifests([write(folder / "broken.jsonl", missing)], audio_base_path=folder)
    for view in (rows, Run(place), scores, answer, spoken, found):
        assert safe(view._repr_html_()), type(view)
    assert "&lt;script&gt;" in rows._repr_html_() and "&lt;script&gt;" in found._repr_html_() and "&lt;script&gt;" in spoken._repr_html_()


def test_widgets_show_text_as_text(evil_run):
    """The page that listens and the one that looks through predictions."""
    pytest.importorskip("ipywidgets")
    from prosody_ser import widget
    folder, place = evil_run
    records = Run(place).predictions("test")
    for record in records:
        assert safe(widget._record_html(record, records, "test", folder))
        assert safe(widget._record_html(record, records, "test", folder / "gone"))
    assert safe(widget._history_html(Run(place))) and safe(widget._warning(EVIL)) and "&lt;script&gt;" in widget._warning(EVIL)
    model = load_checkpoint(place / "best_model")
    assert safe(widget._answer_html(Predictor(model, "cpu")(folder / records[0]["audio_filepath"])))
