"""Pages that draw what lies in `nbs/results` go on when rows are missing or new; the lists of pages and modules are whole."""
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

RECORD = json.loads((ROOT / "nbs/results/record.json").read_text(encoding="utf-8"))


def texts_of(page, kind="markdown"):
    """The sources of the cells of a page."""
    cells = json.loads((ROOT / f"nbs/{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def section(name):
    """The pages of a section of the menu."""
    menu = yaml.safe_load((ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    return next(s["contents"] for s in menu if isinstance(s, dict) and s["section"].startswith(name))


def changed(rows, **more):
    """These rows with other values."""
    return [r | more for r in rows]


ROWS = RECORD["rows"]
FIRST = [r for r in ROWS if r["part"] == "table"][:3]
OTHER = {"across/emodb": next(iter(FIRST[2]["against"].values()))}
ACROSS = [FIRST[0] | dict(part="across", variant=f"trained on {on}", against=against, seeds=3) for on, against in
          [("emodb", {}), ("all", OTHER), ("nemo and ravdess", OTHER)]]
RECORDS = {
    "nothing": [],
    "one row": FIRST[:1],
    "the features alone": [r for r in ROWS if r["backbone"] == "ComParE"],
    "the table alone": [r for r in ROWS if r["part"] == "table"],
    "no table": [r for r in ROWS if r["part"] != "table"],
    "one corpus": [r for r in ROWS if r["corpus"] == "nemo"],
    "a new corpus": ROWS + changed(FIRST, corpus="akan"),
    "a new way and backbone": ROWS + changed(FIRST, way="LoRA", backbone="xlsr"),
    "across": ROWS + ACROSS,
}


@pytest.mark.parametrize("page", ["results", "index", "guide_train"])
@pytest.mark.parametrize("name", RECORDS)
def test_a_page_goes_on(page, name, tmp_path, monkeypatch):
    """Every cell of the page runs; what is drawn says nothing of what was not measured."""
    import matplotlib.pyplot as plt
    shutil.copytree(ROOT / "nbs/results", tmp_path / "results")
    for path in (ROOT / "nbs").glob("*.ipynb"):
        shutil.copy2(path, tmp_path)
    shutil.copy2(ROOT / "nbs/sidebar.yml", tmp_path)
    (tmp_path / "results/record.json").write_text(json.dumps(RECORD | dict(rows=RECORDS[name])), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    scope = {}
    for source in texts_of(page, "code"):
        exec(source, scope)
    plt.close("all")
    if page == "results":
        assert "nan" not in scope["findings"]() and (name != "nothing" or scope["findings"]() == "Nothing is measured yet.")
        assert ("akan" in scope["findings"]()) == (name == "a new corpus")
        others = any(r["part"] == "across" and r["against"] and not r["variant"].endswith(" all") for r in RECORDS[name])
        assert ("the other corpora alone" in scope["findings"]()) == others and (others or name != "across")


@pytest.mark.parametrize("name", ["Start", "Guides", "Results", "Run"])
def test_home_leads_to_every_page(name):
    """The map of the home page is of this menu: run nbs/index.ipynb and .ci/make_readme.py after a change of it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page for page in section(name) if f"](nbs/{page})" not in text]


def test_each_module_has_a_line():
    """The table of the rooms names every module, each once, and leads to the page that it is made from."""
    lines = re.findall(r"^\| \[(\w+)\]\((\w+)\.ipynb\) \|", "\n".join(texts_of("rooms")), re.M)
    modules = {p.stem for p in (ROOT / "prosody_ser").glob("*.py") if not p.stem.startswith("_")}
    assert sorted(m for m, _ in lines) == sorted(modules)
    assert not [m for m, page in lines if f"#| default_exp {m}" not in "\n".join(texts_of(page, "code"))]


def test_each_command_is_shown():
    """A user finds every command of `prosody-ser` on the pages *Train on your corpus* and *Use a model*."""
    from prosody_ser.cli import COMMANDS
    text = "\n".join(texts_of("guide_train") + texts_of("guide_use"))
    shown = set(re.findall(r"prosody-ser (\w+)", text)) | set(re.findall(r"python -m prosody_ser\.(\w+)", text))
    assert not set(COMMANDS) - shown, set(COMMANDS) - shown


def test_the_first_commands_stand_in_the_readme():
    """Installation, demo and tests; CI runs the same."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("pip install -c constraints.txt -e '.[demo]'", "prosody-ser demo", "pip install -c constraints.txt -e '.[dev]' && bash .ci/test"):
        assert command in text


def test_titles_are_unique():
    """Two pages of one name cannot be told apart in the menu."""
    titles = [texts_of(p.stem)[0].splitlines()[0] for p in sorted(Path(ROOT / "nbs").glob("*.ipynb"))]
    assert len(set(titles)) == len(titles), sorted(t for t in titles if titles.count(t) > 1)
