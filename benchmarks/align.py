"""Time and memory of the forced alignment of a long recording.

    python benchmarks/align.py                 # 10 and 30 minutes
    python benchmarks/align.py --minutes 60

Random frames, 50 a second, and random targets, 3 tokens a second, on the CPU with one thread. `in segments` is what the
package does; `in one piece` keeps the steps of all frames and states. Each runs in a process of its own; its memory is the
growth of the resident set while it aligns.
"""
import argparse
import resource
import subprocess
import sys
import time


def align(minutes, cells):
    """Seconds and GB of one alignment."""
    import torch

    from prosody_ser.decoding import HeadLogits, align_logits
    torch.set_num_threads(1)
    torch.manual_seed(0)
    frames, tokens = int(minutes * 60 * 50), int(minutes * 60 * 3)
    head = HeadLogits(torch.randn(1, frames, 64), torch.randn(4000, 64), torch.randn(4000))
    labels = torch.tensor([frames]), torch.randint(5, 4000, (1, tokens)), torch.tensor([tokens])
    align_logits(HeadLogits(head.hidden[:, :500], head.weight, head.bias), torch.tensor([500]), labels[1][:, :30],
                 torch.tensor([30]))                                               # what is loaded at the first call
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    align_logits(head, *labels, cells=cells)
    return time.time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def main():
    """Prints a line a length and a way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 30], help="lengths of the recording")
    parser.add_argument("--cells", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cells:
        print(*align(args.minutes[0], args.cells))
        return
    for minutes in args.minutes:
        for name, cells in {"in segments": 2**22, "in one piece": 2**62}.items():
            command = [sys.executable, __file__, "--minutes", str(minutes), "--cells", str(cells)]
            seconds, gb = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
            print(f"{minutes:g} min {name:12} {seconds:6.1f} s {gb:6.2f} GB")


if __name__ == "__main__":
    main()
