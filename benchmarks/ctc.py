"""Dense against lean CTC (peak memory and time of one training step) and the speed of the decoders.

    python benchmarks/ctc.py                  # the full table on the CPU
    python benchmarks/ctc.py --device cuda    # the same on a GPU
    python benchmarks/ctc.py --quick          # a small shape, for a first look

Each step runs in its own child process, so that its peak memory is its own. On the CPU that is the growth of
the resident set over what it was with the inputs in place; on CUDA `torch.cuda.max_memory_allocated` over the
same baseline. Both include the gradients of the inputs.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time

SHAPES = {'long': (8, 1500, 16000, 120), 'short': (16, 250, 16000, 30), 'quick': (4, 150, 8000, 20)}  # B, T, V, L
REGULARISERS = dict(entropy_weight=0.01, blank_penalty=50.0, label_smoothing=0.1, confidence_penalty=0.1)


def inputs(shape: str, H: int, device: str):
    "Hidden states, head and ragged transcripts of one batch"
    import torch
    g, (B, T, V, L) = torch.Generator().manual_seed(0), SHAPES[shape]
    hidden = torch.randn(B, T, H, generator=g)                              # (B, T, H)
    weight = torch.randn(V, H, generator=g) / H**0.5                        # (V, H)
    targets = torch.randint(5, V, (B, L), generator=g)                      # (B, L)
    lengths = torch.linspace(T, 0.6 * T, B).long()                          # (B,) 20 % padding
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight, torch.zeros(V))]
    return leaves, [x.to(device) for x in (lengths, targets, torch.full((B,), L))]


def clock(step, device: str, repeats: int):
    "Best wall time and best CPU time of `repeats` calls, in seconds; a busy machine spoils the first, less the second"
    import torch
    wall, cpu = [], []
    for _ in range(repeats):
        start, busy = time.perf_counter(), time.process_time()
        step()
        if device == 'cuda': torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    return min(wall), min(cpu)


def peak_bytes(device: str):
    "Highest memory this process has used"
    import torch
    if device == 'cuda': return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def measure_step(form: str, shape: str, H: int, device: str, repeats: int):
    "One training step of one form: seconds, bytes over the baseline, loss"
    import torch
    from dense import dense_ctc
    from prosody_ser.ctc import regularised_ctc
    f = {'dense': dense_ctc, 'lean': regularised_ctc}[form]
    small, labels = inputs('quick', 32, device)
    f(small[0][:, :40], small[1][:64], small[2][:64], labels[0].clamp(max=40), labels[1] % 59 + 5, labels[2],
      **REGULARISERS)['loss'].backward()                                    # loads the kernels before the baseline
    leaves, labels = inputs(shape, H, device)
    losses = []

    def step():
        for x in leaves: x.grad = None
        loss = f(*leaves, *labels, **REGULARISERS)['loss']
        loss.backward()
        losses.append(loss.item())

    before = peak_bytes(device)
    step()
    peak = peak_bytes(device) - before
    wall, cpu = clock(step, device, repeats)
    return {'bytes': peak, 'seconds': wall, 'cpu': cpu, 'loss': losses[-1]}


def measure_decode(V: int, T: int, device: str, repeats: int):
    "Milliseconds an utterance on one core (or the GPU) for logits like a trained head's, and for noise"
    import torch
    from prosody_ser.alignment import align_logits
    from prosody_ser.decoding import beam_decode, greedy_decode
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1, T, V, generator=g)                               # (1, T, V)
    spoken = torch.rand(1, T, generator=g) < 0.25
    clear = noise.scatter_add(2, torch.randint(5, V, (1, T, 1), generator=g), 16.0 * spoken[..., None])
    clear[..., 4] += 16 * ~spoken
    lengths, targets, n = torch.tensor([T]), torch.randint(5, V, (1, T // 5), generator=g), torch.tensor([T // 5])
    noise, clear, lengths, targets, n = [x.to(device) for x in (noise, clear, lengths, targets, n)]
    runs = {'greedy': lambda: greedy_decode(clear, lengths),
            'beam 10': lambda: beam_decode(clear, lengths),
            'beam 10, noise': lambda: beam_decode(noise, lengths),
            'beam 10, blank_skip .99': lambda: beam_decode(clear, lengths, blank_skip=0.99),
            'forced alignment': lambda: align_logits(clear, lengths, targets, n)}
    for run in runs.values(): run()
    return {name: 1e3 * clock(run, device, repeats)[0] for name, run in runs.items()}


def child(*args):
    "Run one measurement in a fresh process"
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = os.pathsep.join([here, os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)
    env = {'GOMP_SPINCOUNT': '0', **os.environ, 'PYTHONPATH': paths}
    done = subprocess.run([sys.executable, os.path.abspath(__file__), '--child', *map(str, args)],
                          env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(shape: str, args):
    "Rows of one shape, and lean over dense"
    B, T, V, L = SHAPES[shape]
    rows = {form: child('step', form, shape, args.hidden, args.device, args.repeats) for form in ('dense', 'lean')}
    print(f'\nB={B} T={T} V={V} L={L} H={args.hidden} {args.device}, all regularisers, forward and backward')
    for form, r in rows.items(): print(f"  {form:6} {r['bytes'] / 2**20:9.0f} MiB {r['seconds']:8.3f} s {r['cpu']:8.3f} CPU-s   loss {r['loss']:.6f}")
    dense, lean = rows['dense'], rows['lean']
    ratio = {k: lean[k] / dense[k] for k in ('bytes', 'seconds', 'cpu')}
    print(f"  lean uses 1/{1 / ratio['bytes']:.1f} of the memory, {ratio['seconds']:.2f} of the time, {ratio['cpu']:.2f} of the CPU time")


def main():
    "Print the table"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--hidden', type=int, default=512, help='H of the hidden states')
    parser.add_argument('--repeats', type=int, default=3, help='timed calls; the best counts')
    parser.add_argument('--quick', action='store_true', help='only a small shape')
    parser.add_argument('--child', nargs='+', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = args.child
        if kind == 'step': print(json.dumps(measure_step(rest[0], rest[1], int(rest[2]), rest[3], int(rest[4]))))
        else: print(json.dumps(measure_decode(int(rest[0]), int(rest[1]), rest[2], int(rest[3]))))
        return
    for shape in ['quick'] if args.quick else ['short', 'long']: report(shape, args)
    V, T = (8000, 100) if args.quick else (16000, 175)
    print(f'\nDecoding, V={V} T={T}, ms an utterance ({"one core" if args.device == "cpu" else args.device})')
    for name, ms in child('decode', V, T, args.device, args.repeats).items(): print(f'  {name:24} {ms:8.1f}')


if __name__ == '__main__':
    main()
