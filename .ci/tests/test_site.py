"""The documentation builds: page names are unique, README.md stays what .ci/make_readme.py wrote, signatures show no raw links. Quarto itself is
not needed: a stand-in notes what it is asked for, and everything before it is nbdev's own work."""
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from nbdev.doclinks import _nbpath2html

QUARTO = """#!/usr/bin/env bash
if [ "$1" = --version ]; then echo 1.7.32; exit; fi
echo "$@" >> "$QUARTO_CALLS"; mkdir -p _docs; echo made > _docs/README.md
"""


def pages():
    return sorted((ROOT / "nbs").glob("*.ipynb"))


def test_page_names_are_unique():
    """nbdev strips number prefixes: 10c_x.ipynb and x.ipynb would be one page."""
    twice = [name for name, n in Counter(str(_nbpath2html(p)) for p in pages()).items() if n > 1]
    assert not twice


def test_sidebar_names_every_page():
    """A page that the sidebar leaves out is not found by readers; one that is gone breaks the build."""
    named = re.findall(r"[\w-]+\.ipynb", (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"))
    assert sorted(named) == [p.name for p in pages()]


def printed(page):
    """What the cells of a page have printed."""
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "".join("".join(o.get("text", o.get("traceback", []))) for c in cells for o in c.get("outputs", []))


def test_no_page_shows_a_traceback():
    """An object that cannot show itself prints one, and the page goes on."""
    assert not [p.name for p in pages() if "Traceback" in printed(p)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A copy of the checkout after `nbdev_docs`."""
    folder, tools = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("bin")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda n: (ROOT / n).exists(), files.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    (tools / "quarto").write_text(QUARTO)
    (tools / "quarto").chmod(0o755)
    os.utime(folder / "README.md", (0, 0))                 # older than its notebook, as after a checkout
    env = os.environ | dict(PATH=f"{tools}{os.pathsep}{os.environ['PATH']}", QUARTO_CALLS=str(tools / "calls"), PYTHONPATH=str(folder))
    done = subprocess.run(["nbdev_docs", "--n_workers", "1"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "render --no-cache" in (tools / "calls").read_text()
    return folder


def test_nbdev_docs_changes_no_file(site):
    """Above all README.md, which .ci/sync compares with its notebook."""
    for path in [site / "README.md", *(site / "nbs").rglob("*.*"), *(site / "prosody_ser").glob("*.py")]:
        if path.is_file():
            assert path.read_bytes() == (ROOT / path.relative_to(site)).read_bytes(), path


def outputs(page):
    """The Markdown and HTML of a page's outputs."""
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            yield from ("".join(v) for k, v in output.get("data", {}).items() if k in ("text/markdown", "text/html"))


def test_signatures_hold_no_links(site):
    """Within a code block a link is shown as raw Markdown."""
    made = [Path(p) for p in sorted((site / "_proc").glob("*.ipynb"))]
    assert len(made) == len(pages())
    blocks = [(p.name, b) for p in made for text in outputs(p) for b in re.findall(r"```.*?```", text, re.S)]
    assert len(blocks) > 150                               # there are signatures, so that the next line can fail
    assert not [(p, b) for p, b in blocks if re.search(r"\]\(http", b)]
