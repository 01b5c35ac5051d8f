"""How the code reads: at most 110 columns, one statement a line, small functions, cells, rooms and few public names.

`check_style.py` fails on what is over a limit; `check_style.py PAGE.ipynb ...` looks at some pages only;
`--counts` prints a table of the rooms."""
import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS, FUNCTION, CELL, ROOM, ROOMS, NAMES = 110, 40, 50, 450, 47, 391


def is_exported(source):
    """Whether a cell goes to the package."""
    return bool(re.search(r"^#\|\s*exports?\b", source, re.M))


def code_cells(path):
    """(id, source) of the code cells of a notebook that are Python alone and not generated."""
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(c["source"])
        generated = "# On Colab the package is installed" in source          # by make_pages.py
        if c["cell_type"] == "code" and not generated:
            yield c["id"], source


def is_guard(node):
    """`if x: return y` on one line, without an else."""
    leaves = ast.Return, ast.Raise, ast.Continue, ast.Break
    return isinstance(node, ast.If) and not node.orelse and len(node.body) == 1 and isinstance(node.body[0], leaves)


def crowded(tree):
    """Line numbers with more than one statement."""
    for node in ast.walk(tree):
        for block in (getattr(node, name, []) for name in ("body", "orelse", "finalbody")):
            if not isinstance(block, list):
                continue
            lines = [s.lineno for s in block if isinstance(s, ast.stmt)]
            yield from (b for a, b in zip(lines, lines[1:], strict=False) if a == b)
        if isinstance(node, ast.stmt) and getattr(node, "body", None) and not is_guard(node):
            if node.body[0].lineno == node.lineno:
                yield node.lineno


def cell_problems(source):
    """What is wrong with one code cell."""
    for i, line in enumerate(source.splitlines(), 1):
        if len(line) > COLUMNS:
            yield f"line {i} has {len(line)} columns"
    try:
        tree = ast.parse("\n".join("" if x.lstrip().startswith(("%", "!")) else x for x in source.splitlines()))
    except SyntaxError as e:
        yield f"not Python: {e}"
        return
    yield from (f"line {i} has more than one statement" for i in sorted(set(crowded(tree))))
    if is_exported(source):                  # nbdev turns them into raw links within the signature
        comments = (t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT)
        yield from (f"line {t.start[0]} has a backtick in a comment" for t in comments if "`" in t.string)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= FUNCTION:
            yield f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
    if is_exported(source) and (n := len(source.splitlines())) > CELL:
        yield f"an exported cell of {n} lines"


def code_lines(source):
    """Lines of code: no blanks, comments or docstrings, and not what nbdev adds."""
    lines = set()
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            lines.update(range(t.start[0], t.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        if documented:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def public_names(source):
    """The names of `__all__`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [e.value for e in node.value.elts]
    return []


def rooms():
    """Room -> (code lines, public names)."""
    files = [p for p in sorted((ROOT / "prosody_ser").glob("*.py")) if not p.stem.startswith("_")]
    texts = {p.stem: p.read_text(encoding="utf-8") for p in files}
    return {name: (code_lines(t), len(public_names(t))) for name, t in texts.items()}


def room_problems(counts):
    """What is wrong with the house."""
    yield from (f"{name}: {lines} code lines, at most {ROOM}" for name, (lines, _) in counts.items() if lines > ROOM)
    if len(counts) > ROOMS:
        yield f"{len(counts)} modules, at most {ROOMS}"
    if (n := sum(names for _, names in counts.values())) > NAMES:
        yield f"{n} public names, at most {NAMES}"


def main(arguments):
    """Looks at the pages, and where none is named at the house."""
    counts, pages = rooms(), [Path(a) for a in arguments if a.endswith(".ipynb")]
    if "--counts" in arguments:
        print("\n".join(f"{name:12}{lines:6}{names:5}" for name, (lines, names) in counts.items()))
        print(f"{len(counts):<12}{sum(a for a, _ in counts.values()):6}{sum(b for _, b in counts.values()):5}")
    found = [] if pages else list(room_problems(counts))
    for path in pages or sorted((ROOT / "nbs").rglob("*.ipynb")):
        for id, source in code_cells(path):
            found += [f"{path.name} {id}: {what}" for what in cell_problems(source)]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main(sys.argv[1:])
