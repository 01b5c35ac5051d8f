"""Makes `old_run/`, a run folder of the commit that is checked out: `python .ci/tests/make_old_run.py`. Later commits must read it.

It was made at 12d1b48 and is not made again: a test that a new commit reads its own folders would show nothing."""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from conftest import write_corpus
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

HERE = Path(__file__).parent / "old_run"
FLAGS = ("--audio_base_path corpus --train_jsonl corpus/train.jsonl --val_jsonl corpus/val.jsonl --test_jsonl corpus/test.jsonl "
         "--tokenizer_path run/tok.model --tokenizer_type char --vocab_size 20 --backbone whisper --backbone_path whisper --save_dir run "
         "--num_epochs 2 --checkpoint_interval 2 --num_workers 0 --gradient_accumulation_steps 1 --backbone_lr 1e-3 --head_lr 1e-3")


def tiny_whisper(folder):
    """Weights of Whisper's architecture that fill a few kilobytes."""
    torch.manual_seed(0)
    config = WhisperConfig(d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=16, max_source_positions=200)
    WhisperEncoder(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16).save_pretrained(folder)


with tempfile.TemporaryDirectory() as folder:
    write_corpus(Path(folder) / "corpus")
    tiny_whisper(Path(folder) / "whisper")
    subprocess.run([sys.executable, "-m", "prosody_ser.train", *FLAGS.split()], cwd=folder, check=True)
    shutil.rmtree(HERE, ignore_errors=True)
    shutil.copytree(Path(folder) / "run", HERE / "run", ignore=shutil.ignore_patterns("*.png", "report.html"))
