"""`.ci/site`, the check of the documentation, sees each kind of defect in a small project, and names page, cell, line and cure."""
import base64
import json
import subprocess
import sys

import pytest
from conftest import ROOT

SETTINGS = """[DEFAULT]
repo = tiny
lib_name = tiny
user = nobody
author = Nobody
author_email = nobody@example.com
version = 0.1
min_python = 3.11
license = apache2
description = A project of two pages
keywords = test
language = English
status = 3
audience = Science/Research
branch = main
copyright = nobody
custom_sidebar = True
black_formatting = False
nbs_path = nbs
lib_path = tiny
doc_path = _docs
doc_host = https://nobody.github.io
doc_baseurl = /tiny
git_url = https://github.com/nobody/tiny
title = Tiny
readme_nb = none.ipynb
recursive = True
tst_flags = slow
put_version_in_init = True
cell_number = True
"""
HEAD = "# A page\n\n> What it holds"
PIXEL = base64.b64encode((ROOT / "nbs/images/listener.png").read_bytes()[:60]).decode()


def md(text):
    """A cell of Markdown."""
    return dict(cell_type="markdown", source=text)


def code(text, **data):
    """A cell of code that shows `data`: `png` or `plain`."""
    kinds = dict(png="image/png", plain="text/plain", html="text/html")
    shown = [dict(output_type="execute_result", execution_count=1, metadata={}, data={kinds[k]: v for k, v in data.items()})] if data else []
    return dict(cell_type="code", source=text, execution_count=1, outputs=shown)


def page(*cells):
    """A notebook of a heading, a sentence, and these cells."""
    return notebook(md(HEAD), md("It says what it is for."), *cells)


def notebook(*cells):
    """A notebook; its cells are called c0, c1, ..."""
    cells = [c | dict(id=f"c{i}", metadata={}) for i, c in enumerate(cells)]
    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    return dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)


GOOD = {
    "index": page(md("See [the room](00_room.ipynb#a-heading), [the code](https://github.com/nobody/tiny/blob/main/settings.ini), and $\\alpha^2$."),
                  code('#| fig-alt: "Nothing to see"\n1', png=PIXEL)),
    "00_room": notebook(md(HEAD), md("A `**` of Python and *italics*.\n\n| a | b |\n|---|---|\n| 1 | 2 |"), md("## A heading\n\nBack [home](index.ipynb)."),
                        code("#| default_exp room"), code('#| export\ndef double(x):\n    "Twice x."\n    return 2 * x\n\ndef _half(x): return x / 2'),
                        code("if True:\n    !echo 2 ** 3 ** 2\ndouble(2)", plain="4")),
}
# page -> (notebook, what the check must say)
BAD = {
    "00_twice": (page(), "00_twice.ipynb, line 1: twice.ipynb would be twice.html too; rename one"),
    "twice": (page(), ""),
    "lost": (page(), "lost.ipynb, line 1: no menu reaches it; name it in nbs/sidebar.yml"),
    "address": (page(md("One.\n\nSee [that](nowhere.ipynb).")), "address.ipynb, cell c2, line 3: there is no nowhere.ipynb; mend the address"),
    "anchor": (page(md("See [that](00_room.ipynb#gone).")), "anchor.ipynb, cell c2, line 1: room.html has no #gone; mend the address"),
    "repository": (page(md("[it](https://github.com/nobody/tiny/blob/main/gone.py)")),
                   "repository.ipynb, cell c2, line 1: gone.py is not in the repository; mend the address"),
    "output": (page(code("1", html='<a href="run/report.html">here</a>')), "output.ipynb, cell c2, its output: there is no run/report.html; mend the address"),
    "word": (page(md("A `double` room.")), "word.ipynb, cell c2, line 1: `double`, a plain word, becomes a link to room.html#double; write"),
    "private": (page(md("See `_half`.")), "private.ipynb, cell c2, line 1: room.html has no #_half; mend the address (a name in backticks becomes a link"),
    "nested": (page(md("A link [[`a`](index.ipynb)](index.ipynb).")), "nested.ipynb, cell c2, line 1: a link is shown as it was typed"),
    "bold": (page(md("Not ** bold**, nor **bold **.")), "bold.ipynb, cell c2, line 1: bold is shown as it was typed"),
    "table": (page(code("1", plain="| a | b |\n|---|---|\n| 1 | 2 |")), "table.ipynb, cell c2, its output: a table is shown as it was typed"),
    "latex": (page(md("It is \\\\alpha here.")), "latex.ipynb, cell c2, line 1: LaTeX is shown as it was typed"),
    "formula": (page(md("It is $\\undefined{x}$ here.")), "formula.ipynb, cell c2, line 1: LaTeX is shown as it was typed"),
    "figure": (page(code("1", png=PIXEL)), "figure.ipynb, cell c2, its output: a picture without a text"),
    "picture": (page(md("One.\n\n![](images/x.png)")), "picture.ipynb, cell c2, line 3: a picture without a text"),
    "wide": (page(code("x = 1\ny = '" + 120 * "a" + "'")), "wide.ipynb, cell c2, line 2: 126 columns of code, at most 110; break it"),
    "fence": (page(md("```sh\necho\necho " + 120 * "a" + "\n```")), "fence.ipynb, cell c2, line 3: 125 columns of code, at most 110; break it"),
    "large": (page(md(210000 * "a")), "large.ipynb, line 1: 205 KB; keep it under 200"),
    "magic": (page(code("import sys\nif 'x' in sys.modules:\n    %pip install x\ny = 1")), "magic.ipynb, cell c2, line 4: not Python as the page shows it"),
    "bare": (notebook(md("One sentence.")), "bare.ipynb, line 1: no title and subtitle; begin with a cell `# Title` and `> Subtitle`"),
    "dropped": (notebook(md(HEAD + "\n\nA sentence."), md("It says.")), "dropped.ipynb, line 4: nbdev drops what stands under the subtitle"),
    "title": (notebook(md("# index\n\n> What it holds"), md("It says what it is for.")), "title.ipynb, line 1: index.ipynb is titled 'index' too; rename one"),
    "empty": (page(md("## Nothing"), code("#| hide\n1"), md("## Text\n\n### A smaller heading\n\nIt says.")),
              "empty.ipynb, cell c2, line 1: nothing stands under the heading 'Nothing'; say what"),
    "mute": (notebook(md(HEAD), md("## A heading\n\n- Text")), "mute.ipynb, line 1: no first sentence; say what the page is for before its first heading or code"),
}


