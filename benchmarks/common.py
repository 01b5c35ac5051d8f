"""What the studies share: the corpora, and commands of the package as processes of their own."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass
class Corpus:
    """Real speech that is not shipped; the folder comes from the command line."""

    manifests: list  # below its folder
    heads: list  # it has labels for
    folds: int | None  # None: each speaker is one
    emotion_names: str | None = None  # names of emotion indices

    def files(self, folder):
        """Its manifests in a folder; without them that of the whole corpus, from `prosody-ser prepare`."""
        files = [Path(folder) / m for m in self.manifests]
        return files if all(f.exists() for f in files) else [Path(folder) / "all.jsonl"]


CORPORA = {
    "emodb": Corpus(["train.jsonl", "val.jsonl", "test.jsonl"], ["ser", "asr", "prosody"], None, "emodb"),
    "nemo": Corpus(["small.jsonl"], ["ser", "asr"], None),
    "ravdess": Corpus(["all.jsonl"], ["ser"], 5),
}
# Settings that every study shares: they do not change what is learned, but how it is carried out and read.
PLAIN = dict(backbone="whisper", num_workers=0, checkpoint_interval=0, eval_steps=0, decode_method="greedy")


def heads(names):
    """The heads that are on, as settings."""
    return {f"use_alpha_{n}": True for n in names}


def flags(settings):
    """Settings as command-line arguments; False switches one off that is on by default."""
    found = []
    for name, value in settings.items():
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no_{name}")
        else:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def prosody_ser(command, settings, log, *given):
    """Run a command of the package, given comes before its settings. What it prints goes to a log. Raises
    `CalledProcessError`."""
    code = "from prosody_ser.cli import main; main()"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as out:
        subprocess.run(
            [sys.executable, "-c", code, command, *map(str, given), *flags(settings)],
            stdout=out,
            stderr=out,
            check=True,
        )


def commit():
    """The commit of the package that runs; with a star where it was changed since."""

    def git(*command):
        return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + "*" * bool(git("status", "--porcelain", "prosody_ser"))


def read_json(path, default=None):
    """A JSON file, or the default where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def write_json(path, what):
    """In one step: whoever is killed leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".new").replace(path)
