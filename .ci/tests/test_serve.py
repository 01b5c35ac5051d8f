"""The page of prosody-ser serve: in a real browser with a microphone that plays a file, by its API, by ten visitors at once, and with a password.

Needs `pip install gradio playwright` and a Chromium (Debian: apt-get install chromium); the tests that need one of them are skipped without it.
SCREENSHOTS=FOLDER keeps pictures of what was seen."""
import csv
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT

from prosody_ser.command_config import ServeConfig
from prosody_ser.config import ConfigError
from prosody_ser.formats import to_csv, to_textgrid
from prosody_ser.inference import Prediction, Predictor
from prosody_ser.model import create_model
from prosody_ser.serve import _answer_html, _credentials, _Desk, _many_html
from prosody_ser.text import ManifestError
from prosody_ser.timeline import Timeline
from prosody_ser.tokenizer import SentencePieceTokenizer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
NO_GRADIO = [] if importlib.util.find_spec("gradio") else ["gradio"]
MISSING = NO_GRADIO + [m for m in ["playwright"] if not importlib.util.find_spec(m)] + ["chromium"] * (BROWSER is None)
in_browser = pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {', '.join(MISSING)}")
by_api = pytest.mark.skipif(bool(NO_GRADIO), reason="not on this machine: gradio")
SENTINEL = """import os, socket
def only_here(function):
    def call(self, address, *more):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            open(os.environ["CALLS"], "a").write(f"{address}\\n")
        return function(self, address, *more)
    return call
socket.socket.connect = only_here(socket.socket.connect)
socket.socket.connect_ex = only_here(socket.socket.connect_ex)
"""


def speech(path, seconds=1.0, pitch=200, rate=16000):
    """Bursts of a tone: what a model that has learned nothing still tells apart."""
    t = np.arange(round(rate * seconds)) / rate
    noise = np.random.default_rng(pitch).normal(size=len(t)) * 0.02
    sf.write(path, 0.4 * np.sin(2 * np.pi * pitch * t) * np.abs(np.sin(2 * np.pi * t)) + noise, rate)
    return path


def talk(path, folder, seconds=40):
    """The recordings of a folder one after the other, a second apart, in a hissing room."""
    joined = np.random.default_rng(0).normal(size=16000 * seconds) * 0.0005
    at = 8000
    for x in (sf.read(p)[0] for p in sorted(folder.glob("*.wav")) * 9):
        if at + len(x) > len(joined):
            break
        joined[at:at + len(x)] += x * (1 - np.linspace(-1, 1, len(x)) ** 8)
        at += len(x) + 16000
    sf.write(path, joined, 16000)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model that places words, and recordings."""
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = SentencePieceTokenizer(40, folder / "tok", model_type="char").train_tokenizer(["me kɔ fie", "bra ha"] * 9)
    torch.manual_seed(0)
    model = create_model(["anger", "<b>joy"], tokenizer).eval()
    model.asr_nats.fill_(0.0)                                         # as if its transcript head had learned to place words
    model.save_pretrained(folder / "model")
    (folder / "examples").mkdir()
    for i in range(10):
        speech(folder / f"examples/{i}.wav", 1 + i / 10, 120 + 40 * i)
    shutil.copy(folder / "examples/3.wav", folder / "recording.wav")
    speech(folder / "<img src=x>.wav", 1.2, 300)
    sf.write(folder / "hour.flac", np.zeros(3601 * 8000), 8000)
    sf.write(folder / "silent.wav", np.zeros(16000), 16000)
    speech(folder / "large.wav", 40)
    talk(folder / "talk.flac", folder / "examples")
    (folder / "notes.wav").write_text("no sound at all")
    (folder / "sitecustomize.py").write_text(SENTINEL)
    return folder


@pytest.fixture(scope="module")
def predictor(place):
    return Predictor(place / "model", "cpu", "greedy", abstain=0.55)


@contextmanager
def serving(place, *argv, **env):
    """The command in a process of its own: its address, its folder for uploads. When it is asked to stop it ends well and leaves no folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    temporary = place / f"tmp{port}"
    temporary.mkdir()
    env = os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{place}", TMPDIR=str(temporary), CALLS=str(place / "calls"), GOMP_SPINCOUNT="0", HOME=str(place)) | env
    argv = [sys.executable, "-m", "prosody_ser.cli", "serve", place / "model", "--port", port, "--device", "cpu", "--decode_method", "greedy", *argv]
    with open(place / f"{port}.log", "w") as log:
        server = subprocess.Popen([*map(str, argv)], cwd=place, env=env, stdout=log, stderr=log)
    text = (place / f"{port}.log").read_text
    try:
        end = time.time() + 180
        while "Ctrl-C" not in text():
            assert server.poll() is None and time.time() < end, text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", next(temporary.glob("prosody-ser-*"))
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0, text()[-2000:]
        assert not list(temporary.glob("prosody-ser-*")), text()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def page_server(place):
    with serving(place, "--examples", place / "examples", "--timeline_from", 6, "--max_seconds", 45, "--max_mb", 1, "--abstain", 0.55) as found:
        yield found


