"""Numbers: the same weights by the same seed, 16 bits beside 32, and finite losses and gradients for the oddest audio and labels."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import write
from safetensors.torch import load_file
from test_faults import on
from transformers import HubertConfig, HubertModel, Wav2Vec2BertConfig, Wav2Vec2BertModel, Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel, WhisperConfig, WhisperModel

from prosody_ser import backbones
from prosody_ser.audio import MIN_SECONDS
from prosody_ser.cli import main
from prosody_ser.model import Collator, create_model
from prosody_ser.tokenizer import SentencePieceTokenizer

torch.set_num_threads(1)
SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
CONV = dict(conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
LAYER = dict(feat_extract_norm="layer", do_stable_layer_norm=True)
WHISPER = dict(d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64,
               vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
SMALL = {"tiny": None, "whisper": (WhisperModel, WhisperConfig(**WHISPER)), "xlsr": (Wav2Vec2Model, Wav2Vec2Config(**SIZE, **CONV, **LAYER)),
         "mms": (Wav2Vec2Model, Wav2Vec2Config(**SIZE, **CONV)), "wavlm": (WavLMModel, WavLMConfig(**SIZE, **CONV, **LAYER)),
         "hubert": (HubertModel, HubertConfig(**SIZE, **CONV, **LAYER)),
         "wav2vec2-bert": (Wav2Vec2BertModel, Wav2Vec2BertConfig(**SIZE, position_embeddings_type="relative_key"))}       # mms: with group norm


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("numerics")
    return folder, SentencePieceTokenizer(40, folder / "tok", model_type="char").train_tokenizer(["me kɔ fie", "bra ha"] * 9)


def small_model(made, backbone, **options):
    """A small random model of a real architecture, by way of a folder, as users load theirs."""
    folder, tokenizer = made
    path = None
    if SMALL[backbone]:
        path, (cls, config) = folder / backbone, SMALL[backbone]
        if not path.exists():
            torch.manual_seed(0)
            cls(config).save_pretrained(path)
    torch.manual_seed(1)
    return create_model(["anger", "joy", "fear"], tokenizer, backbone, path, **options)


@pytest.fixture(scope="module", params=SMALL)
def model(request, made):
    return small_model(made, request.param)


def row(i, audio, words=("me", "kɔ"), prosody=(0, 1), emotion=1):
    return dict(audio=np.asarray(audio, np.float32), words=words and list(words), prosody=prosody and list(prosody), emotion=emotion, row=i)


def noise(seconds, seed=0):
    return np.random.default_rng(seed).normal(size=round(16000 * seconds)) * 0.1


def checked_step(model, made, rows, absent=()):
    """The loss of a training step and of an evaluation; both, all gradients and all outputs are finite."""
    batch = Collator(made[1])(rows)
    for training in (False, True):
        model.train(training)
        out = model(**batch)
        values = [out.loss, out.emotion_logits, out.prosody_logits, out.ser_loss, out.asr_loss, out.prosody_loss, *(() if training else [out.asr_logits])]
        assert all(v is None or torch.isfinite(v).all() for v in values)
        for task in model.config.tasks:
            assert (getattr(out, f"{task}_loss") is None) == (task in absent), task
    model.zero_grad()
    out.loss.backward()
    wrong = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())]
    assert not wrong, wrong
    assert all(torch.isfinite(b).all() for n, b in model.named_buffers() if not n.endswith("asr_nats"))
    return out


# ------------------------------------------------------------------------------------------------------------ the seed

def test_same_seed_same_weights(corpus, tmp_path):
    """Two trainings on a CPU are the same to the last bit, curves and all; another seed makes other weights."""
    weights = []
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        main(list(map(str, on(corpus, tmp_path / name, tokenizer_path=tmp_path / f"{name}.model", num_epochs=2, seed=seed, speed_perturb=0.1, spec_augment=True))))
        weights.append(load_file(tmp_path / name / "best_model/model.safetensors"))
    one, two, other = weights
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)
    histories = [json.loads((tmp_path / name / "training_history.json").read_text()) for name in ("one", "two")]
    one, two = ([{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in h["train"] + h["val"]] for h in histories)
    assert one == two


# ------------------------------------------------------------------------------------------------------------ devices

def test_a_step_makes_its_tensors_where_the_model_is(model, made, monkeypatch):
    """Whatever is made in a step without a device would be on another one here, as it would be beside a GPU; sizes are numbers, no tensors."""
    sizes, hidden = [], backbones._hidden_frames
    monkeypatch.setattr(backbones, "_hidden_frames", lambda config, lengths, size: sizes.append(size) or hidden(config, lengths, size))
    model.train()
    batch = Collator(made[1])([row(0, noise(1.2)), row(1, noise(0.7, 1), ("fie",), (1,))])
    with torch.device("meta"):
        model(**batch).loss.backward()
    assert all(type(size) is int for size in sizes) and bool(sizes) == hasattr(model.backbone.encoder, "masked_spec_embed")


# ------------------------------------------------------------------------------------------------------------- 16 bits

BOUND = {torch.bfloat16: 0.1, torch.float16: 0.01}         # of the standard deviation of the float32 logits


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_logits_in_16_bits(model, made, dtype):
    """Under autocast the logits stay near those in float32, CTC's loss is in float32 whatever its input, and gradients are finite."""
    rows = [row(0, noise(1.2)), row(1, noise(0.7, 1), ("fie",), (1,))]
    batch, model = Collator(made[1])(rows), model.eval()
    with torch.no_grad():
        exact = model(**batch)
        with torch.autocast("cpu", dtype):
            half = model(**batch)
    for name in ("emotion_logits", "asr_logits", "prosody_logits"):
        one, other = getattr(exact, name).float(), getattr(half, name).float()
        if name == "asr_logits":
            inside = torch.arange(one.shape[1]) < exact.lengths[:, None]
            one, other = one[inside], other[inside]
        if name == "prosody_logits":
            one, other = (x[batch["prosody"] >= 0] for x in (one, other))
        assert torch.isfinite(other).all() and (one - other).abs().max() <= BOUND[dtype] * max(1, one.std()), name
    assert half.asr_loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(exact.loss.item(), rel=BOUND[dtype])
    with torch.autocast("cpu", dtype):
        loss = model.train()(**batch).loss
    model.zero_grad()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------------------ odd audio

