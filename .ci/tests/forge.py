"""Python processes that start at once: they are forked from one that has the libraries loaded already.

A start with its imports takes five seconds otherwise, and the tests start hundreds. `python(...)` is `subprocess.run` of Python with these
arguments. A test that looks at what a process imports, or at its first moments, starts a process of the usual kind."""
import atexit
import functools
import gc
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------- the process that others are forked from

def serve():
    """Read jobs, a JSON line each: start one and answer with its number, or wait for one and answer with its exit code."""
    import nbdev.test  # noqa: F401
    import torch

    import prosody_ser.ablation
    import prosody_ser.cli
    import prosody_ser.predict
    import prosody_ser.train  # noqa: F401
    torch.set_num_threads(1)
    gc.freeze()                               # what is loaded by now is not looked through, and so not copied, by each process
    print("> ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(">", os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        elif pid := os.fork():
            print(">", pid, flush=True)
        else:
            leave(lambda: become(**job))


def leave(work):
    """Do the work and end this process as Python would, without taking its modules apart."""
    code = 1
    try:
        work()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def become(argv, cwd, env, out, err=None, read=os.devnull, kill_at=None, file_size=None):
    """The arguments of Python, in this process; it is killed before its kill_at-th change of a file, or cannot write more bytes than file_size to one."""
    import numpy
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    tempfile.tempdir = None
    numpy.random.seed()
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name, how in ((0, read, os.O_RDONLY), (1, out, write), (2, err, write)):
        os.dup2(os.open(name, how, 0o644) if name else 1, number)
    if kill_at is not None:
        count_changes(f"{out}.changes", kill_at)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.stdin = open(0)
    what, *rest = argv
    sys.path[0] = cwd
    if what == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = argv, str(Path(what).parent)
        runpy.run_path(what, run_name="__main__")


def count_changes(counter, kill_at):
    """Count what Python changes in the file system, and kill this process at one of the changes, if any."""
    seen, owner = [0], os.getpid()

    def look(event, args):
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
        if event == "open" and isinstance(args[1], str):
            changes = set(args[1]) & set("wax+")
        if changes and os.getpid() == owner:
            seen[0] += 1
            if seen[0] == kill_at:
                os.kill(owner, signal.SIGKILL)
    sys.addaudithook(look)
    atexit.register(lambda: os.getpid() == owner and Path(counter).write_text(str(seen[0])))


# ------------------------------------------------------------------------------- the tests' side

class Forge:
    """Starts Python by a fork."""
    def __init__(self):
        env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", GOMP_SPINCOUNT="0", HF_HUB_OFFLINE="1", WANDB_MODE="offline", MPLBACKEND="Agg",
                                PYTORCH_NVML_BASED_CUDA_CHECK="1")            # a question for a GPU opens none: a fork could not use it then
        self.server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self.ask(None) == "ready"

    def ask(self, job):
        if job:
            self.server.stdin.write(json.dumps(job) + "\n")
            self.server.stdin.flush()
        return next(line for line in self.server.stdout if line.startswith("> "))[2:].strip()       # libraries print, too

    def start(self, cwd, argv, env=None, **more):
        """A running command of the package, which writes what it says to a file there."""
        Path(cwd).mkdir(exist_ok=True, parents=True)
        out = Path(cwd) / f"log{len(list(Path(cwd).glob('log*.txt')))}.txt"
        return self.begin(["-m", "prosody_ser.cli", *argv], cwd, os.environ | (env or {}), out, **dict(kill_at=0) | more)

    def begin(self, argv, cwd, env, out, **more):
        job = dict(argv=[str(a) for a in argv], cwd=str(cwd), env={k: str(v) for k, v in env.items()}, out=str(out), **more)
        return Running(self, int(self.ask(job)), out)

    def run(self, *args, **kwargs):
        return self.start(*args, **kwargs).end()

    def close(self):
        self.server.stdin.close()
        self.server.wait()


class Running:
    def __init__(self, forge, pid, out):
        self.forge, self.pid, self.out, self.code = forge, pid, out, None

    def until(self, path, seconds=60):
        """Wait for a file of it."""
        end = time.monotonic() + seconds
        while not list(path.parent.glob(path.name)):
            assert time.monotonic() < end and os.path.exists(f"/proc/{self.pid}") and not self.is_zombie(), self.said
            time.sleep(0.005)
        return self

    def is_zombie(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z"

    def signal(self, number, group=False):
        (os.killpg if group else os.kill)(self.pid, number)
        return self

    def end(self):
        """Its exit code and what it said."""
        self.code = int(self.forge.ask(dict(wait=self.pid)))
        return self

    @property
    def said(self):
        return self.out.read_text(errors="replace")

    @property
    def changes(self):
        return int(Path(f"{self.out}.changes").read_text())


@functools.cache
def forge():
    """This test process's own."""
    made = Forge()
    atexit.register(made.close)
    return made


def python(*argv, cwd=ROOT, env=None, data=b""):
    """As subprocess.run([sys.executable, *argv], capture_output=True, text=True)."""
    with tempfile.TemporaryDirectory() as folder:
        out, err, given = (Path(folder) / n for n in ("out", "err", "in"))
        given.write_bytes(data)
        code = forge().begin(argv, cwd, os.environ if env is None else env, out, err=str(err), read=str(given)).end().code
        return subprocess.CompletedProcess(argv, code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


if __name__ == "__main__":
    serve()