@pytest.fixture(scope="module")
def locked_server(place):
    (place / "password").write_text("ama:kɔ:fie\n", encoding="utf-8")
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")                # of an institute: it does not lead here
    with serving(place, "--auth", f"@{place / 'password'}", "--queue", 1, "--timeline_from", 60, **proxy) as found:
        yield found


def kept(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


@pytest.fixture(scope="module")
def browser(place):
    """Chromium, whose microphone plays a recording."""
    from playwright.sync_api import sync_playwright
    flags = ["no-sandbox", "use-fake-device-for-media-stream", "use-fake-ui-for-media-stream", f"use-file-for-fake-audio-capture={place / 'recording.wav'}", "autoplay-policy=no-user-gesture-required"]
    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=BROWSER, args=[f"--{f}" for f in flags])
        yield found
        found.close()


@contextmanager
def opened(browser, address, width=1100, height=900, path="/"):
    """The page; everything that it asks for is at its own address."""
    page = browser.new_page(viewport=dict(width=width, height=height))
    page.set_default_timeout(20_000)
    asked = []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(address + path)
    page.wait_for_selector("h1")
    yield page
    assert not [u for u in asked if not u.startswith((address, "data:", "blob:"))]
    page.close()


def shot(page, name):
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def upload(page, *files):
    page.locator("input[type=file]:not([multiple])" if len(files) == 1 else "input[type=file][multiple]").last.set_input_files([str(f) for f in files])


def downloaded(page, name):
    with page.expect_download() as found:
        page.get_by_role("link", name=name, exact=True).click()
    return found.value.suggested_filename, Path(found.value.path()).read_text(encoding="utf-8")


def as_json(answer):
    return json.loads(json.dumps(answer))


# ------------------------------------------------------------------------------------------------------- without a server

ANSWER = Prediction(dict(seconds=2.0, emotion="<i>joy", probabilities={"<i>joy": 0.7, "anger": 0.3}, transcript="<u>me fie", aligned=True, alignment_score=-0.1, words=[
    dict(word="<u>me", start=0.2, end=0.8, prominence=0.91, prominent=True), dict(word="fie", start=0.8, end=1.5, prominence=0.2, prominent=False)]), np.sin(np.arange(32000) / 9).astype("float32"))


def test_html_of_an_answer():
    """Every text is escaped; a word has its place twice, in the waveform and below; without a place it cannot be played."""
    page = _answer_html(ANSWER, ["<s>silent"], "<b>a.wav", 0.5)
    assert not [tag for tag in ("<i>joy", "<u>me", "<s>silent", "<b>a") if tag in page] and "&lt;i&gt;joy" in page
    assert page.count('data-from="0.2" data-to="0.8" style="--p:91%"') == 2 and page.count("<rect ") == 2 and page.count("<button ") == 2
    assert "--line-at:50%" in page and page.index("70 %") < page.index("30 %")
    unplaced = _answer_html(Prediction(ANSWER | dict(aligned=False), ANSWER.samples), [], "a.wav", 0)
    assert "<rect " not in unplaced and "<button " not in unplaced and "could not be placed in time" in unplaced and "--line-at" not in unplaced
    only = _answer_html(Prediction(dict(seconds=2.0, emotion="joy", probabilities=dict(joy=1.0)), ANSWER.samples), [], "a.wav", 0)
    assert "<audio" in only and 'class="spoken"' not in only
    table = _many_html([dict(audio_filepath="<b>", error="<b>: is <i> no sound")], 1)
    assert "<b>" not in table and "<i>" not in table and "answers.csv" in table
    some = [dict(audio_filepath=f"{i}.wav", seconds=1.0, notes="<i>silent") for i in range(20)]
    assert "&lt;i&gt;silent" in _many_html(some, 21) and ">11.wav<" not in _many_html(some, 21) and "answers.csv" not in _many_html(some, 21) and ">0.wav<" in _many_html(some, 20)


