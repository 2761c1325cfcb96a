"""Programs in answers, run with their tests: `python evaluate.py --grade-code FILE --run-model-code`, never otherwise.

Two fresh interpreters grade one answer. The worker runs the answer's program. The judge runs the tests, and calls the
program's functions through two pipes, with plain data as JSON. So the program shares no process with the tests, their
expected values and the verdict: no exit, patch or overloaded == of its own reaches them. Before either runs any text
it locks itself (`lock`): the Linux kernel then refuses every system call but those of ALLOWED. There is no file, no
network, no process, no signal and no new module after that, for root as for others.
"""

import ast
import builtins
import ctypes
import importlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from itertools import islice

TESTS = "python tests"  # the "unit" of a problem whose answer is JSON of [code before, tests, names to call]
UNGRADED = dict(correct=None, extracted=None, reason="not graded")  # the verdict before `grade`
VERSION = "python tests 1"  # changes with any verdict
SECONDS, BYTES, MESSAGE = 10, 2**30, 2**24  # CPU time and memory of a process; characters of a call or a result
PASSED = 77  # the judge's exit status after the last test
MODULES = (  # no answer can import another
    "abc array bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime decimal enum "
    "fractions functools hashlib heapq io itertools json keyword math numbers operator os pprint queue random re "
    "statistics string struct sys textwrap time types typing unicodedata _strptime"
)
ALLOWED = {  # of x86-64: what an interpreter does with memory, its open pipes, its clock and itself
    "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "getpid": 39, "exit": 60, "gettimeofday": 96, "sigaltstack": 131, "futex": 202, "restart_syscall": 219,
    "clock_gettime": 228, "clock_nanosleep": 230, "exit_group": 231, "getrandom": 318,
}  # fmt: skip
PROBE = """import ctypes, os
def probe():
    libc, done = ctypes.CDLL(None), []
    for call in (lambda: open("/proc/self/status"), lambda: open("file", "w"), lambda: os.stat("/"), os.pipe,
                 os.fork, lambda: os.kill(os.getpid(), 0), lambda: libc.socket(1, 1, 0) + 1 or os.stat("/")):
        try:
            done.append(repr(call()))
        except OSError:
            pass
    return done
"""


