"""The cells of the runnable pages that are not written by hand: the Colab badge (from settings.ini), the cell that installs the package there, and the
parameters (from the configuration classes). `make_pages.py` writes them, `make_pages.py --check` fails if one is out of step."""
import json
import re
import sys
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import get_args

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from prosody_ser.cli import PAGE_PARAMETERS  # noqa: E402
from prosody_ser.config import EvaluateConfig, GatherConfig, TrainConfig, default_of  # noqa: E402
from prosody_ser.parsing import RECIPE_HELP  # noqa: E402

# page -> class of its settings, defaults that differ from the class's, settings that are not the page's
RUNNABLE = {
    "train": (TrainConfig, dict(save_dir="runs/notebook"), ()),
    "evaluate": (EvaluateConfig, dict(output_dir="runs/notebook-eval"), ()),
    "ablation": (TrainConfig, dict(save_dir="runs/notebook-ablation"), ("run_ablation_study",)),
    "gather": (GatherConfig, {}, ()),
}
# pages that need nothing but the package and fastcore
TUTORIALS = ["start_1_hear_it", "start_2_your_corpus", "start_3_train", "start_4_read_the_errors", "start_5_use_and_share",
             "guide_akan", "guide_colab", "00b_corpus", "05_ctc", "06b_inference"]
COLUMNS = 110                       # of a parameter's line; choices that make it longer are left to the error message
BADGE, INSTALL = "[![Open in Colab]", "# On Colab"


def settings():
    """settings.ini."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def badge(page):
    """The link that opens a page on Colab."""
    cfg = settings()
    where = cfg["git_url"].removeprefix("https://github.com/")
    return f"{BADGE}(https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{where}/blob/{cfg['branch']}/{cfg['nbs_path']}/{page}.ipynb)"


def install(runnable):
    """The first code cell: nothing but on Colab, and nothing there where the package is installed."""
    cfg = settings()
    package = f'"{cfg["lib_name"]}[demo] @ git+{cfg["git_url"]}@{cfg["branch"]}"' + ("" if runnable else " fastcore")
    lines = [f"{INSTALL} the package is installed if it is missing; elsewhere nothing is done.", "import sys", "from importlib.util import find_spec"]
    lines += ["from typing import Optional"] if runnable else []
    lines += ['if "google.colab" in sys.modules and find_spec("prosody_ser") is None:', f"    !pip install -q {package}"]
    lines += ["_before = set(globals())               # what is new after the next cell is a parameter"] if runnable else []
    return "\n".join(([] if runnable else ["#| hide", "#| eval: false"]) + lines)


def type_text(kind):
    """A type as papermill's inspection can read it: it knows no `|`."""
    if isinstance(kind, UnionType):
        return f"Optional[{type_text(next(k for k in get_args(kind) if k is not type(None)))}]"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def line(name, kind, default, help):
    """One parameter: name, type, default, help."""
    help = re.sub(r"\s*=\s*", ": ", help)               # papermill reads no line with a second `=`
    text = f"{name}: {type_text(kind)} = {json.dumps(default, ensure_ascii=False) if isinstance(default, str) else repr(default)}  # {help}"
    if text.count("=") > 1 or "\n" in text:
        sys.exit(f"{name}: papermill cannot read a default with '=', nor a line break: {text!r}. Change it in the configuration.")
    return text


def parameters(config_class, own, left_out):
    """The parameters cell."""
    lines = []
    for f in fields(config_class):
        if f.name in left_out:
            continue
        default = own.get(f.name, default_of(f))
        optional = default is None and type(None) not in get_args(f.type)         # required: None stands for the demo
        demo = "; None: the demo's" if optional else ""
        kind, help = f.type | None if optional else f.type, f.metadata["help"]
        short = line(f.name, kind, default, help + demo)
        whole = line(f.name, kind, default, f"{help} ({', '.join(f.metadata.get('choices') or [])}){demo}")
        lines.append(whole if f.metadata.get("choices") and len(whole) <= COLUMNS else short)
    own = {"recipe": (str, "default", RECIPE_HELP)} if config_class is TrainConfig else {}
    return "\n".join(lines + [line(name, *what) for name, what in (own | PAGE_PARAMETERS).items()])


def cell(kind, source, name, tags=()):
    """A new cell."""
    new = dict(cell_type=kind, id=name, metadata=dict(tags=list(tags)) if tags else {}, source=source.splitlines(keepends=True))
    return new | (dict(execution_count=None, outputs=[]) if kind == "code" else {})


def place(cells, is_it, new, at):
    """Put a cell's text where it is, or the cell where it belongs."""
    found = next((c for c in cells if is_it("".join(c["source"]), c)), None)
    if found is None:
        cells.insert(at, new)
    elif found["source"] != new["source"]:
        found["source"] = new["source"]


def written(page, nb):
    """The page with its generated cells."""
    cells, runnable = nb["cells"], page in RUNNABLE
    place(cells, lambda s, c: s.startswith(BADGE), cell("markdown", badge(page), "badge"), 1)
    first = next(i for i, c in enumerate(cells) if c["cell_type"] == "code")
    place(cells, lambda s, c: INSTALL in s, cell("code", install(runnable), "install"), first)
    if runnable:
        install_at = next(i for i, c in enumerate(cells) if INSTALL in "".join(c["source"]))
        place(cells, lambda s, c: "parameters" in c["metadata"].get("tags", ()), cell("code", parameters(*RUNNABLE[page]), "parameters", ["parameters"]), install_at + 1)
    return nb


if __name__ == "__main__":
    stale = []
    for page in [*RUNNABLE, *TUTORIALS]:
        path = ROOT / "nbs" / f"{page}.ipynb"
        before = json.loads(path.read_text(encoding="utf-8"))
        after = written(page, json.loads(path.read_text(encoding="utf-8")))
        if after != before:
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(json.dumps(after, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: parameters, badge or first cell are not what settings.ini and the configuration say; run python .ci/make_pages.py && nbdev_clean")
    print("\n".join(f"nbs/{p}.ipynb" for p in stale) if stale else "the runnable pages are in step")
