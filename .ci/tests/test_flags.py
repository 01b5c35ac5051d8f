"""A flag that is accepted changes what happens: each is compared with the same run without it."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read, write
from transformers import TrainerCallback

from prosody_ser.config import TrainConfig
from prosody_ser.train import build_model, load_splits, prepare_tokenizer
from prosody_ser.trainer import build_trainer, training_arguments

RUN = dict(backbone="tiny", vocab_size=30, num_epochs=1, batch_size=4, gradient_accumulation_steps=1, num_workers=0, log_steps=1,
           backbone_lr=1e-3, head_lr=1e-3, ctc_blank_threshold=0.01)


def config(corpus, folder, **more):
    """A quick run."""
    manifests = {f"{s}_jsonl": str(corpus / f"{s}.jsonl") for s in ("train", "val", "test")}
    return TrainConfig(**(dict(audio_base_path=str(corpus), **manifests, tokenizer_path=str(folder / "tok.model"), save_dir=str(folder)) | RUN | more))


def trace(corpus, folder, **more):
    """What can be seen of a run: each step's losses and learning rates, its validations, and how far each part moved."""
    c = config(corpus, folder, **more)
    data = load_splits(c)
    model = build_model(c, data["train"], prepare_tokenizer(c, data["train"].utterances))
    before = {k: v.clone() for k, v in model.named_parameters()}
    trainer = build_trainer(c, model, data)
    trainer.train()
    log = [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in trainer.state.log_history]
    moved = {k: (v.detach() - before[k]).abs().sum().item() for k, v in model.named_parameters()}
    return dict(log=log, moved=moved, files=sorted(p.name for p in Path(c.save_dir).iterdir()))


@pytest.fixture(scope="module")
def baseline(corpus, tmp_path_factory):
    return trace(corpus, tmp_path_factory.mktemp("base"))


def test_same_settings_same_run(corpus, baseline, tmp_path):
    again = trace(corpus, tmp_path)
    assert json.dumps(again["log"]) == json.dumps(baseline["log"]) and again["moved"] == baseline["moved"]


ACTS = dict(
    alpha_ser=0.5, alpha_asr=0.5, alpha_prosody=0.5, use_alpha_ser=True, use_alpha_asr=True, use_alpha_prosody=True,
    ctc_entropy_weight=5.0, ctc_blank_penalty=0.0, ctc_blank_threshold=0.0, ctc_label_smoothing=0.5, ctc_confidence_penalty=0.5,
    ctc_reduction="sum", batch_size=3, num_epochs=2, gradient_accumulation_steps=3, backbone_lr=1e-4, head_lr=1e-4, warmup_ratio=0.9,
    checkpoint_interval=1, eval_steps=1, log_steps=3, vocab_size=25, tokenizer_type="char", freeze_backbone=True, layer_mix=False, pooling="mean",
    head_dropout=0.5, spec_augment=False, prosody_pos_weight=3.0, whisper_tail_seconds=1.0, lr_scheduler="cosine", weight_decay=0.5, max_grad_norm=1e-4, seed=1,
    batching="random", max_batch_seconds=2.0, checkpoint_steps=1, lora_rank=2, alpha_mode="uncertainty", grad_share_steps=1,
    mix_lr=1e-4, speed_perturb=0.2, freeze_epochs=1, ser_weight_decay=50.0)


@pytest.mark.parametrize("name", ACTS)
def test_flag_acts(name, corpus, baseline, tmp_path):
    more = {"num_epochs": 2} if name in ("lr_scheduler", "freeze_epochs") else {}
    reference = trace(corpus, tmp_path / "reference", **more) if more else baseline
    run = trace(corpus, tmp_path / "run", **(more | {name: ACTS[name]}))
    assert (run["log"], run["moved"], run["files"]) != (reference["log"], reference["moved"], reference["files"])


def test_rare_emotions(corpus, tmp_path):
    """Where one emotion is rare each correction changes what is learned; where all are alike, weights and sampling change nothing."""
    skewed = tmp_path / "skewed"
    shutil.copytree(corpus, skewed)
    rows = read(corpus / "train.jsonl")
    write(skewed / "train.jsonl", [r | dict(emotion="anger" if i % 4 else "joy") for i, r in enumerate(rows)])
    acts = dict(class_weights="balanced", logit_adjustment=1.0, focal_gamma=2.0, balanced_sampling=1.0)
    logs = {name: trace(skewed, tmp_path / name, **{name: value})["log"] for name, value in acts.items()}
    plain = trace(skewed, tmp_path / "plain")["log"]
    assert all(log != plain for log in logs.values()), [k for k, log in logs.items() if log == plain]
    even = trace(corpus, tmp_path / "even")["log"]
    assert all(trace(corpus, tmp_path / f"even-{name}", **{name: acts[name]})["log"] == even for name in ("class_weights", "balanced_sampling"))


