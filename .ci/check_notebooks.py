"""Fails for a notebook that is over 200 KB, holds an error, or was committed without having been run."""
import json
import sys
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"


def problems(path):
    """What is wrong with one notebook."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    if path.stat().st_size > 200 * 1024:
        yield f"{path.stat().st_size // 1024} KB; keep it under 200, with smaller figures"
    if any(o["output_type"] == "error" for c in code for o in c["outputs"]):
        yield "an output is an error"
    if any("print(" in "".join(c["source"]) for c in code) and not any(c["outputs"] for c in code):
        yield "it prints, but holds no output: run it before committing"


bad = [f"{p.relative_to(NBS.parent)}: {what}" for p in sorted(NBS.rglob("*.ipynb")) for what in problems(p)]
if bad:
    sys.exit("\n".join(bad))
