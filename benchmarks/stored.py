"""Stored features of a frozen backbone are normalised once, when they are written: what that saves in a training step.

    python benchmarks/stored.py --backbone_path WHISPER_BASE

Steps of the emotion head on random features of the backbone's shape, in turns: as they are now, and with the layer
norm in each step that there was before. Prints milliseconds of each turn and the median of their ratios. Under a
minute of one core.
"""

import argparse
import statistics
import time

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

    def step():
        optimiser.zero_grad()
        model(states=states, frames=frames, emotion=emotion).loss.backward()
        optimiser.step()

    ratios = []
    for turn in range(args.turns + 1):
        model._mix = mix
        once = milliseconds(step, args.steps)
        model._mix = lambda layers: mix(normalise_layers(layers))
        twice = milliseconds(step, args.steps)
        if turn:  # the first one warms up
            ratios.append(twice / once)
            print(f"{twice:6.1f} ms with the layer norm, {once:6.1f} ms without", flush=True)
    print(f"median of the ratios: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