def test_unsure_and_unusual():
    """An answer that is unsure names the likeliest; what is unusual is a warning on the page, and a note in the table."""
    odd = ANSWER | dict(emotion="unsure", likeliest="<i>joy", unusual="clipped, <u>")
    page = _answer_html(Prediction(odd, ANSWER.samples), [], "a.wav", 0.8)
    assert "<b>unsure</b>" in page and "most likely &lt;i&gt;joy, with 70 %" in page and '<p class="warn">This recording is unusual: clipped, &lt;u&gt;.' in page
    table = _many_html([dict(audio_filepath="a.wav") | odd], 1)
    assert "unsure: &lt;i&gt;joy, 70 %" in table and "unusual: clipped, &lt;u&gt;" in table and "<u>" not in table
    usual = ANSWER | dict(unusual=None)
    assert "most likely" not in (page := _answer_html(Prediction(usual, ANSWER.samples), [], "a.wav", 0.5)) and "unusual" not in page


def test_desk(place, tmp_path):
    """Short, long, too long: by the length alone, of which no more is decoded than is answered; the answers are the Predictor's."""
    def desk(**more): return _Desk(ServeConfig(checkpoint=str(place / "model"), device="cpu", decode_method="greedy", **more))
    speech(tmp_path / "20.wav", 20)
    speech(tmp_path / "21.wav", 20.01)
    short, long = (desk().hear(tmp_path / f"{n}.wav", "a.wav")[0] for n in (20, 21))
    assert type(short) is Prediction and type(long) is Timeline and "likeliest" not in short
    unsure = desk(abstain=1.0, timeline_from=19).hear(tmp_path / "20.wav", "a.wav")[0]
    assert list(unsure.summary["emotions"])[0] == "unsure" and all(u.emotion == "unsure" and u.likeliest != "unsure" for u in unsure)
    sf.write(tmp_path / "silent.wav", np.zeros(30 * 16000), 16000)
    silent, notes = desk().hear(tmp_path / "silent.wav", "a.wav")
    assert not silent and notes == ["a.wav: no speech is found in it."]
    page = _answer_html(silent, notes, "a.wav", 0)
    assert "<b>0 utterances</b>" in page and "no speech is found" in page and "<table" not in page
    tracemalloc.start()
    with pytest.raises(ManifestError, match="^a.flac: 3601.0 s, and the longest that is answered here has 3600 s"):
        desk().hear(place / "hour.flac", "a.flac")
    assert tracemalloc.get_traced_memory()[1] < 30e6                    # of the model; the samples would be 115 MB
    tracemalloc.stop()


def test_html_of_a_timeline(place):
    """Every text is escaped; a row plays itself, where there is a player; the table of many has the largest share."""
    class Odd:
        def many(self, samples, batch_size):
            yield from (Prediction(ANSWER | dict(seconds=round(len(x) / 16000, 3), unusual="<s>"), x) for x in samples)
    found = Timeline.of(Odd(), place / "talk.flac")
    page = _answer_html(found, ["<s>odd"], "<b>.flac", 0)
    assert not [tag for tag in ("<i>joy", "<u>me", "<s>", "<b>.") if tag in page] and "100 %" in page and "<b>&lt;u&gt;me</b> fie" in page
    assert page.count("<tr data-from") == page.count("<td><button>") == len(found) > 10 and f'data-from="{found[1].start}" data-to="{found[1].end}"' in page
    assert page.count("<audio") == 1 and 'alt="Waveform of 40 s, ' in page and "unusual: &lt;s&gt;" in page
    found.seconds = 601                                                 # over ten minutes
    page = _answer_html(found, [], "a.flac", 0)
    assert "<audio" not in page and "data-from" not in page and "<button" not in page and "there is no player" in page
    table = _many_html([dict(audio_filepath="a.flac", notes="<s>") | found.to_dict()], 1)
    assert f"<td>&lt;i&gt;joy, 100 % of the speech</td><td>{len(found)} utterances<br><small>&lt;s&gt;</small>" in table


