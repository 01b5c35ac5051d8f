"""The widgets in a real browser: JupyterLab on this machine, Chromium, a study, an upload, a microphone that plays a file.

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver) and `pip install selenium jupyterlab`; skipped without them.
SCREENSHOTS=FOLDER keeps pictures of what it saw."""
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, read
from test_commands import train

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
MISSING = [m for m in ("selenium", "jupyterlab") if not importlib.util.find_spec(m)] + [p for p, found in dict(chromium=BROWSER, chromedriver=shutil.which("chromedriver")).items() if not found]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {', '.join(MISSING)}")
CELLS = ["from prosody_ser.widget import Explorer, Listener\nexplorer = Explorer('run'); explorer", "listener = Listener('run/best_model', decode='greedy'); listener"]


@pytest.fixture(scope="module")
def study(corpus, tmp_path_factory):
    """A folder with a finished study, a notebook that shows both widgets, and files to upload."""
    folder = tmp_path_factory.mktemp("lab")
    done = train(corpus, folder, "--run_ablation_study", "--ablation_alphas", "0", "0.5", "--ablation_epochs", "1", "--backbone_lr", "1e-3", "--head_lr", "1e-3")
    assert done.returncode == 0, done.stderr[-2000:]
    cell = lambda source: dict(cell_type="code", source=source, metadata={}, outputs=[], execution_count=None)
    (folder / "widgets.ipynb").write_text(json.dumps(dict(cells=[cell(c) for c in CELLS], metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")), nbformat=4, nbformat_minor=4)))
    shutil.copy(corpus / "test0.wav", folder)
    (folder / "not_audio.wav").write_text("<b>no sound</b>")
    return folder


@pytest.fixture(scope="module")
def lab(study):
    """The address of a JupyterLab that serves the folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    env = os.environ | dict(PYTHONPATH=str(ROOT), HOME=str(study), JUPYTER_CONFIG_DIR=str(study / "config"), GOMP_SPINCOUNT="0")
    argv = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", f"--ServerApp.root_dir={study}", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(study / "lab.log", "w") as log:
        server = subprocess.Popen(argv, cwd=study, env=env, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (study / "lab.log").read_text()[-2000:]
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(20)


class Page:
    """A browser on the notebook, after its cells have run."""

    def __init__(self, address, profile, microphone=None):
        from selenium import webdriver
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "use-fake-device-for-media-stream",
                     f"user-data-dir={profile}", "window-size=1280,1500"):
            options.add_argument(f"--{flag}")
        if microphone:
            for flag in ("use-fake-ui-for-media-stream", f"use-file-for-fake-audio-capture={microphone}"):
                options.add_argument(f"--{flag}")
        else:
            options.add_experimental_option("prefs", {"profile.default_content_setting_values.media_stream_mic": 2})      # the reader has said no
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.get(f"{address}/lab/tree/widgets.ipynb?reset")

    def js(self, code, *args): return self.driver.execute_script(code, *args)

    def find(self, css): return self.driver.find_elements("css selector", css)

    def wait(self, true, what, seconds=60):
        """Until something is there, told what it is."""
        end = time.time() + seconds
        while time.time() < end:
            try:
                if found := true():
                    return found
            except Exception:       # the page is being drawn
                pass
            time.sleep(0.2)
        self.shot("failed")
        raise AssertionError(f"not seen in {seconds} s: {what}\n{self.js('return document.body.innerText')[-1500:]}")

    def run_all(self):
        """As the menu's Run All Cells."""
        self.wait(lambda: self.find(".jp-Notebook .jp-CodeCell"), "the notebook")
        self.wait(lambda: self.find(".jp-Notebook .jp-CodeCell .cm-content"), "an editor")
        time.sleep(3)
        self.find(".jp-Notebook .jp-CodeCell .cm-content")[0].click()         # Lab knows its current widget by the focus
        self.wait(lambda: self.js("""
            document.querySelector('.jp-Dialog .jp-mod-accept')?.click();          // Lab may ask which kernel
            return window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status == 'idle'"""), "a kernel", 90)
        self.js("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.wait(lambda: len(self.find(".pser")) > 1 and self.find("button.pser-record"), "the widgets", 90)

    def text(self): return self.js("return [...document.querySelectorAll('.pser')].map(e => e.innerText).join('\\n')")

    def shot(self, name):
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def select(self, label, option):
        """In one of the explorer's menus."""
        from selenium.webdriver.support.ui import Select
        (menu,) = [d for d in self.find(".widget-dropdown") if d.find_element("css selector", "label").text == label]
        Select(menu.find_element("css selector", "select")).select_by_visible_text(option)

    def show(self, css, which=-1):
        element = self.find(css)[which]
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        time.sleep(0.5)
        return element


@pytest.fixture(scope="module")
def page(lab, study, corpus, tmp_path_factory):
    made = Page(lab, tmp_path_factory.mktemp("profile"), corpus / "test1.wav")
    try:
        made.run_all()
        yield made
    finally:
        made.driver.quit()


def pictures(page): return page.js("return [...document.querySelectorAll('.jp-OutputArea img')].filter(i => i.offsetParent).map(i => i.src.slice(0, 40) + i.naturalWidth)")


def test_explorer(page, study):
    """Final model first, with its test; a run of the study shows its own curves and validation."""
    page.wait(lambda: "heard as" in page.text() and "emotion UA" in page.text(), "the final model's first utterance and scores")
    assert "test, 6 utterances" in page.text()
    page.wait(lambda: len(pictures(page)) == 3, "study, curves, confusion matrix")
    page.show(".widget-dropdown", 0)
    page.shot("explorer")
    before = page.text()
    page.select("run", "α = 0.5")
    page.wait(lambda: "validation, 6 utterances" in page.text() and "alpha_0.5_seed_0" in page.text(), "the run's validation")
    assert page.text() != before
    rows = read(study / "run/ablation/alpha_0.5_seed_0/validation_predictions.jsonl")
    last = rows[-1]
    page.select("utterance", f"{last['id']}: {last['emotion']} heard as {last['predicted_emotion']}")
    page.wait(lambda: f"{last['emotion']} heard as {last['predicted_emotion']}" in page.text() and last["id"] in page.text() and last["text"] in page.text(), "the chosen utterance")
    page.wait(lambda: page.js("return [...document.querySelectorAll('.pser audio')].some(a => a.duration > 0.7)"), "a player that has decoded its sound")
    page.show(".widget-dropdown")
    page.shot("explorer_alpha")


def test_upload(page, study):
    """A WAV file is heard, a file without sound is refused in one line."""
    upload = lambda name: page.js("return [...document.querySelectorAll('input[type=file]')]")[-1].send_keys(str(study / name))
    # the widget opens a dialogue with an input of its own; hold on to it instead of opening it
    page.js("window._open = HTMLInputElement.prototype.click; HTMLInputElement.prototype.click = function () { if (this.type == 'file') { this.style.display = 'block'; document.body.append(this); } else window._open.call(this); }")
    button = page.show(".widget-upload")
    for name, seen in (("not_audio.wav", "not_audio.wav: cannot be decoded"), ("test0.wav", "1.20 s")):
        if not page.js("return document.querySelectorAll('input[type=file]').length"):
            button.click()
        page.wait(lambda: page.js("return [...document.querySelectorAll('input[type=file]')]"), "the file dialogue's input")
        upload(name)
        page.wait(lambda: seen in page.text(), f"{name}: {seen}")
        page.show(".widget-upload")
        page.shot(name.split(".")[0])
    assert "cannot be decoded" not in page.text() and page.find(".pser .timed") and len(page.find(".pser .bar")) >= 4      # two of the explorer's, two of this


def test_record(page):
    """The microphone plays a file of a pitch and length that are known; what arrives is a player with that sound, and an answer."""
    button = page.show("button.pser-record")
    assert button.text == "● Record"
    button.click()
    page.wait(lambda: "Stop (2 s)" in button.text, "the recording runs")
    page.shot("recording")
    button.click()
    page.wait(lambda: button.text == "● Record", "it has stopped")
    seconds = page.wait(lambda: page.js("const a = [...document.querySelectorAll('.pser audio')].at(-1); return a.duration > 1.5 && a.duration"), "the recording's player")
    assert seconds < 4
    loudest = page.js("""
        const a = [...document.querySelectorAll('.pser audio')].at(-1);
        return fetch(a.src).then(r => r.arrayBuffer()).then(b => new OfflineAudioContext(1, 1, 16000).decodeAudioData(b)).then(s => Math.max(...s.getChannelData(0)))""")
    assert 0.05 < loudest <= 1, loudest                                                                                     # not silence
    assert "heard as" in page.text()
    page.show("button.pser-record")
    page.shot("recorded")


def test_no_permission(lab, tmp_path):
    """A reader who refuses the microphone is told so in the widget, and the button is as before."""
    page = Page(lab, tmp_path / "profile")
    try:
        page.run_all()
        button = page.show("button.pser-record")
        button.click()
        page.wait(lambda: "does not let this page use the microphone" in page.text(), "the reason")
        assert button.text == "● Record"
        page.shot("refused")
    finally:
        page.driver.quit()
