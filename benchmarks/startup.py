"""How long one waits for `import prosody_ser`, and for `--help`: the median of five fresh processes, after one to warm the disk.

    python benchmarks/startup.py
"""
import argparse
import statistics
import subprocess
import sys
import time

WAITS = {"python": ["-c", "pass"], "import prosody_ser": ["-c", "import prosody_ser"], "import prosody_ser.data": ["-c", "import prosody_ser.data"],
         "prosody-ser --help": ["-m", "prosody_ser.cli", "--help"], "prosody_ser.train --help": ["-m", "prosody_ser.train", "--help"]}

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, argv in WAITS.items():
        times = []
        for _ in range(6):
            start = time.perf_counter()
            subprocess.run([sys.executable, *argv], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        print(f"{name:28}{statistics.median(times[1:]):6.2f} s")