SHORTEST = math.ceil(MIN_SECONDS * 16000)
ODD = {"silence": np.zeros(8000), "constant": np.full(8000, 0.5), "full-scale square wave": np.sign(np.sin(np.arange(16000) * 0.1)), "one click": np.eye(1, 8000)[0],
       "all ones": np.ones(8000), "tiny numbers": noise(0.5) * 1e-30, "shortest": noise(1)[:SHORTEST], "shortest silence": np.zeros(SHORTEST)}


@pytest.mark.parametrize("kind", ODD)
def test_odd_audio(model, made, kind):
    """Alone, and beside speech: nothing becomes NaN, and the speech beside it is heard as ever."""
    checked_step(model, made, [row(0, ODD[kind], ("me",), (1,))])
    speech = row(1, noise(0.9, 2))
    checked_step(model, made, [row(0, ODD[kind], ("me",), (1,)), speech])
    if model.backbone.masked:                                    # group norm is sensitive to padding, and says so
        with torch.no_grad():
            model.eval()
            alone, beside = (model(**Collator(made[1])(rows)).emotion_logits[-1] for rows in ([speech], [row(0, ODD[kind], ("me",), (1,)), speech]))
        torch.testing.assert_close(alone, beside, rtol=1e-3, atol=1e-3)


def test_the_end_of_a_long_recording_is_heard_without_silence_after_it(made, monkeypatch):
    """Group norm has no mask, so a last chunk that is filled up with zeros would be heard as something else."""
    encoder = small_model(made, "mms").eval().backbone
    assert not encoder.masked
    audio = torch.tensor(noise(3.3)[None] * np.sin(np.arange(52800) / 3000) ** 2, dtype=torch.float32)
    monkeypatch.setattr(encoder, "max_seconds", 3.0)                          # chunks: 0 to 3 s, 1 to 3.3 s
    features, n = encoder.features(audio, torch.tensor([audio.shape[1]]))
    with torch.no_grad():
        states, _ = encoder(audio, torch.tensor([audio.shape[1]]))
        last, _ = encoder._hidden_states(features[:, 16000:], torch.tensor([features.shape[1] - 16000]))
    frames = encoder.frame_rate                                               # the first second of it is context
    torch.testing.assert_close(states[-1][0, 2 * frames:], last[-1][0, frames:], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- odd labels

ABSENT = {"ser": dict(emotion=-100), "asr": dict(words=None, prosody=None), "prosody": dict(prosody=None)}


@pytest.mark.parametrize("absent", ["ser", "asr prosody", "prosody", "ser asr prosody"])
@pytest.mark.parametrize("mode", ["fixed", "uncertainty"])
def test_tasks_without_labels(made, absent, mode):
    """A batch without any label of a task, or of all: a loss and gradients all the same, 0 where nothing is labelled."""
    model = small_model(made, "tiny", alpha_mode=mode)
    labels = {k: v for task in absent.split() for k, v in ABSENT[task].items()}
    out = checked_step(model, made, [row(i, noise(0.5 + i / 5, i), **labels) for i in range(2)], absent.split())
    if absent == "ser asr prosody":
        assert out.loss.item() == 0 and not any(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("words", [["mekɔfiebraha" * 3], ["me"] * 40], ids=["one long word", "many words"])
@pytest.mark.parametrize("beside", [False, True])
def test_words_that_do_not_fit(model, made, words, beside):
    """A transcript with more tokens than frames counts 0 and sends no gradient; prominence has frames all the same; the row beside it learns."""
    rows = [row(0, noise(0.1), words, [1] * len(words))] + [row(1, noise(0.9, 1))] * beside
    out = checked_step(model, made, rows)
    assert out.ctc_terms["infeasible"] == 1
    assert (out.ctc_terms["ctc"] > 0) == beside and (out.ctc_terms["nats"].isnan() == (not beside))
    assert (out.spans[0, :len(words), 0] >= 0).all() and (out.spans[0, :len(words), 1] <= out.lengths[0]).all()


@pytest.mark.parametrize("task", ["ser", "asr", "prosody"])
def test_head_alone(made, task):
    """Each head alone, on the shortest audio and on silence."""
    model = small_model(made, "tiny", tasks=[task])
    checked_step(model, made, [row(0, ODD["shortest"], ("me",), (1,))])
    assert checked_step(model, made, [row(0, ODD["silence"], ("me",), (1,))]).loss.item() > 0


@pytest.mark.filterwarnings("ignore:.*an offset of")
@pytest.mark.parametrize("heads", ["ser asr prosody", "ser", "asr", "prosody"])
def test_training_on_odd_audio(tmp_path, heads):
    """The whole way: a corpus of such files trains, and every number that is written is one."""
    import soundfile as sf
    for split in ("train", "val", "test"):
        rows = []
        for i, (kind, audio) in enumerate(ODD.items()):
            sf.write(tmp_path / f"{split}{i}.wav", audio * 0.99, 16000)
            rows.append(dict(audio_filepath=f"{split}{i}.wav", words=["me", "kɔ"][:1 + i % 2], prosody_annotations=[0, 1][:1 + i % 2], emotion=["joy", "anger"][i % 2], speaker=f"{split}{i}"))
        write(tmp_path / f"{split}.jsonl", rows)
    main(list(map(str, on(tmp_path, tmp_path / "run", tokenizer_path=tmp_path / "tok.model", **{f"use_alpha_{h}": True for h in heads.split()}))))
    history = json.loads((tmp_path / "run/training_history.json").read_text(), parse_constant=pytest.fail)
    assert all(math.isfinite(line["loss"]) for line in history["train"] + history["val"])
    assert all(torch.isfinite(v).all() for k, v in load_file(tmp_path / "run/best_model/model.safetensors").items() if k != "asr_nats")