def checked(folder, pages, named):
    """A project of these pages, and what `.ci/site` says of it: (exit code, lines)."""
    (folder / "nbs").mkdir()
    (folder / "tiny").mkdir()
    (folder / "tiny/__init__.py").write_text('__version__ = "0.1"\n')
    (folder / "tiny-0.1.dist-info").mkdir()                # as if it were installed: nbdev then knows its names
    (folder / "tiny-0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 0.1\n")
    (folder / "tiny-0.1.dist-info/entry_points.txt").write_text("[nbdev]\ntiny = tiny._modidx:d\n")
    (folder / ".gitignore").write_text("nbdev.yml\n")
    (folder / "settings.ini").write_text(SETTINGS)
    menu = "".join(f"      - {n}.ipynb\n" for n in named)
    (folder / "nbs/sidebar.yml").write_text(f"website:\n  sidebar:\n    contents:\n{menu}")
    (folder / "nbs/_quarto.yml").write_text("project: {type: website}\n")
    for name, made in pages.items():
        titled = json.dumps(made).replace(json.dumps(HEAD)[1:-1], json.dumps(HEAD.replace("A page", name))[1:-1])
        (folder / f"nbs/{name}.ipynb").write_text(titled, encoding="utf-8")
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["nbdev_export"], cwd=folder, check=True)
    done = subprocess.run([sys.executable, ROOT / ".ci/site", "--root", folder, "--out", folder / "out"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, done.stdout.splitlines()


def test_a_sound_project_passes(tmp_path):
    assert checked(tmp_path, GOOD, GOOD) == (0, ["2 pages are in order"])
    html = (tmp_path / "out/room.html").read_text(encoding="utf-8")
    assert "double" in html and 'href="index.html"' in html and "<table" in html


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the check says of a project in which every page but two has one defect."""
    pages = GOOD | {name: made for name, (made, _) in BAD.items()}
    status, lines = checked(tmp_path_factory.mktemp("bad"), pages, [n for n in pages if n != "lost"] + ["gone"])
    assert status == 1
    return lines


@pytest.mark.parametrize("name", [n for n, (_, said) in BAD.items() if said])
def test_a_defect_is_found(found, name):
    assert [x for x in found if x.startswith(f"{name}.ipynb")][0].startswith(BAD[name][1]), found


def test_a_page_of_the_menu_that_is_gone(found):
    assert "sidebar.yml: gone.ipynb is no page; take it out" in found


def test_nothing_else_is_found(found):
    """One line a defect, and none for a page without."""
    assert len([x for x in found if x.startswith(tuple(f"{n}.ipynb" for n in GOOD))]) == 0
    assert len(found) == len(BAD)                          # `twice` has none of its own, the menu has one


def printed(page):
    """What the cells of a page have printed."""
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "".join("".join(o.get("text", o.get("traceback", []))) for c in cells for o in c.get("outputs", []))


def test_no_page_shows_a_traceback():
    """An object that cannot show itself prints one, and the page goes on."""
    assert not [p.name for p in (ROOT / "nbs").glob("*.ipynb") if "Traceback" in printed(p)]
