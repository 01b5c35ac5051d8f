"""Fails for a notebook that is over 200 KB, holds an error or a path of somebody's machine, was committed without having been run, or mixes imports with work
in a cell that is not exported (building the documentation executes every cell with an import, but for those marked eval: false)."""
import ast
import json
import re
import sys
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"


def mixed(source):
    """Whether a cell both imports and works; a `!command` or `%magic` is work."""
    python = re.sub(r"^(\s*)[!%].*", r"\1pass", source, flags=re.M)
    imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(python).body]
    return any(imports) and not all(imports)


def problems(path):
    """What is wrong with one notebook."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    if path.stat().st_size > 200 * 1024:
        yield f"{path.stat().st_size // 1024} KB; keep it under 200, with smaller figures"
    if any(o["output_type"] == "error" for c in code for o in c["outputs"]):
        yield "an output is an error"
    if found := re.search(r"(?<![\w./-])/(home|root|Users|work|mnt)/[^\"'\s\\]+", path.read_text(encoding="utf-8")):
        yield f"a path of the machine it was run on: {found[0]}"
    sources = ["".join(c["source"]) for c in code]
    if any("#| export" in s for s in sources) and (bad := [s for s in sources if "#| export" not in s and "#| eval: false" not in s and mixed(s)]):
        yield f"imports and work in one cell: {bad[0].splitlines()[-1][:60]!r}"
    if any("print(" in "".join(c["source"]) for c in code) and not any(c["outputs"] for c in code):
        yield "it prints, but holds no output: run it before committing"


if __name__ == "__main__":
    found = [f"{p.relative_to(NBS.parent)}: {what}" for p in sorted(NBS.rglob("*.ipynb")) for what in problems(p)]
    if found:
        sys.exit("\n".join(found))