def lock() -> None:
    """Limits this process for good. Raises OSError where the kernel cannot."""
    import resource  # no module of Windows

    if (os.uname().sysname, os.uname().machine) != ("Linux", "x86_64"):
        raise OSError("the numbers of ALLOWED are those of Linux on x86-64")
    zero = ("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC", "RLIMIT_NOFILE")
    for name, most in (("RLIMIT_CPU", SECONDS), ("RLIMIT_AS", BYTES), *((name, 0) for name in zero)):
        resource.setrlimit(getattr(resource, name), (most, most))
    # BPF: kill at a call of another architecture, allow the numbers of ALLOWED, answer any other with EPERM
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, 0xC000003E), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    lines += [line for n in ALLOWED.values() for line in ((0x15, 0, 1, n), (0x06, 0, 0, 0x7FFF0000))]
    lines.append((0x06, 0, 0, 0x00050001))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("H6xP", len(lines), ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    # SIGKILL when the parent dies; no new privileges, which the filter needs; the filter
    for option, *values in ((1, 9), (38, 1), (22, 2, ctypes.addressof(program))):
        if libc.prctl(option, *(ctypes.c_ulong(value) for value in [*values, 0, 0, 0][:4])):
            raise OSError(f"prctl {option}: {os.strerror(ctypes.get_errno())}")


KINDS = {  # plain data beside None, numbers and text: name -> (type, constructor from a list)
    "list": (list, list), "tuple": (tuple, tuple), "set": (set, set), "frozenset": (frozenset, frozenset),
    "dict": (dict, dict), "bytes": (bytes, bytes), "complex": (complex, lambda parts: complex(*parts)),
    "range": (range, lambda parts: range(*parts)), "iterator": (Iterator, iter),
}  # fmt: skip


def encode(x: object) -> object:
    """Plain data as what JSON can hold. Raises TypeError for any other object."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    kind = next((name for name, (of, _) in KINDS.items() if isinstance(x, of)), None)
    if kind is None:
        raise TypeError(f"{type(x).__name__} is no plain data")
    parts = {"dict": lambda: x.items(), "complex": lambda: (x.real, x.imag), "iterator": lambda: islice(x, 10**5),
             "range": lambda: (x.start, x.stop, x.step)}.get(kind, lambda: x)()  # fmt: skip
    return {kind: [encode(part) for part in parts]}


def decode(x: object) -> object:
    """The inverse of `encode`, of any JSON: it makes plain data or raises."""
    if not isinstance(x, dict):
        return x
    ((kind, parts),) = x.items()
    return KINDS[kind][1]([decode(part) for part in parts])


def work(before: str, program: str, calls, results) -> None:
    """The worker: runs the program, then one call for each line of `calls`."""
    module = sys.modules["answer"] = types.ModuleType("answer")
    exec(before, module.__dict__)
    try:
        code = compile(program, "answer", "exec")
    except IndentationError:  # the body of a function that `before` begins
        code = compile(f"{before}\n{program}", "answer", "exec")
    exec(code, module.__dict__)
    for line in calls:
        name, args, kwargs = decode(json.loads(line))
        try:
            reply = ["value", encode(getattr(module, name)(*args, **kwargs))]
        except Exception as error:
            reply = ["error", type(error).__name__]
        results.write(json.dumps(reply).encode() + b"\n")
        results.flush()


def judge(before: str, tests: str, names: list[str], calls, results) -> None:
    """Runs the tests, where `names` and unknown names call the worker. Exits with PASSED after the last test."""
    made, space = 0, {"__name__": "tests"}

    def function(name: str):
        def call(*args, **kwargs):
            nonlocal made
            try:
                calls.write(json.dumps(encode([name, args, kwargs])).encode() + b"\n")
                calls.flush()
                kind, value = json.loads(results.readline(MESSAGE))
                value, made = decode(value), made + 1
            except BaseException:  # the worker ended or broke the protocol: no test may hide it
                os._exit(1)
            if kind == "value":
                return value
            error = getattr(builtins, str(value), None)
            raise (error if isinstance(error, type) and issubclass(error, Exception) else RuntimeError)(value)

        return call

    exec(before, space)
    nodes = list(ast.walk(ast.parse(tests)))
    names_of = ("id", "arg", "name", "asname")  # of variables, arguments, functions and imports
    bound = {getattr(n, field, None) for n in nodes if not isinstance(getattr(n, "ctx", None), ast.Load)
             for field in names_of}  # fmt: skip
    used = {n.id for n in nodes if isinstance(n, ast.Name)} - bound - set(space) - set(dir(builtins))
    space |= {name: sys.modules[name] if name in MODULES.split() else function(name) for name in used}
    space |= {name: function(name) for name in names}
    exec(tests, space)
    os._exit(PASSED if made else 1)


def main(role: str, *pipes: str) -> None:
    """A worker or a judge: reads its job, then locks itself, then runs it."""
    for name in MODULES.split():
        importlib.import_module(name)
    sys.set_int_max_str_digits(0)
    if role == "work":
        calls, results, job = sys.stdin.buffer, sys.stdout.buffer, json.loads(sys.stdin.buffer.readline())
    else:
        calls, results, job = os.fdopen(int(pipes[0]), "wb"), os.fdopen(int(pipes[1]), "rb"), json.load(sys.stdin)
    sys.stdin, sys.stdout = None, open(os.devnull, "w")  # noqa: SIM115
    lock()
    (work if role == "work" else judge)(*job, calls, results)


def passes(program: str, before: str, tests: str, names: list[str]) -> bool:
    """Whether all tests ran to their end without an error, within the limits of time and memory."""
    command = [sys.executable, "-I", "-S", "-B", __file__]
    with tempfile.TemporaryDirectory() as folder:
        options, started = dict(env={}, cwd=folder, stderr=subprocess.DEVNULL, stdin=subprocess.PIPE), []
        try:
            worker = subprocess.Popen([*command, "work"], stdout=subprocess.PIPE, **options)
            started.append(worker)
            worker.stdin.write(json.dumps([before, program]).encode() + b"\n")
            worker.stdin.flush()
            pipes = worker.stdin.fileno(), worker.stdout.fileno()
            judging = [*command, "judge", *map(str, pipes)]
            started.append(subprocess.Popen(judging, stdout=subprocess.DEVNULL, pass_fds=pipes, **options))
            worker.stdin.close()
            worker.stdout.close()
            started[-1].communicate(json.dumps([before, tests, names]).encode(), timeout=2 * SECONDS)
            return started[-1].returncode == PASSED
        except (subprocess.TimeoutExpired, BrokenPipeError):
            return False
        finally:
            for process in started:
                process.kill()
                process.wait()


def can_isolate() -> bool:
    """Whether a program runs here and may open no file, pipe, process, signal or socket."""
    return passes(PROBE, "", "assert probe() == []", [])


def program_of(response: str) -> str | None:
    """The last code block in Python of a response after its thought, else its last block; None without any."""
    blocks = re.findall(r"```[ \t]*(\w*)[^\n]*\n(.*?)```", response.rpartition("</think>")[2], re.DOTALL)
    texts = [text for name, text in blocks if name.lower() in ("python", "python3", "py")] or [b for _, b in blocks]
    return texts[-1] if texts else None


def grade(response: str, answer: str) -> dict:
    """correct, extracted and reason of a response, by running its program; `answer` as in TESTS."""
    program = program_of(response)
    if program is None:
        return dict(correct=False, extracted=None, reason="no_answer")  # as without a box
    before, tests, names = json.loads(answer)
    correct = passes(program, before, tests, names)
    return dict(correct=correct, extracted=program, reason="tests passed" if correct else "tests failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