def test_gradient_checkpointing_computes_layers_twice_and_learns_the_same(corpus, tmp_path):
    """With it each layer runs once more in the backward pass; the weights end up the same."""
    calls, moved = {}, {}
    for on in (False, True):
        c = config(corpus, tmp_path / str(on), gradient_checkpointing=on, head_dropout=0.0)
        data = load_splits(c)
        model = build_model(c, data["train"], prepare_tokenizer(c, data["train"].utterances))
        trainer, n = build_trainer(c, model, data), [0]

        class Count(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs): n[0] = 0
            def on_pre_optimizer_step(self, args, state, control, **kwargs): calls[on] = n[0]

        model.backbone.encoder.layers[0].self_attn.q_proj.register_forward_hook(lambda *a: n.__setitem__(0, n[0] + 1))
        trainer.add_callback(Count)
        trainer.train()
        moved[on] = model.asr.out.weight.detach().clone()
    assert calls == {False: 1, True: 2}
    assert torch.allclose(moved[False], moved[True], atol=1e-5)


def test_prosody_alignment(corpus, tmp_path):
    """With a usable aligner, ctc and uniform read different frames."""
    c = config(corpus, tmp_path, tokenizer_type="char")
    data = load_splits(c)
    model = build_model(c, data["train"], prepare_tokenizer(c, data["train"].utterances)).eval()
    batch = build_trainer(c, model, data).data_collator([data["train"][0]])
    model.asr_nats.fill_(0.0)
    spans = {}
    for how in ("ctc", "uniform"):
        model.config.prosody_alignment = how
        spans[how] = model(**batch).spans.tolist()
    assert spans["ctc"] != spans["uniform"]
    model.config.prosody_alignment = "ctc"
    model.asr_nats.fill_(99.0)
    assert model(**batch).spans.tolist() == spans["uniform"]


def test_character_coverage(corpus, tmp_path):
    """Less coverage, fewer letters."""
    from prosody_ser.data import Utterance
    rows, size = [Utterance("a.wav", ["bra", "ha"] * 40), Utterance("b.wav", ["qx"])], {}
    for coverage in (None, 0.98):
        c = config(corpus, tmp_path, character_coverage=coverage, tokenizer_type="char", retrain_tokenizer=True)
        size[coverage] = len(prepare_tokenizer(c, rows))
    assert size[None] == size[0.98] + 2


