"""The Hub: a card that says what the run folder knows and nothing else, an upload of what belongs to the model, and Auto classes that load it. Only the calls
that would leave the machine are replaced."""
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from conftest import ROOT, read, write
from huggingface_hub import HfApi, ModelCard, metadata_load, utils
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from test_numerics import SMALL, made, small_model  # noqa: F401  (made: a fixture)
from test_old_run import OLD
from transformers import AutoConfig, AutoModel, AutoProcessor

from prosody_ser.config import ConfigError
from prosody_ser.folder import FolderError
from prosody_ser.hub import model_card, publish
from prosody_ser.inference import Predictor
from prosody_ser.model import CheckpointError, ProsodySER, ProsodySERConfig, ProsodySERProcessor, load_checkpoint
from prosody_ser.run import Run
from prosody_ser.train import train

torch.set_num_threads(1)
MADE_OF = dict(backbone="tiny", tokenizer_type="char", vocab_size=40, num_epochs=2, num_workers=0, checkpoint_interval=0, eval_steps=0, gradient_accumulation_steps=1,
               alpha_asr=2.0, head_lr=1e-3)


@pytest.fixture(scope="module")
def home(corpus, tmp_path_factory):
    """A folder of somebody with a corpus and a run."""
    folder = tmp_path_factory.mktemp("home_of_ama")
    shutil.copytree(corpus, folder / "corpus")
    files = [folder / "corpus" / f"{s}.jsonl" for s in ("train", "val", "test")]
    train(*files, save_dir=folder / "run", audio_base_path=folder / "corpus", **MADE_OF)
    return folder


@pytest.fixture(scope="module")
def run(home):
    return Run(home / "run")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub: what was asked of it, what was uploaded, and what is there already."""
    web = getattr(utils._http, "httpx2", None) or utils._http.httpx                    # the client of this version
    hub = SimpleNamespace(calls=[], there=None, library=None, status=200)

    def post(url, json, headers):
        hub.calls.append(("validate", json))
        return web.Response(hub.status, text="license is not known", request=web.Request("POST", url))

    def create_repo(api, repo_id, *, private=None, exist_ok=False):
        hub.calls.append(("create", dict(name=repo_id, private=private, exist_ok=exist_ok)))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def model_info(api, repo_id):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in hub.there or [".gitattributes"]], library_name=hub.library)

    def upload_folder(api, *, repo_id, folder_path, commit_message, delete_patterns):
        hub.calls.append(("upload", dict(name=repo_id, delete=delete_patterns)))
        shutil.copytree(folder_path, tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub.repocard, "get_session", lambda: SimpleNamespace(post=post))
    for call in (create_repo, model_info, upload_folder):
        monkeypatch.setattr(HfApi, call.__name__, call)
    return hub


def body(card):
    return card.split("---\n", 2)[2]


# ------------------------------------------------------------------------------------------------------------ the card

def test_card_is_read_as_it_was_written(run, tmp_path):
    """YAML, metadata and model-index come back from huggingface_hub's own readers; every score stands with floor and interval."""
    card = model_card(run, "ama/akan", "cc-by-4.0", ["tw", "no"], "AkaCE")
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    data = metadata_load(tmp_path / "README.md")
    assert (data["license"], data["language"], data["library_name"], data["pipeline_tag"]) == ("cc-by-4.0", ["tw", "no"], "prosody_ser", "audio-classification")
    assert "base_model" not in data                                                   # of random weights
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "akan" and eval_results_to_model_index(name, results) == data["model-index"]
    assert ModelCard(card).data.eval_results == results and body(str(ModelCard(card))) == body(card)
    assert yaml.safe_load(card.split("---\n")[1]) == data
    found = {r.metric_name.split(" (")[0]: r for r in results}
    metrics = run.metrics
    for shown, key, kind in (("emotion UA", "ser/ua", "audio-classification"), ("WER", "asr/wer", "automatic-speech-recognition"), ("prominence F1", "prosody/f1", "token-classification")):
        r = found[shown]
        assert (r.task_type, r.metric_value, r.dataset_name, r.dataset_split) == (kind, round(metrics[key], 4), "AkaCE", "test")
        assert f"floor {metrics[f'{key}_floor']:.3f}" in r.metric_name and f"95 % interval {metrics[f'{key}_low']:.3f} to {metrics[f'{key}_high']:.3f}" in r.metric_name
        assert r.dataset_revision == run.inputs["the rows of test_jsonl"]
    assert found["emotion UA"].metric_type == "recall" and found["emotion UA"].metric_args == {"average": "macro"} and "lower is better" in found["WER"].metric_name


