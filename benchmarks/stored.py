"""Stored features of a frozen backbone: what two ways to handle them save in a training step.

    python benchmarks/stored.py --backbone_path WHISPER_BASE

Steps of the emotion head on random features of the backbone's shape, in turns: as they are now; with layers that
stay interleaved in memory, as they are stored; and with a layer norm in each step, not only when they are written.
Prints milliseconds of each turn and the medians of their ratios. Under a minute of one core.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from prosody_ser.heads import normalise_layers
from prosody_ser.model import create_model

def milliseconds(step, steps):
    """Of a step, over so many of them."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return 1000 * (time.perf_counter() - began) / steps


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone_path", required=True, help="folder of a Whisper encoder")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help="in a turn")
    parser.add_argument("--frames", type=int, default=130, help="of an utterance; a batch has 8")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = create_model(list("abcdef"), None, "whisper", args.backbone_path, tasks=["ser"]).train()
    model.backbone.requires_grad_(False)
    optimiser = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    shape = model.backbone.n_states, 8, args.frames, model.backbone.hidden_size
    states = torch.stack(normalise_layers(list(torch.randn(shape))), 2).half()
    frames, emotion, mix = torch.full((8,), args.frames), torch.randint(6, (8,)), model._mix

    def step(interleaved=False):
        optimiser.zero_grad()
        model(
            states=states.float() if interleaved else states, frames=frames, emotion=emotion
        ).loss.backward()
        optimiser.step()

    ways = {
        "now": (mix, step),
        "interleaved": (mix, partial(step, interleaved=True)),
        "layer norm in each step": (lambda layers: mix(normalise_layers(layers)), step),
    }
    ratios = {name: [] for name in ways if name != "now"}
    for turn in range(args.turns + 1):
        took = {}
        for name, (model._mix, one) in ways.items():
            took[name] = milliseconds(one, args.steps)
        if turn:  # the first one warms up
            print(", ".join(f"{name} {ms:.1f} ms" for name, ms in took.items()), flush=True)
            for name, found in ratios.items():
                found.append(took[name] / took["now"])
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.2f} times as long as now (median)")


if __name__ == "__main__":
    main()
