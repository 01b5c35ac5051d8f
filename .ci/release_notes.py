"""What CHANGELOG.md says of a version: `release_notes.py v0.2.0` prints it, and fails if the tag is not the version of settings.ini or has no entry."""
import re
import sys
from configparser import ConfigParser
from pathlib import Path


def notes(tag, root):
    """The entry of the version, without its heading."""
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    version = config["DEFAULT"]["version"]
    if tag != f"v{version}":
        sys.exit(f"the tag is {tag}, settings.ini says {version}: set the version there, run make prepare, and tag that commit")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = re.search(rf"^## {re.escape(version)}\b.*\n((?:(?!## ).*\n?)*)", changes, re.M)
    if entry is None or not entry[1].strip():
        sys.exit(f"CHANGELOG.md has no entry `## {version}`: give Unreleased its number and date")
    return entry[1].strip()


if __name__ == "__main__":
    print(notes(sys.argv[1], Path(__file__).parent.parent))
