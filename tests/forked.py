"""`run(code)` for `python -c code` where the start would cost more than the code: a process forked from one that has imported torch.

Not for what is tested about imports, threads of OpenMP at the start, or options of Python.
"""

import atexit
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, *arguments: str, cwd: Path = ROOT, modules: tuple[str, ...] = ("torch",), timeout: float = 120, **environment: str):
    """What subprocess.run gives; the environment is added to this process's, and no test's module is imported there."""
    server = _server(modules)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        asked = {"code": code, "arguments": arguments, "cwd": str(cwd), "environment": os.environ | environment}
        asked |= {"out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        late, start = threading.Timer(timeout, os.kill, (child, signal.SIGKILL)), time.monotonic()
        late.start()
        status = int(server.stdout.readline())
        late.cancel()
        if status == -signal.SIGKILL and time.monotonic() - start >= timeout:
            raise subprocess.TimeoutExpired(code, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())


@functools.cache
def _server(modules: tuple[str, ...]) -> subprocess.Popen[str]:
    """It ends with its standard input, and so with this process."""
    command = [sys.executable, str(Path(__file__)), *modules]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _serve() -> dict[str, Any]:
    """Forks for each line and says the child's number and its exit status; returns only in a child, with what it is to be."""
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            return json.loads(line)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    raise SystemExit


def _become(asked: dict[str, Any]) -> dict[str, Any]:
    """Streams, folder, environment and __main__ of a new process; returns the names of that module."""
    for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[0], sys.argv = asked["cwd"], ["-c", *asked["arguments"]]
    sys.modules["__main__"] = types.ModuleType("__main__")
    return vars(sys.modules["__main__"])


def _run(code: str, names: dict[str, Any]) -> int:
    """The exit status of Python for this code."""
    try:
        exec(compile(code, "<string>", "exec"), names)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this folder has a triton of its own
    for name in sys.argv[1:]:
        __import__(name)
    gc.freeze()  # else a collection in a child would copy every page
    asked = _serve()
    status = _run(asked["code"], _become(asked))
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # to take all modules down costs a second
