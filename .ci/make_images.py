"""The pictures of the site. `make_images.py` draws the favicon and the card that chats and forums show for a link to the site.
`make_images.py runs/demo` draws the picture of the home page: what the model of `prosody-ser demo` says of its first test recording."""
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

IMAGES = Path(__file__).parent.parent / "nbs" / "images"
BLUE, ORANGE, GREY = "#1f5fa8", "#f3a64f", "#8a8f98"
WORDS = [("me", 0.45, False), ("kɔ", 0.95, True), ("fie", 0.55, False)]              # text, loudness, prominent
EMOTIONS = [("joy", 0.72), ("neutral", 0.18), ("anger", 0.10)]


def wave(loudness, n):
    """Heights of n bars of one word (n,)."""
    at = np.linspace(0, np.pi, n)
    return loudness * np.sin(at) * (0.75 + 0.25 * np.cos(np.arange(n) * 2.4))


def draw_words(ax, bars):
    """A word after the other, the prominent one in its own colour."""
    for i, (text, loudness, prominent) in enumerate(WORDS):
        at, high = i * (bars + 1) + np.arange(bars), wave(loudness, bars)
        ax.bar(at, 2 * high, bottom=-high, width=0.6, color=ORANGE if prominent else BLUE)
        ax.text(at.mean(), -1.3, text, ha="center", fontsize=24, weight="bold" if prominent else "normal")
    ax.axis("off")


def save(figure, name, colours, dpi="figure"):
    """A PNG of a few colours: small."""
    from PIL import Image
    figure.savefig(IMAGES / name, dpi=dpi)
    with Image.open(IMAGES / name) as image:
        plain = image.getextrema()[3][0] == 255                  # MAXCOVERAGE keeps white white, but knows no alpha
        flat = image.convert("RGB").quantize(colours, 1) if plain else image.convert("RGBA").quantize(colours)
    flat.save(IMAGES / name, optimize=True)


def favicon():
    """Three words of two bars, 64 pixels wide."""
    figure, ax = plt.subplots(figsize=(0.64, 0.64), dpi=100)
    figure.patch.set_alpha(0)
    figure.subplots_adjust(0, 0, 1, 1)
    for i, (_, loudness, prominent) in enumerate(WORDS):
        ax.bar(i, 2 * loudness, bottom=-loudness, width=0.62, color=ORANGE if prominent else BLUE)
    ax.axis("off")
    save(figure, "favicon.png", 16)


def card():
    """Name, what it does, waveform with words, and the emotions: 1200 by 630 pixels."""
    figure = plt.figure(figsize=(12, 6.3), dpi=100)
    figure.text(0.06, 0.83, "Prosody-SER", fontsize=48, weight="bold", color=BLUE)
    figure.text(0.06, 0.72, "Emotion, transcript and word prominence\nfrom one shared speech backbone", fontsize=25, va="top", color="#333")
    draw_words(figure.add_axes((0.05, 0.14, 0.5, 0.36)), 14)
    ax = figure.add_axes((0.72, 0.12, 0.22, 0.34))
    ax.barh([n for n, _ in EMOTIONS][::-1], [p for _, p in EMOTIONS][::-1], color=[GREY, GREY, ORANGE], height=0.55)
    ax.tick_params(length=0, labelsize=20)
    ax.set_xticks([])
    ax.spines[:].set_visible(False)
    save(figure, "card.png", 32)


def prediction(run):
    """`Prediction.plot` of a run's model and the first row of its test set."""
    from prosody_ser.data import read_manifest
    from prosody_ser.inference import Predictor
    first = read_manifest(run / "corpus/test.jsonl", run / "corpus")[0]
    figure = Predictor(run / "best_model")(first).plot()
    save(figure, "prediction.png", 256, dpi=150)


if __name__ == "__main__":
    if runs := sys.argv[1:]:
        prediction(Path(runs[0]))
    else:
        favicon()
        card()