def test_card_says_what_the_run_knows(run):
    card = model_card(run, "ama/akan", "cc-by-4.0", ["tw"], "AkaCE")
    for line in ("Corpus: AkaCE.", "Languages: tw.", "No speaker or film stands in two splits.", "Emotions: anger, joy.", "## Licence\n\ncc-by-4.0", "Test set, 6 utterances",
                 "  --alpha_asr 2.0", "  --backbone tiny", "  --tokenizer_type char", "prosody-ser train --audio_base_path DATA", "from random weights", "cai2021speech",
                 'Predictor("ama/akan")', "### Emotions", "### Abstention", "temperature 1, not fitted", "must not be\nused to decide"):
        assert line in card, line
    counts = re.search(r"utterances +(\d+) +(\d+) +(\d+)", card).groups()
    assert counts == ("12", "6", "6") and re.search(r"speakers or films +2 +2 +2", card)
    assert all(v in card for k, v in run.inputs.items() if k.startswith("the rows of"))
    truth = [r["emotion"] for r in run.predictions()]
    assert re.search(rf"\| anger \|.*\| {truth.count('anger')} \|", card)
    given = {flag for flag in re.findall(r"--(\w+)", card.split("```sh")[1].split("```")[0])}
    assert given <= set(run.settings) and "save_dir" not in given and "num_workers" not in given


def test_nothing_is_invented(run):
    card = model_card(run)
    data = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in data and "language" not in data and "datasets" not in data
    assert "No licence was given" in card and "Languages: not given." in card and "Corpus:" not in card and ".jsonl" not in str(data["model-index"])
    assert {r["dataset"]["name"] for r in data["model-index"][0]["results"]} == {"not named"}


def test_training_writes_it(run):
    assert run.model_card.read_text(encoding="utf-8") == model_card(run)
    assert 'Predictor("this folder")' in model_card(run) and "# run\n" in model_card(run)


def test_no_path_of_the_machine(home, run):
    assert "home_of_ama" in run.settings["train_jsonl"] and "home_of_ama" not in model_card(run)


def test_rows_that_have_changed_are_not_counted(home, run, tmp_path):
    """Counts are those of the training or none; scores and digests stay."""
    shutil.copytree(home, tmp_path / "home")
    moved = Run(tmp_path / "home/run")
    settings = json.loads(moved.settings_file.read_text())
    for s in ("train", "val", "test"):
        settings[f"{s}_jsonl"] = str(tmp_path / f"home/corpus/{s}.jsonl")
    moved.settings_file.write_text(json.dumps(settings))
    write(tmp_path / "home/corpus/train.jsonl", read(home / "corpus/train.jsonl")[:5])
    (tmp_path / "home/corpus/val.jsonl").unlink()
    card = model_card(moved)
    assert "The rows of train, val are not where they were in training, or have changed" in card
    assert re.search(r"^utterances +6$", card, re.M) and moved.inputs["the rows of train_jsonl"] in card
    assert "cannot be told here" in card


def test_speakers_on_two_sides(home, tmp_path):
    rows = read(home / "corpus/train.jsonl")
    for s in ("train", "val"):
        write(tmp_path / f"{s}.jsonl", [r | dict(speaker="ama") for r in rows[:6]])
    found = train(tmp_path / "train.jsonl", tmp_path / "val.jsonl", save_dir=tmp_path / "run", audio_base_path=home / "corpus", use_alpha_ser=True, **(MADE_OF | dict(num_epochs=1, alpha_asr=0.1)))
    card = found.model_card.read_text()
    assert "**Beware**: 1 speaker or films stand in two splits" in card and "Validation, not tested, model of the epoch that validation chose" in card
    data = yaml.safe_load(card.split("---\n")[1])
    assert {r["dataset"]["split"] for r in data["model-index"][0]["results"]} == {"val"} and data["tags"] == ["speech", "speech-emotion-recognition"]
    assert found.is_finished
    assert "# emotion, probabilities\n" in card and "transcript" not in card.split("## Data")[0] and "Loss weights: ser 1. " in card and "predict.for_speaker" in card


def test_card_says_what_the_heads_give():
    """Nothing is promised that a head which is off would answer."""
    from prosody_ser.hub import _use_text
    said = {tasks: re.search("# (.*)", _use_text("ama/akan", tasks.split()))[1] for tasks in ("ser asr prosody", "ser asr", "asr", "ser prosody")}
    assert list(said.values()) == ["emotion, probabilities, transcript, words with prominence", "emotion, probabilities, transcript, words", "transcript, words",
                                   "emotion, probabilities, prominence of the words that you give it: words=[...]"]
    assert "for_speaker" in _use_text("a", ["ser"]) and "speaker" not in _use_text("a", ["asr", "prosody"])


