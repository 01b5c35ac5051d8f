"""README.md from nbs/index.ipynb: `make_readme.py` writes it, `make_readme.py --check` fails if it is out of step."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def cell_text(cell):
    """Markdown of one cell; a code cell with `#| hide` or without source has none."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    if not source.strip() or re.search(r"^#\|\s*hide", source, re.M):
        return ""
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
    shown = "".join("".join(o.get("text", [])) for o in cell["outputs"] if o.get("name") == "stdout").rstrip()
    printed = f"```\n{shown}\n```" if shown else ""
    if re.search(r"^#\|\s*echo:\s*false", source, re.M):
        drawn = ["".join(o["data"].get("text/markdown", [])) for o in cell["outputs"] if "data" in o]
        return "\n\n".join(filter(None, [printed, *drawn]))
    return f"```python\n{code}\n```" + (f"\n\n{printed}" if printed else "")


def readme():
    """The whole text: the notebook's title and `>` subtitle stay as they are."""
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    note = "<!-- made from nbs/index.ipynb by .ci/make_readme.py: edit the notebook -->"
    text = "\n\n".join([note] + [t.strip() for t in map(cell_text, cells) if t.strip()]) + "\n"
    return re.sub(r"\]\((?=images/|\w+\.ipynb)", "](nbs/", text)      # pictures and pages lie beside the notebook


if __name__ == "__main__":
    path, text = ROOT / "README.md", readme()
    if "--check" not in sys.argv:
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb says; run python .ci/make_readme.py")