def test_loader_and_precision_flags_reach_the_trainer(corpus, tmp_path, monkeypatch, capsys):
    """What has no effect on a CPU's numbers is seen in the trainer's arguments."""
    from prosody_ser import trainer
    trainer.log_once.cache_clear()
    args = training_arguments(config(corpus, tmp_path, num_workers=2, prefetch_factor=5, experiment_name="mine"))
    assert (args.dataloader_num_workers, args.dataloader_prefetch_factor, args.run_name) == (2, 5, "mine")
    if not torch.cuda.is_available():
        assert "use_amp: no GPU here" in capsys.readouterr().out
        assert not (args.bf16 or args.fp16 or args.dataloader_pin_memory)
    for bf16, expected in ((True, dict(bf16=True)), (False, dict(fp16=True))):
        monkeypatch.setattr(trainer.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(trainer.torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        assert trainer.precision(True) == expected and trainer.precision(False) == {}


def test_select_by(corpus, tmp_path):
    from prosody_ser.trainer import selection_metric
    chosen = [selection_metric(config(corpus, tmp_path, **m)) for m in ({}, dict(select_by="asr/wer"), dict(use_alpha_prosody=True))]
    assert chosen == ["skill", "asr/wer", "skill"]


@pytest.mark.parametrize("rule, patience, kept, stopped", [("best", 0, [1, 2], False), ("one_se", 0, [1, 2, 4], False),
                                                           ("one_se", 2, [1, 2, 4], True)])
def test_select_rule(corpus, tmp_path, rule, patience, kept, stopped):
    """The best epoch, or the last within one standard error of it; patience counts from the best one."""
    from transformers import TrainerControl, TrainerState

    from prosody_ser.trainer import _KeepBest, training_arguments
    c = config(corpus, tmp_path, select_rule=rule, early_stopping_patience=patience)
    state, control, saved = TrainerState(), TrainerControl(), []
    keep = _KeepBest(c, "skill", lambda folder: Path(folder).mkdir(parents=True) or saved.append(state.epoch), lambda: [])
    keep.on_train_begin(training_arguments(c), state, control)
    for epoch, skill in enumerate((.2, .6, .4, .55), 1):
        state.epoch = float(epoch)
        scores = dict(loss=1., skill=skill, skill_se=.06, skill_floor=0.)
        state.log_history += [dict(loss=1., epoch=state.epoch), {f"eval_{k}": v for k, v in scores.items()} | dict(epoch=state.epoch)]
        keep.on_evaluate(training_arguments(c), state, control)
    assert (saved, keep.best["epoch"], control.should_training_stop) == (kept, kept[-1], stopped)
    assert json.loads((Path(c.save_dir) / "training_history.json").read_text())["best"]["epoch"] == kept[-1]


def test_decoder_flags_act(corpus, tmp_path):
    """Each setting of the decoder changes what is read from the same frames; greedy takes no language model."""
    from prosody_ser.config import ConfigError
    from prosody_ser.decoding import DECODERS, decoder_options
    from prosody_ser.decoding import train_lm
    train_lm([["bra", "ha"], ["me", "kɔ", "fie"]], tmp_path / "lm.arpa", 2)
    tokenizer = prepare_tokenizer(config(corpus, tmp_path, tokenizer_type="char"), load_splits(config(corpus, tmp_path))["train"].utterances)
    logits, lengths = torch.randn(20, 12, len(tokenizer), generator=torch.Generator().manual_seed(0)), torch.full((20,), 12)
    lm = dict(lm_path=str(tmp_path / "lm.arpa"))

    def read(**more):
        c = config(corpus, tmp_path, **more)
        return DECODERS[c.decode_method](logits, lengths, tokenizer.blank_id, **decoder_options(c, tokenizer))

    said = {name: read(**more) for name, more in dict(
        plain={}, greedy=dict(decode_method="greedy"), narrow=dict(beam_width=1), few=dict(top_k=1), skip=dict(blank_skip=0.1), lm=lm,
        strong=lm | dict(lm_weight=3.0), words=lm | dict(word_score=3.0)).items()}
    for a in said:
        assert all(said[a] != said[b] for b in said if b > a), (a, [b for b in said if said[a] == said[b]])
    with pytest.raises(ConfigError, match="beam search"):
        config(corpus, tmp_path, decode_method="greedy", **lm)


def test_max_seconds(corpus, tmp_path):
    """A shorter limit cuts what is longer into chunks."""
    import numpy as np
    from prosody_ser.model import create_model
    audio = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 8 * 16000)).astype("float32"))
    torch.manual_seed(0)
    model = create_model(["a", "b"], tasks=["ser"]).eval()
    said = {}
    for limit in (30.0, 5.0):
        model.backbone.max_seconds = limit
        said[limit] = model(audio, torch.tensor([audio.shape[1]])).emotion_logits.detach()
    assert not torch.equal(said[30.0], said[5.0]) and torch.allclose(said[30.0], said[5.0], atol=0.5)
    c = config(corpus, tmp_path, max_seconds=5.0)
    data = load_splits(c)
    assert build_model(c, data["train"], prepare_tokenizer(c, data["train"].utterances)).backbone.max_seconds == 5.0


def test_lora_trains_adapters_and_saves_them_merged(corpus, tmp_path):
    """The backbone's own weights stand still while training, and the best model is an ordinary one."""
    from prosody_ser.model import load_checkpoint
    run = trace(corpus, tmp_path, lora_rank=2)
    backbone = {k: v for k, v in run["moved"].items() if k.startswith("backbone.")}
    assert all((v > 0) == ("lora_" in k) for k, v in backbone.items()), backbone
    assert all(v > 0 for k, v in run["moved"].items() if k.endswith("out.weight") and not k.startswith("backbone."))
    saved = load_checkpoint(tmp_path / "best_model")
    assert not any("lora" in k or "base_layer" in k for k in saved.state_dict())