def test_old_run():
    """A run of an earlier version gets a card, and is named by what it has."""
    card = model_card(OLD, "ama/old")
    assert "Test set, 6 utterances" in card and "are not where they were" in card and ModelCard(card).data.eval_results
    assert "floor" in card and "from `whisper`" in card


def test_backbone_of_the_hub(run, tmp_path):
    """A hub id is named as the base model; a folder is not, and only by its name."""
    shutil.copytree(run.folder, tmp_path / "run")
    other = Run(tmp_path / "run")
    settings = json.loads(other.settings_file.read_text())
    for path, base, shown in (("openai/whisper-tiny", "openai/whisper-tiny", "openai/whisper-tiny"), (None, "openai/whisper-large-v3", "openai/whisper-large-v3"),
                              (str(tmp_path / "secret/whisper-tiny"), None, "whisper-tiny")):
        other.settings_file.write_text(json.dumps(settings | dict(backbone="whisper", backbone_path=path)))
        card = model_card(other)
        assert yaml.safe_load(card.split("---\n")[1]).get("base_model") == base and f"from `{shown}`" in card and "secret" not in card
        assert (f"--backbone_path {shown}" in card) == bool(path)


# ---------------------------------------------------------------------------------------------------------- the upload

def test_upload(run, hub, tmp_path):
    """What goes out is a model that loads and says the same; the Hub's validator has seen the card before anything was made."""
    address = run.push_to_hub("ama/akan", private=True, license="cc-by-4.0", languages=["tw"])
    assert address == "https://huggingface.co/ama/akan"
    assert [name for name, _ in hub.calls] == ["validate", "create", "upload"]
    card = (tmp_path / "uploaded/README.md").read_text(encoding="utf-8")
    assert hub.calls[0][1]["repoType"] == "model" and body(hub.calls[0][1]["content"]) == body(card) and card == model_card(run, "ama/akan", "cc-by-4.0", ["tw"])
    assert hub.calls[1][1] == dict(name="ama/akan", private=True, exist_ok=True)
    assert "onnx/*" in hub.calls[2][1]["delete"]
    files = {p.relative_to(tmp_path / "uploaded").as_posix() for p in (tmp_path / "uploaded").rglob("*") if p.is_file()}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.model"}
    audio = run.settings["audio_base_path"] + "/test0.wav"
    assert dict(Predictor(tmp_path / "uploaded", "cpu", "greedy")(audio)) == dict(Predictor(run.best_model, "cpu", "greedy")(audio))
    assert "home_of_ama" not in "".join((tmp_path / "uploaded" / f).read_text() for f in files if f.endswith((".json", ".md")))
    ours, theirs = (load_checkpoint(p).config for p in (tmp_path / "uploaded", run.best_model))
    assert (ours.usual, ours.emotion_temperature) == (theirs.usual, theirs.emotion_temperature)


def test_public_by_default(run, hub):
    publish(run, "ama/akan")
    assert hub.calls[1][1]["private"] is None                                           # as the account or organisation has it


def test_card_that_the_hub_refuses(run, hub):
    hub.status = 400
    with pytest.raises(ConfigError, match="the Hub does not take this card: license is not known"):
        publish(run, "ama/akan", license="my-own")
    assert [name for name, _ in hub.calls] == ["validate"]


def test_another_model_is_left_alone(run, hub):
    """A repository with something else is not written over; one of ours is, and an empty one."""
    hub.there, hub.library = [".gitattributes", "README.md", "model.safetensors"], "diffusers"
    with pytest.raises(ConfigError, match=r"ama/akan: holds something else \(model.safetensors"):
        publish(run, "ama/akan")
    assert "upload" not in [name for name, _ in hub.calls]
    hub.library = "prosody_ser"
    publish(run, "ama/akan")
    assert hub.calls[-1][0] == "upload"


def test_what_is_refused_before_anything_is_read(run, hub, tmp_path):
    for options, told in ((dict(license="Apache 2.0"), "such as apache-2.0"), (dict(languages=["Twi"]), "ISO 639")):
        with pytest.raises(ConfigError, match=told):
            publish(run, "ama/akan", **options)
    for name in ("ama/a kan", "a/b/c", "ama/akan.git"):
        with pytest.raises(ConfigError, match="cannot be the name of a repository"):
            publish(run, name)
    with pytest.raises(ConfigError, match="not a finished run with a best_model"):
        publish(tmp_path, "ama/akan")
    assert not hub.calls