def test_who_may_come(monkeypatch, tmp_path, command):
    """Others than this machine only with a password, which is never printed; it may come from a file or the environment."""
    def config(**more): return ServeConfig(checkpoint="m", **more)
    monkeypatch.delenv("PROSODY_SER_AUTH", raising=False)
    assert all(_credentials(config(host=h)) is None for h in ("127.0.0.1", "localhost", "::1", "127.8.8.8"))
    for open_to_all in (dict(host="0.0.0.0"), dict(host="::"), dict(host="192.168.1.2"), dict(host="example.org"), dict(host=""), dict(share=True)):
        with pytest.raises(ConfigError, match="others could come to the page. Name a password"):
            _credentials(config(**open_to_all))
        assert _credentials(config(auth="ama:a:b", **open_to_all)) == ("ama", "a:b")
    for wrong in ("secret", ":secret", "secret:"):
        with pytest.raises(ConfigError, match="give NAME:PASSWORD") as e:
            _credentials(config(auth=wrong))
        assert "secret" not in str(e.value)
    with pytest.raises(ConfigError, match="No such file"):
        _credentials(config(auth=f"@{tmp_path / 'none'}"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="give NAME:PASSWORD"):
        _credentials(config(auth=f"@{tmp_path / 'empty'}", host="0.0.0.0"))
    monkeypatch.setenv("PROSODY_SER_AUTH", "ama:env")
    assert _credentials(config(host="0.0.0.0")) == ("ama", "env")
    monkeypatch.delenv("PROSODY_SER_AUTH")
    code, printed = command("serve", "no_such_model", "--host", "0.0.0.0")
    assert code == 1 and printed.startswith("error: --host 0.0.0.0: others could come")
    for wrong in (["--abstain", "1.5"], ["--queue", "0"], ["--port", "70000"], ["--max_seconds", "0"]):
        assert "is out of range" in command("serve", "m", *wrong)[1]


@by_api
def test_port_is_taken(place, command, monkeypatch, tmp_path):
    """One line with the cure, and the folder for uploads is gone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "no_proxy"):
        monkeypatch.setenv(name, "")                                     # the command sets them for its process
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        code, printed = command("serve", place / "model", "--port", s.getsockname()[1], "--device", "cpu")
    assert code == 1 and "another program listens there" in printed and "Traceback" not in printed
    assert not list(tmp_path.glob("prosody-ser-*"))


def test_without_gradio(place, command, monkeypatch):
    monkeypatch.setattr("prosody_ser.serve.find_spec", lambda name: None)
    for name in ("GRADIO_TEMP_DIR", "no_proxy"):
        monkeypatch.setenv(name, "")
    assert command("serve", place / "model") == (1, "error: serve needs gradio: pip install 'prosody-ser[serve]'.\n")


# ------------------------------------------------------------------------------------------------------------ in a browser

@in_browser
def test_upload(browser, page_server, place, predictor):
    """The answer is the Predictor's; a word plays itself and no more; what is saved is the answer; nothing is kept."""
    address, folder = page_server
    wanted = predictor(place / "recording.wav")
    with opened(browser, address) as page:
        upload(page, place / "recording.wav")
        page.wait_for_selector(".answer")
        assert page.locator(".spoken .timed").all_inner_texts() == [w["word"] for w in wanted.words] and wanted.words
        likeliest, p = max(wanted.probabilities.items(), key=lambda x: x[1])
        assert wanted.emotion == ("unsure" if p < 0.55 else likeliest) == page.inner_text("h3 b") and wanted.likeliest == likeliest
        assert page.locator(".chances span").first.inner_text() == likeliest and page.locator(".chances b").first.inner_text() == f"{100 * p:.0f} %"
        assert "below the dashed line, 55 %" in page.inner_text(".answer")
        shot(page, "upload")
        name, text = downloaded(page, "json")
        record = dict(audio_filepath="recording.wav") | wanted
        assert name == "recording.json" and json.loads(text) == as_json(record)
        assert downloaded(page, "TextGrid") == ("recording.TextGrid", to_textgrid(record))
        name, text = downloaded(page, "csv")
        assert name == "recording.csv" and [r["transcript"] for r in csv.DictReader(io.StringIO(text))] == [wanted.transcript]
        assert wanted["aligned"]
        word = max(wanted.words, key=lambda w: w["end"] - w["start"])
        page.evaluate("""() => { const a = document.querySelector('audio'); window.heard = [];
            a.addEventListener('timeupdate', () => heard.push(a.currentTime)); a.addEventListener('pause', () => heard.push('pause')); }""")
        page.locator(".spoken .timed").nth(wanted.words.index(word)).click()
        page.wait_for_function("heard.includes('pause')")
        times = [t for t in page.evaluate("heard") if t != "pause"]
        assert word["start"] - 0.05 <= min(times) and word["end"] - 0.1 <= max(times) <= word["end"] + 0.25, (word, times)
        upload(page, place / "<img src=x>.wav")
        page.wait_for_selector("h3 small:has-text('<img src=x>.wav')")
        assert not page.locator(".answer img").count()
        page.get_by_label("Or pick an example").click()
        page.get_by_role("option", name="7.wav").click()
        page.wait_for_selector("h3 small:has-text('7.wav, 1.70 s')")
    assert not kept(folder)


@in_browser
def test_long(browser, page_server, place, predictor):
    """A timeline: bars, strip, rows; a row plays itself and no more; what is saved is the timeline; it fits a phone; nothing is kept."""
    address, folder = page_server
    wanted = predictor.timeline(place / "talk.flac")
    with opened(browser, address) as page:
        upload(page, place / "talk.flac")
        page.wait_for_selector(".answer")
        assert page.inner_text("h3 b") == f"{len(wanted)} utterances" and "talk.flac, 0:40.0, speech in " in page.inner_text("h3 small")
        shares = [*wanted.summary["emotions"].items()]
        assert page.locator(".chances span").all_inner_texts() == [k for k, _ in shares] and page.locator(".chances b").first.inner_text() == f"{100 * shares[0][1]:.0f} %"
        assert page.locator(".strip img").evaluate("i => i.naturalWidth") == 1080 and page.locator(".strip img").get_attribute("alt")
        for width in (390, 1100):
            page.set_viewport_size(dict(width=width, height=900))
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            shot(page, f"timeline_{width}")
        rows = page.locator("tr[data-from]")
        assert rows.count() == len(wanted) > 10 and rows.locator("button").all_inner_texts() == [f"0:{u.start:04.1f}" for u in wanted]
        assert rows.first.locator("b").all_inner_texts() == [w["word"] for w in wanted[0].words if w["prominent"]]
        page.evaluate("""() => { const a = document.querySelector('audio'); window.heard = [];
            a.addEventListener('timeupdate', () => heard.push(a.currentTime)); a.addEventListener('pause', () => heard.push('pause')); }""")
        rows.nth(1).locator("td").last.click()
        page.wait_for_selector("tr.now")
        page.wait_for_function("heard.includes('pause')")
        times = [t for t in page.evaluate("heard") if t != "pause"]
        assert wanted[1].start - 0.05 <= min(times) and wanted[1].end - 0.1 <= max(times) <= wanted[1].end + 0.25, (wanted[1], times)
        assert abs(page.evaluate("document.querySelector('audio').duration") - 40) < 0.2
        record = dict(audio_filepath="talk.flac") | wanted.to_dict()
        name, text = downloaded(page, "json")
        assert name == "talk.json" and json.loads(text) == as_json(record)
        assert downloaded(page, "TextGrid") == ("talk.TextGrid", to_textgrid(record)) and downloaded(page, "csv") == ("talk.csv", to_csv([record]))
        page.get_by_role("tab", name="Many").click()
        upload(page, place / "recording.wav", place / "talk.flac")
        page.wait_for_selector("text=2 of 2 done")
        assert page.locator(".many tr").last.locator("td").all_inner_texts() == ["talk.flac", "40.00", f"{shares[0][0]}, {100 * shares[0][1]:.0f} % of the speech", f"{len(wanted)} utterances"]
        assert len(list(csv.DictReader(io.StringIO(downloaded(page, "csv")[1])))) == 1 + len(wanted)
    assert not kept(folder)


@in_browser
def test_microphone(browser, page_server, predictor):
    """What is recorded is heard and answered."""
    address, folder = page_server
    with opened(browser, address) as page:
        page.get_by_role("button", name="Record", exact=True).click()
        page.wait_for_timeout(1500)
        page.get_by_role("button", name="Stop", exact=True).click()
        page.wait_for_selector(".answer")
        seconds = float(page.inner_text("h3 small").split("recording.wav, ")[1].split(" s")[0])
        assert 0.8 < seconds < 5
        loudest = page.evaluate("""() => fetch(document.querySelector('.answer audio').src).then(r => r.arrayBuffer()).then(b => new OfflineAudioContext(1, 1, 16000).decodeAudioData(b))
            .then(s => [Math.max(...s.getChannelData(0)), s.duration])""")
        assert loudest[0] > 0.05 and abs(loudest[1] - seconds) < 0.05                # not silence
        page.get_by_role("button", name="Record", exact=True).wait_for()          # ready for the next
    assert not kept(folder)


@in_browser
def test_odd_files(browser, page_server, place):
    """No sound, too long, too large: a sentence, and no answer of before."""
    address, folder = page_server
    with opened(browser, address) as page:
        upload(page, place / "recording.wav")
        page.wait_for_selector(".answer")
        upload(page, place / "notes.wav")
        page.wait_for_selector(".warn:has-text('notes.wav: cannot be decoded: text, not sound')")
        assert not page.locator(".answer").count()
        upload(page, place / "hour.flac")
        page.wait_for_selector(".warn:has-text('hour.flac: 3601.0 s, and the longest that is answered here has 45 s. Cut it into parts')")
        assert not page.locator(".answer").count()
        upload(page, place / "silent.wav")
        page.wait_for_selector(".answer .warn:has-text('silent; what is predicted of it says nothing')")
        assert "silent" in json.loads(downloaded(page, "json")[1])["notes"]
        upload(page, place / "large.wav")
        page.wait_for_selector("text=/exceed the maximum allowed size/")
        assert str(folder) not in page.content()
    assert not kept(folder)


@in_browser
@pytest.mark.parametrize("width", [1100, 390])
def test_many(browser, page_server, place, predictor, width):
    """A row for each file in order, a sentence for one that is no sound, a table to save; nowhere wider than a phone."""
    address, folder = page_server
    names = [f"{i}.wav" for i in range(4)]
    with opened(browser, address, width, 800) as page:
        def fits(): return page.evaluate("document.documentElement.scrollWidth") <= width
        page.wait_for_timeout(300)
        assert fits()
        shot(page, f"one_{width}")
        upload(page, place / "recording.wav")
        page.wait_for_selector(".answer")
        assert fits()
        shot(page, f"answer_{width}")
        page.get_by_role("tab", name="Many").click()
        upload(page, *[place / "examples" / n for n in names], place / "notes.wav")
        page.wait_for_selector("text=5 of 5 done, 1 could not be used")
        assert page.locator(".many td:first-child").all_inner_texts() == [*names, "notes.wav"]
        assert page.locator("progress").evaluate("p => p.value == p.max") and fits()
        shot(page, f"many_{width}")
        name, text = downloaded(page, "csv")
        table = list(csv.DictReader(io.StringIO(text)))
        wanted = [*predictor.many([place / "examples" / n for n in names])]
        assert [r["transcript"] for r in table] == [*(w.transcript for w in wanted), ""] and name == "answers.csv"
        assert "text, not sound" in table[-1]["error"] and not any(r["error"] for r in table[:-1])
        assert [float(r["p_anger"]) for r in table[:-1]] == [pytest.approx(w.probabilities["anger"], abs=1e-4) for w in wanted]
        page.get_by_role("tab", name="API").click()
        page.wait_for_selector("pre")
        assert fits()
        shot(page, f"api_{width}")
    assert not kept(folder)


@in_browser
@pytest.mark.skipif(shutil.which("curl") is None, reason="not on this machine: curl")
def test_api_as_printed(browser, page_server, place, predictor):
    """Both examples of the page, copied from it, print the answer."""
    address, folder = page_server
    with opened(browser, address) as page:
        page.get_by_role("tab", name="API").click()
        page.wait_for_selector("pre")
        python, shell = page.locator("pre").all_inner_texts()
    assert f'Client("{address}")' in python and f"URL={address}\n" in shell
    wanted = predictor(place / "recording.wav")
    done = subprocess.run([sys.executable, "-c", python], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith(str(wanted.probabilities)), done.stdout + done.stderr
    done = subprocess.run(["bash", "-c", shell], cwd=place, capture_output=True, text=True)
    found = json.loads(done.stdout)[0]
    assert found["audio_filepath"] == "recording.wav" and found["words"] == as_json(wanted.words) and found["probabilities"] == wanted.probabilities
    assert not kept(folder)


# -------------------------------------------------------------------------------------------------------------- programs

@by_api
def test_ten_clients(page_server, place, predictor):
    """Ten at once, each with a recording of its own, and two with the same one: each gets the answer to what it sent."""
    from gradio_client import Client, handle_file
    address, folder = page_server
    paths = [place / f"examples/{i}.wav" for i in range(10)] + [place / "recording.wav"] * 2          # 3.wav has the same content
    wanted = [predictor(p) for p in paths]
    assert len({tuple(w.probabilities.values()) for w in wanted}) == 10
    with ThreadPoolExecutor(len(paths)) as pool:
        def ask(path): return Client(address, verbose=False).predict(handle_file(path), api_name="/predict")
        found = [*pool.map(ask, paths)]
    for path, f, w in zip(paths, found, wanted, strict=True):
        assert f["audio_filepath"] == path.name and f["probabilities"] == w.probabilities and f["transcript"] == w.transcript, path
    assert not kept(folder)


@by_api
def test_long_by_a_program(page_server, place, predictor):
    """The record of a timeline."""
    from gradio_client import Client, handle_file
    address, folder = page_server
    client = Client(address, verbose=False)
    found = client.predict(handle_file(place / "talk.flac"), api_name="/predict")
    assert found == as_json(dict(audio_filepath="talk.flac") | predictor.timeline(place / "talk.flac").to_dict())
    with pytest.raises(Exception, match="hour.flac: 3601.0 s, and the longest that is answered here has 45 s"):
        client.predict(handle_file(place / "hour.flac"), api_name="/predict")
    assert not kept(folder)


@by_api
def test_what_a_program_may_not(page_server, place):
    """A file that was not sent, an address, an endpoint of the page alone, nothing: refused, and nothing else of the server is seen or deleted."""
    import httpx
    from gradio_client import Client, handle_file
    address, folder = page_server
    client = Client(address, verbose=False)
    (folder / "others").mkdir()
    shutil.copy(place / "recording.wav", folder / "others/mine.wav")

    def answer(data):
        begun = httpx.post(f"{address}/gradio_api/call/predict", json=dict(data=[data]))
        return httpx.get(f"{address}/gradio_api/call/predict/{begun.json()['event_id']}").text
    meta = dict(_type="gradio.FileData")
    for path in (place / "recording.wav", "/etc/hostname", folder / "../recording.wav"):
        assert "event: error" in (said := answer(dict(path=str(path), meta=meta))) and "transcript" not in said, path
    for address_of_one in ("http://127.0.0.1/x.wav", "https://example.org/x.wav"):
        assert "this page fetches nothing" in answer(dict(path=address_of_one, meta=meta))
    assert "no recording was sent" in answer(None) and "event: error" in answer("recording.wav") and "event: error" in answer(dict(path=str(folder), meta=meta))
    assert "event: error" in answer(dict(path=str(folder / "nothing.wav"), meta=meta))
    with pytest.raises(Exception, match="notes.wav: cannot be decoded"):
        client.predict(handle_file(place / "notes.wav"), api_name="/predict")
    with pytest.raises(Exception, match="(?i)size|413|too large"):
        client.predict(handle_file(place / "large.wav"), api_name="/predict")
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/predict"] and not client.view_api(return_format="dict")["unnamed_endpoints"]
    assert kept(folder) == [folder / "others/mine.wav"] and (place / "recording.wav").exists()
    shutil.rmtree(folder / "others")


@by_api
def test_password(locked_server, place, predictor):
    """Without it nothing but the question for it; with it the answer, by both ways; the curl lines log in."""
    import httpx
    from gradio_client import Client, handle_file
    address, folder = locked_server
    data = dict(files=("a.wav", (place / "recording.wav").read_bytes()))
    for method, path in (("get", "config"), ("get", "gradio_api/info"), ("post", "gradio_api/upload"), ("post", "gradio_api/call/predict"), ("post", "gradio_api/queue/join")):
        more = dict(files=data) if path.endswith("upload") else dict(json=dict(data=[None])) if method == "post" else {}
        assert getattr(httpx, method)(f"{address}/{path}", **more).status_code == 401, path
    assert httpx.post(f"{address}/login", data=dict(username="ama", password="kɔ")).status_code == 400
    assert "What is said" not in (front := httpx.get(address).text) and '"dependencies":[]' in front
    with pytest.raises(Exception, match="(?i)credentials|auth|401|login"):
        Client(address, auth=("ama", "no"), verbose=False)
    client, wanted = Client(address, auth=("ama", "kɔ:fie"), verbose=False), predictor(place / "recording.wav")
    assert client.predict(handle_file(place / "recording.wav"), api_name="/predict")["words"] == as_json(wanted.words)
    assert not kept(folder)


@by_api
def test_queue_is_full(locked_server, place, predictor):
    """One may wait: of eight that come at once some are answered, rightly, and the others are told."""
    from gradio_client import Client, handle_file
    address, folder = locked_server
    client, wanted = Client(address, auth=("ama", "kɔ:fie"), verbose=False), predictor(place / "large.wav")
    jobs = [client.submit(handle_file(place / "large.wav"), api_name="/predict") for _ in range(8)]
    said = [str(job.exception(timeout=60) or job.result()["probabilities"]) for job in jobs]
    full = [x for x in said if "queue is full" in x.lower()]
    assert 0 < len(full) < 8 and said.count(str(wanted.probabilities)) == 8 - len(full), said
    shutil.rmtree(folder)                  # what was sent in vain goes after an hour, or now
    folder.mkdir()


@in_browser
def test_password_in_a_browser(browser, locked_server, place, predictor):
    """The page asks, refuses, lets in; its examples for programs log in."""
    address, folder = locked_server
    page = browser.new_page()
    page.set_default_timeout(20_000)
    page.goto(address)
    for password in ("wrong", "kɔ:fie"):
        page.locator("input").nth(0).fill("ama")
        page.locator("input[type=password]").fill(password)
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("text=Incorrect" if password == "wrong" else "h1:has-text('What is said')")
    page.get_by_role("tab", name="API").click()
    page.wait_for_selector("pre")
    for run, text in zip(([sys.executable, "-c"], ["bash", "-c"]), page.locator("pre").all_inner_texts(), strict=True):
        text = text.replace("NAME", "ama").replace("PASSWORD", "kɔ:fie")
        done = subprocess.run([*run, text], cwd=place, capture_output=True, text=True)
        assert str(predictor(place / "recording.wav").probabilities["anger"]) in done.stdout, done.stdout + done.stderr
    page.close()
    assert not kept(folder)


@by_api
def test_nobody_else_was_called(page_server, locked_server, place):
    """All that the servers of these tests did, they did on this machine."""
    assert not (place / "calls").exists(), (place / "calls").read_text()
