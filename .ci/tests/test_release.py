"""Habits for those who carry on: the Makefile explains itself, the version stands in one place, a release says what changed."""
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT


def test_make_lists_its_targets():
    """Each target of the Makefile, with what it does."""
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert [line.split()[1] for line in done.stdout.splitlines()] == targets
    assert {"prepare", "test", "site", "preview", "bench", "clean"} < set(targets)


def test_files_that_make_and_the_workflows_run_are_there():
    texts = [p.read_text() for p in [ROOT / "Makefile", *(ROOT / ".github/workflows").glob("*.yaml")]]
    named = {name for text in texts for name in re.findall(r"(?:bash|python) ((?:\.ci|benchmarks)/[\w.]+)", text)}
    assert len(named) > 6 and not [n for n in named if not (ROOT / n).is_file()]


def test_workflows_and_templates_are_yaml():
    for path in (ROOT / ".github").rglob("*.y*ml"):
        assert {"name", "jobs"} <= set(yaml.safe_load(path.read_text())), path
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"):
        assert {"name", "about"} == set(yaml.safe_load(path.read_text().split("---")[1])), path


def test_the_version_stands_in_one_place():
    """setup.py reads settings.ini, nbdev writes it to the package; nobody else says it."""
    version = re.search(r"^version = (\S+)", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert f'__version__ = "{version}"' in (ROOT / "prosody_ser/__init__.py").read_text()
    assert not [p.name for p in (ROOT / "setup.py", ROOT / "_quarto.yml", ROOT / "nbs/index.ipynb") if f'"{version}"' in p.read_text()]


@pytest.mark.parametrize("tag, changes, said", [
    ("v0.1.0", "# Changes\n\n## 0.1.0, 2027-01-01\n\n- First.\n\n## 0.0.9\n\n- Old.\n", "- First."),
    ("v0.2.0", "## 0.2.0\n\n- New.\n", "the tag is v0.2.0, settings.ini says 0.1.0"),
    ("v0.1.0", "## Unreleased\n\n- New.\n", "CHANGELOG.md has no entry `## 0.1.0`"),
    ("v0.1.0", "## 0.1.0\n\n## 0.0.9\n\n- Old.\n", "CHANGELOG.md has no entry `## 0.1.0`"),
])
def test_release_notes(tmp_path, tag, changes, said):
    (tmp_path / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/release_notes.py", tmp_path / ".ci")
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nversion = 0.1.0\n")
    (tmp_path / "CHANGELOG.md").write_text(changes)
    done = subprocess.run([sys.executable, tmp_path / ".ci/release_notes.py", tag], capture_output=True, text=True)
    assert (done.stdout.strip() == said) if done.returncode == 0 else done.stderr.startswith(said)
    assert (done.returncode == 0) == said.startswith("-")