def test_command(command, home, hub, tmp_path):
    """A dry run writes and uploads nothing; it writes over nothing; without a licence it says so."""
    call = ["publish", home / "run", "ama/akan", "--dry_run", tmp_path / "dry"]
    code, text = command(*call, "--languages", "tw", "en")
    assert code == 0 and str(tmp_path / "dry") in text and "no licence was given" in text and not hub.calls
    assert "- tw\n- en" in (tmp_path / "dry/README.md").read_text() and load_checkpoint(tmp_path / "dry").ser
    before = {p: p.read_bytes() for p in (tmp_path / "dry").iterdir()}
    code, text = command(*call)
    assert code == 1 and "is there already: nothing is written over" in text and {p: p.read_bytes() for p in (tmp_path / "dry").iterdir()} == before
    code, text = command("publish", home / "run", "ama/akan", "--private", "--license", "mit")
    assert code == 0 and "https://huggingface.co/ama/akan" in text and "no licence" not in text and hub.calls[1][1]["private"] is True
    code, text = command("publish", tmp_path / "no", "ama/akan")
    assert code == 1 and "not a finished run" in text


def test_file_in_the_place_of_the_folder(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FolderError, match="is there already"):
        publish(run, "ama/akan", folder=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


def test_with_onnx(run, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from prosody_ser.onnx import OnnxPredictor
    publish(run, "ama/akan", onnx=True, folder=tmp_path / "out")
    audio = run.settings["audio_base_path"] + "/test0.wav"
    assert OnnxPredictor(tmp_path / "out/onnx", 1)(audio)["emotion"] == Predictor(tmp_path / "out", "cpu", "greedy")(audio).emotion


# ------------------------------------------------------------------------------------------------------- Auto classes

def test_auto_classes(run):
    """They give our classes with our weights, and a processor whose output the model takes."""
    config, model, processor = (c.from_pretrained(run.best_model) for c in (AutoConfig, AutoModel, AutoProcessor))
    assert (type(config), type(model), type(processor)) == (ProsodySERConfig, ProsodySER, ProsodySERProcessor)
    audio = [run.settings["audio_base_path"] + f"/test{i}.wav" for i in range(3)]
    inputs = processor(audio)
    with torch.no_grad():
        out = model.eval()(**inputs)
    wanted = [p.emotion for p in Predictor(run.best_model, "cpu", "greedy").many(audio)]
    assert [config.id2label[int(i)] for i in out.emotion_logits.argmax(-1)] == wanted and inputs["audio"].shape[0] == len(inputs["audio_lengths"]) == 3
    with pytest.raises(CheckpointError, match="model.processor = AutoProcessor"):
        Predictor(model, "cpu")
    model.processor = processor
    assert Predictor(model, "cpu", "greedy")(audio[0]).emotion == wanted[0]


LOADS = """
import sys
FIRST
lean = "torch" in sys.modules, "prosody_ser.model" in sys.modules
from transformers import AutoConfig, AutoModel, AutoProcessor
assert "prosody_ser.model" not in sys.modules
CALLS
print(lean, *(type(c.from_pretrained(sys.argv[1])).__name__ for c in calls))
"""


@pytest.mark.parametrize("first, lean", [("import prosody_ser", "(False, False)"), ("import transformers.models.auto.modeling_auto, prosody_ser", "(True, False)")])
@pytest.mark.parametrize("calls", ["AutoConfig, AutoModel, AutoProcessor", "AutoProcessor,", "AutoModel,"])
def test_import_of_the_package_is_enough(run, first, lean, calls):
    """Before transformers or after, whichever class comes first; and PyTorch is not loaded by it."""
    code = LOADS.replace("FIRST", first).replace("CALLS", f"calls = {calls}")
    done = subprocess.run([sys.executable, "-c", code, run.best_model], capture_output=True, text=True, cwd=ROOT)
    names = dict(AutoConfig="ProsodySERConfig", AutoModel="ProsodySER", AutoProcessor="ProsodySERProcessor")
    assert done.stdout.strip() == " ".join([lean, *(names[c.strip()] for c in calls.split(",") if c.strip())]), done.stderr[-2000:]


def test_import_stays_lean():
    code = "import sys; before = set(sys.modules); import prosody_ser; print(sorted(m for m in set(sys.modules) - before if '.' not in m))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not {"torch", "transformers", "numpy", "importlib.util"} & set(done.stdout.split("'")), done.stdout


@pytest.mark.parametrize("family", SMALL)
def test_processor_of_every_family(made, family, tmp_path):  # noqa: F811
    """AutoProcessor gives ours, whatever class the backbone's own settings name."""
    model = small_model(made, family)
    model.processor.extractor._processor_class = "WhisperProcessor"
    model.save_pretrained(tmp_path)
    assert "WhisperProcessor" not in (tmp_path / "preprocessor_config.json").read_text()
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is ProsodySERProcessor and type(processor.extractor) is type(model.processor.extractor) and len(processor.tokenizer) == len(model.processor.tokenizer)