def test_feature_cache(corpus, tmp_path):
    """A frozen backbone's features are computed once; a second run computes none and learns the same."""
    runs, files = [], []
    for i in range(2):
        from prosody_ser.train import fit
        c = config(corpus, tmp_path / str(i), freeze_backbone=True, feature_cache=str(tmp_path / "cache"), tokenizer_path=str(tmp_path / "tok.model"))
        data = load_splits(c)
        runs.append([e["loss"] for e in fit(c, data, prepare_tokenizer(c, data["train"].utterances))["train"]])
        files.append({p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.*")})
    assert runs[0] == runs[1] and files[0] == files[1] and len(files[0]) == 4      # features and index of train and of val


def test_torch_compile_learns_the_same(corpus, tmp_path, monkeypatch):
    """The layers are compiled, few times for all lengths; losses, gradient shares and the best model's names are as without."""
    from functools import partial

    from safetensors.torch import load_file
    from torch._dynamo.utils import counters

    from prosody_ser import trainer
    from prosody_ser.train import fit
    monkeypatch.setattr(trainer, "compile_layers", partial(trainer.compile_layers, backend="aot_eager"))
    told, names = [], []
    for compiled in (False, True):
        counters.clear()
        c = config(corpus, tmp_path / str(compiled), torch_compile=compiled, grad_share_steps=2, head_dropout=0.0, spec_augment=False,
                   tokenizer_path=str(tmp_path / "tok.model"))
        data = load_splits(c)
        told.append(fit(c, data, prepare_tokenizer(c, data["train"].utterances)))
        names.append(load_file(tmp_path / str(compiled) / "best_model" / "model.safetensors").keys())
        assert (0 < counters["stats"]["unique_graphs"] <= 8) == compiled and not counters["graph_break"]
    for a, b in zip(*(t["train"] for t in told), strict=True):
        assert a.keys() == b.keys() and a["loss"] == pytest.approx(b["loss"], rel=.05)
    assert any("ser/grad_share" in e for e in told[1]["train"]) and names[0] == names[1]


@pytest.mark.parametrize("way", ["full", "checkpointing", "LoRA"])
@pytest.mark.parametrize("family", ["toy whisper", "toy XLS-R", "toy W2V-BERT"])
def test_one_compiled_layer_serves_all_of_a_family(family, way, monkeypatch):
    """In one piece, for any length: the losses of training are those of layers that are not compiled, and so are answers."""
    from torch._dynamo.utils import counters

    from prosody_ser.backbones import compile_layers
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu
    lengths, losses, answers = [(1.5, 1.0, .7), (2.0, 1.2), (1.1, 1.1), (1.9, .8, .7)], [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        training = gpu.Training(family, 40, "cpu", torch.float32, way, head_dropout=0.0, spec_augment=False)
        for module in training.model.backbone.encoder.modules():
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        training.model.backbone.encoder.config.layerdrop = 0.0
        if compiled:
            compile_layers(training.model.backbone, backend="aot_eager")
        losses.append([float(training.step(gpu.collate(s, 40, i))) for i, s in enumerate(lengths)])
        assert 0 < counters["stats"]["unique_graphs"] <= 4 if compiled else not counters["stats"]          # with a mask and without
        with torch.no_grad():
            answers.append([training.model.eval()(**gpu.collate(s, 40, 9)).emotion_logits for s in lengths])
        assert not counters["graph_break"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("family", ["wavlm", "hubert"])
def test_compiled_layers_have_the_same_gradients_and_copies_their_own_weights(family, norm):
    """With group norm there is no mask, so one case; with layer norm two. No break in either."""
    import copy

    from torch._dynamo.utils import counters
    from transformers import AutoConfig

    from prosody_ser.backbones import Backbone, _default_extractor, build_encoder, compile_layers, frame_mask
    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, conv_dim=[16] * 7, vocab_size=8,
                 num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
                 feat_proj_dropout=0.0, layerdrop=0.0, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **small)
    plain = Backbone(build_encoder(config.to_dict()), _default_extractor(config), spec_augment=False).train()
    compiled = copy.deepcopy(plain)
    compile_layers(compiled, backend="aot_eager")
    for lengths in torch.tensor([[16000, 9000], [20000, 12000], [16000, 16000]]):
        audio = (torch.randn(2, lengths.max()) * .1).masked_fill(~frame_mask(lengths, lengths.max()), 0.0)
        found = []
        for backbone in (plain, compiled):
            backbone.zero_grad()
            sum(s.square().mean() for s in backbone(audio, lengths)[0]).backward()
            found.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
        assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()
    assert 0 < counters["stats"]["unique_graphs"] <= (1 if norm == "group" else 2) + (family == "wavlm") and not counters["graph_break"]
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        for p in twin.encoder.parameters():
            p.mul_(.5)
        assert (twin(audio, lengths)[0][-1] - compiled(audio, lengths)[0][-1]).abs().max() > 1e-3


def test_torch_compile_is_refused_or_told_where_it_cannot_be(corpus, tmp_path, capsys):
    """Sharded layers have another forward pass; stored features need none."""
    from types import SimpleNamespace

    from prosody_ser.config import ConfigError
    from prosody_ser.trainer import _check_sharding
    sharded = SimpleNamespace(is_fsdp_enabled=True, accelerator=SimpleNamespace(is_fsdp2=True))
    with pytest.raises(ConfigError, match="--torch_compile and FSDP do not go together"):
        _check_sharding(sharded, config(corpus, tmp_path, torch_compile=True))
    _check_sharding(sharded, config(corpus, tmp_path))
    trace(corpus, tmp_path, torch_compile=True, freeze_backbone=True, feature_cache=str(tmp_path / "cache"))
    assert "--torch_compile has nothing to compile" in capsys.readouterr().out


def test_measuring_shares_in_16_bits_changes_nothing(corpus, tmp_path, monkeypatch):
    """As on a GPU with bf16: shares in the log, and the same weights to the last bit as without."""
    from prosody_ser import trainer
    monkeypatch.setattr(trainer, "precision", lambda *asked: dict(bf16=True))
    runs = [trace(corpus, tmp_path / str(n), grad_share_steps=n, gradient_accumulation_steps=2, max_grad_norm=0.1) for n in (1, 0)]
    shares = [[sum(e[f"{t}/grad_share"] for t in ("ser", "asr", "prosody")) for e in run["log"] if "ser/grad_share" in e] for run in runs]
    assert shares[0] == pytest.approx([1.0, 1.0]) and shares[1] == [] and runs[0]["moved"] == runs[1]["moved"]


def test_shares_of_long_audio_are_left_out(corpus, tmp_path):
    """What is heard in chunks is not measured: its states would have to be kept."""
    c = config(corpus, tmp_path, grad_share_steps=1, max_seconds=4.0)
    data = load_splits(c)
    trainer = build_trainer(c, build_model(c, data["train"], prepare_tokenizer(c, data["train"].utterances)), data)
    fits = [trainer._fits(dict(audio=torch.zeros(1, 16000 * s))) for s in (4, 5)]
    assert fits == [True, False] and not trainer._fits(dict(states=torch.zeros(1, 2, 3, 4)))
    batch = trainer.data_collator([data["train"][0]])
    batch |= dict(audio=torch.nn.functional.pad(batch["audio"], (0, 16000 * 5)), audio_lengths=batch["audio_lengths"] + 16000 * 5)
    trainer.compute_loss(trainer.model.train(), batch)
    assert not any("grad_share" in k for k in trainer.task_losses) and "ser/loss" in trainer.task_losses


def test_a_loss_that_is_no_number(corpus, tmp_path, monkeypatch):
    """Ends the training at once; in fp16, where the scaler skips such steps, only when they do not stop."""
    from transformers import Trainer

    from prosody_ser.config import TrainingError
    from prosody_ser.trainer import MTLTrainer
    c = config(corpus, tmp_path)
    data = load_splits(c)
    trainer, losses = build_trainer(c, build_model(c, data["train"], prepare_tokenizer(c, data["train"].utterances)), data), []
    monkeypatch.setattr(Trainer, "training_step", lambda *args: torch.tensor(losses.pop(0)))
    losses[:] = [1.0, float("inf")]
    trainer.training_step(trainer.model, None)
    with pytest.raises(TrainingError, match="not a finite number at step 1"):
        trainer.training_step(trainer.model, None)
    trainer.args.fp16, trainer.diverged = True, 0
    losses[:] = [float("nan")] * MTLTrainer.fp16_patience + [1.0] + [float("nan")] * (MTLTrainer.fp16_patience + 1)
    for _ in range(2 * MTLTrainer.fp16_patience + 1):
        trainer.training_step(trainer.model, None)
    with pytest.raises(TrainingError):
        trainer.training_step(trainer.model, None)


def test_alpha_lr(corpus, tmp_path):
    """A larger rate moves the learned weights further, and a rate of 0 not at all."""
    moved = [trace(corpus, tmp_path / str(r), alpha_mode="uncertainty", alpha_lr=r)["moved"]["log_variances"] for r in (0.0, 1e-3, 1e-1)]
    assert 0 == moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("wrong", [dict(alpha_lr=0.1), dict(alpha_mode="uncertainty", alpha_ser=0.0), dict(alpha_mode="uncertainty", use_alpha_asr=True),
                                   dict(alpha_mode="uncertainty", run_ablation_study=True), dict(run_ablation_study=True, ablation_alphas=[]),
                                   dict(run_ablation_study=True, ablation_mode="prosody", use_alpha_ser=True, use_alpha_asr=True), dict(feature_cache="x"), dict(lora_rank=2, freeze_backbone=True), dict(max_seconds=1.0)])
def test_settings_that_contradict_each_other(wrong, corpus, tmp_path):
    from prosody_ser.config import ConfigError
    with pytest.raises(ConfigError):
        config(corpus, tmp_path, **wrong)
