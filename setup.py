"""Reads everything from settings.ini, the one place where versions and requirements stand."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("demo", "wandb", "tensorboard", "notebook", "lm", "lora", "onnx", "convert", "prominence")}
extras["all"] = sorted({r for rs in extras.values() for r in rs})
extras["record"] = cfg["record_requirements"].split()   # openSMILE's licence is for research: only for those who ask
extras["dev"] = extras["all"] + cfg["dev_requirements"].split()
extras["serve"] = cfg["serve_requirements"].split()     # a web server: only for those who ask
extras["browser"] = cfg["browser_requirements"].split()  # what the tests in a real browser need, besides chromium and its driver

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    license_files=["LICENSE"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["prosody_ser", "prosody_ser.*"]), include_package_data=True,
    install_requires=cfg["requirements"].split(), extras_require=extras,
    python_requires=">=" + cfg["min_python"],
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d']},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Natural Language :: English", "Programming Language :: Python :: 3"],
    zip_safe=False,
)
