"""Programs in answers: what passes, what an attack reaches, and that nothing runs unless it was asked for."""

import json
import platform
import sys
from pathlib import Path

import pytest
from conftest import lines

import evaluate
from grading import code
from infra.files import DataError
from infra.results import write_results
from tasks import builtin
from tasks.sources import read_programs

TESTS = "assert f(1) == 2\nassert f(2) == 3"
RIGHT = "def f(x): return x + 1"
HUMANEVAL = dict(
    task_id="T/0", prompt="def helper(x):\n    return x + 1\n\ndef add(x):\n    '''x plus 1'''\n", entry_point="add",
    test="def check(candidate):\n    assert candidate(1) == helper(1)\n    assert candidate(2) == 3\n",
)  # fmt: skip
MBPP = dict(text="Add 1.", test_list=["assert f(1) == 2", "assert math.isclose(f(two), 3)"], test_setup_code="two = 2")
RESPONSE = "Thus:\n```python\n{}\n```\nDone."

HERE = platform.system(), platform.machine()
pytestmark = pytest.mark.skipif(HERE != ("Linux", "x86_64"), reason="programs run on Linux on x86-64 only")


def call(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        evaluate.main()


def programs_in(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_programs(str(tmp_path / "rows.jsonl"), "--data")


def changed(tmp_path, monkeypatch, old: str, new: str):
    """Lets the grader start its processes from a copy of code.py with one change."""
    text = Path(code.__file__).read_text()
    assert text.count(old) == 1
    (tmp_path / "changed.py").write_text(text.replace(old, new))
    monkeypatch.setattr(code, "__file__", str(tmp_path / "changed.py"))


@pytest.fixture
def one_second(tmp_path, monkeypatch):
    changed(tmp_path, monkeypatch, "SECONDS, BYTES, MESSAGE = 10, 2**30,", "SECONDS, BYTES, MESSAGE = 1, 2**28,")
    monkeypatch.setattr(code, "SECONDS", 1)


# What passes


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (RIGHT, TESTS),
        (
            "from typing import List\nimport math\ndef f(x: List) -> int: return math.floor(x[0])",
            "assert f([1.5]) == 1",
        ),
        ("def f(x): return x", "assert f((1, [2], {3: {4}})) == (1, [2], {3: {4}})\nassert f(1j) == 1j"),
        (
            "def f(x): return x",
            "assert f(b'\\0') == b'\\0' and f(frozenset([1])) == frozenset([1]) and f('θ\\n') == 'θ\\n'",
        ),
        ("def f(x): return x", "assert f(10 ** 6000) == 10 ** 6000 and f(float('inf')) > 1 and f(None) is None"),
        ("def f(): yield from (1, 2)", "assert list(f()) == [1, 2]\nassert f() != [1, 2]"),
        ("import collections\ndef f(x): return collections.Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("def f(x): raise ValueError('no')", "try: f(1)\nexcept ValueError: pass\nelse: assert False"),
        ("f = len\ng = max", "assert f([1]) == 1 and g([1, x]) == 2 and [f(y) for y in ['a', 'b']] == [1, 1]"),
        ("class A:\n    def f(self, x): return x\nf = A().f", "assert f(x=3) == 3"),
    ],
)
def test_a_program_that_is_right_passes(program, tests):
    assert code.passes(program, "x = 2", tests, [])


@pytest.mark.parametrize(
    "program", ["def f(x): return x", "f = 1", "def g(x): return x + 1", "", "def f(x) return", "\0"]
)
def test_a_program_that_is_wrong_does_not_pass(program):
    assert not code.passes(program, "", TESTS, [])


def test_the_body_alone_completes_the_function_of_the_prompt_and_helpers_stay(tmp_path):
    before, tests, names = json.loads(programs_in(tmp_path, HUMANEVAL)[0].answer)
    assert code.passes("    return helper(x)", before, tests, names)
    assert code.passes("def add(x):\n    return helper(x)", before, tests, names)
    assert not code.passes("    return x", before, tests, names)
    assert not code.passes("def helper(x):\n    return x\ndef add(x):\n    return helper(x)", before, tests, names)


def test_the_last_python_block_behind_the_thought_is_the_program():
    blocks = "```python\na\n```\n```\nb\n```\n"
    assert code.program_of(blocks) == "a\n"
    assert code.program_of(blocks + "```py\nc\n```") == "c\n"
    assert code.program_of(blocks + "</think>\n```\nd\n```") == "d\n"
    assert code.program_of("```python\nnever closed") is None
    assert code.grade("no block", "[]") == dict(correct=False, extracted=None, reason="no_answer")


# Attacks


def test_this_machine_isolates_programs():
    assert code.can_isolate()


@pytest.mark.parametrize(
    "attack",
    [
        "import os; os._exit(0)",
        "import os; os._exit(77)",  # PASSED, the judge's status
        "raise SystemExit(77)",
        "import sys; sys.exit(0)",
        "import os\ndef f(x): os._exit(77)",
        "class Same:\n    def __eq__(self, other): return True\ndef f(x): return Same()",
        "class Same(int):\n    def __eq__(self, other): return True\ndef f(x): return Same(9)",
        "class Same(list):\n    def __eq__(self, other): return True\ndef f(x): return Same()",
        "import builtins\nbuiltins.AssertionError = builtins.print\ndef f(x): return 9",
        "import sys\nsys.settrace(lambda *a: None)\ndef f(x): return 9",
        "import os\nos.write(1, b'no json\\n')\ndef f(x): return x + 1",
        "import os\nos.write(1, b'[' * 10 ** 6 + b'\\n')\ndef f(x): return x + 1",
        'import os\nos.write(1, b\'["value", {"list": 1}]\\n\')\ndef f(x): return x + 1',
        'import os\nos.write(1, b\'["error", "SystemExit"]\\n\')\ndef f(x): return x + 1',
        "import os\nos.close(1)\ndef f(x): return x + 1",
        "def f(x): return f(x)",
        "def f(x):\n    y = []\n    for _ in range(10 ** 5): y = [y]\n    return y",
        "import ctypes\nctypes.string_at(0)",
    ],
)
def test_tests_that_did_not_run_to_their_end_never_pass(attack):
    assert not code.passes(attack, "", TESTS, [])


def test_no_test_hides_that_the_program_ended_or_broke_the_protocol():
    tests = "try:\n    f(1)\nexcept BaseException:\n    pass"
    assert code.passes("def f(x): raise ValueError", "", tests, [])
    for attack in ("def f(x): os._exit(77)", "def f(x): os.write(1, b'no json\\n')", "def f(x): ctypes.string_at(0)"):
        assert not code.passes(f"import ctypes, os\n{attack}", "", tests, [])
    assert not code.passes(RIGHT, "", "pass", []), "tests that call nothing grade nothing"


@pytest.mark.parametrize(
    "attack",
    [
        "while True: pass",
        "def f(x):\n    while True: pass",
        "def f(x):\n    import time\n    time.sleep(10 ** 6)",
        "x = [0]\nwhile True: x += x",
        "x = bytearray(10 ** 12)",
        "while True: print('x' * 10 ** 6)",
        "import os\nwhile True: os.write(1, b'x' * 10 ** 6)",
        "import os\nwhile True: os.write(2, b'x' * 10 ** 6)",
        "def f(x): return 'x' * 10 ** 8",
        "def f(x): return 10 ** 10 ** 10",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_time_memory_and_output_are_limited(attack, one_second):
    assert not code.passes(attack, "", TESTS, [])


REACHED = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
SYSCALLS = {calls}
def refused(number):
    return libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1  # EPERM, for any argument
def attempt(call):
    try:
        return repr(call())
    except (OSError, ImportError, RuntimeError, AttributeError) as error:
        return None
def f():
    tried = [
        lambda: open("/etc/passwd").read(), lambda: open(os.path.expanduser("~/.ssh/id_rsa")), lambda: os.listdir("/"),
        lambda: os.listdir("."), lambda: open("left", "w"), lambda: open("{folder}/left", "w"), lambda: os.stat("/tmp"),
        lambda: os.unlink("{folder}/kept"), lambda: os.rename("{folder}/kept", "{folder}/moved"), lambda: os.getcwd(),
        lambda: os.chdir("/"), lambda: os.pipe(), lambda: os.dup(0), lambda: os.fork(), lambda: os.forkpty(),
        lambda: os.posix_spawn("/bin/true", ["true"], {{}}), lambda: os.execv("/bin/true", ["true"]),
        lambda: os.kill(os.getpid(), 0), lambda: os.setuid(0), lambda: os.nice(1), lambda: os.memfd_create("x"),
        lambda: __import__("_thread").start_new_thread(print, ()), lambda: __import__("socket").socket(),
        lambda: __import__("subprocess").run(["true"]), lambda: __import__("multiprocessing").Process(target=f).start(),
        lambda: __import__("mmap"), lambda: __import__("torch"),
    ]
    done = [i for i, call in enumerate(tried) if attempt(call) is not None]
    done += [name for name, number in SYSCALLS.items() if not refused(number)]
    return done + [name for name in os.environ if name != "LC_CTYPE"]  # which the interpreter itself sets
"""
NUMBERS = dict(  # of x86-64: network, processes, memory of others, namespaces, kernel interfaces
    open=2, stat=4, poll=7, ioctl=16, pipe=22, socket=41, connect=42, sendto=44, clone=56, fork=57, vfork=58, execve=59,
    kill=62, ptrace=101, prctl=157, mount=165, tkill=200, openat=257, unshare=272, perf_event_open=298, setns=308,
    prlimit64=302, process_vm_readv=310, seccomp=317, memfd_create=319, bpf=321, userfaultfd=323, io_uring_setup=425,
    clone3=435, landlock=444, x32_read=0x40000000, x32_open=0x40000002,
)  # fmt: skip


def test_a_program_reaches_no_file_network_process_signal_module_or_environment(tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("kept")
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    program = REACHED.format(folder=tmp_path, calls=NUMBERS)
    assert code.passes(program, "", "assert f() == [], f()", [])
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_system_call_of_the_32_bit_interface_ends_the_program():
    program = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 4096, 7, 0x22, -1, 0)
ctypes.memmove(page, bytes.fromhex("{}"), 13)
def f(x): return ctypes.CFUNCTYPE(ctypes.c_int)(page)()
"""
    assert code.passes(program.format("b801000000c300000000000000"), "", "assert f(0) == 1", [])  # return 1
    assert not code.passes(program.format("b814000000cd80b801000000c3"), "", "assert f(0) == 1", [])


def test_the_tests_and_what_they_expect_are_not_in_the_memory_of_the_program():
    program = """
import gc, sys
def f(x):
    seen, frame = [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))], sys._getframe()
    while frame:
        seen.append(repr((frame.f_locals, frame.f_globals)))
        frame = frame.f_back
    return any("-".join(["EXPECTED", "7"]) in text for text in seen)
"""
    assert code.passes(program, "", "marker = 'EXPECTED-7'\nassert f('x') is False", [])
    assert code.passes(program, "", "marker = 'EXPECTED-7'\nassert f(marker) is True", [])  # an argument is


def test_no_process_outlives_the_verdict(one_second):
    def processes():
        texts = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        return [text for text in texts if code.__file__.encode() in text]

    assert not code.passes("import time\ndef f(x): time.sleep(100)", "", TESTS, [])
    assert processes() == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    lock()\n", "    pass\n"),
        ('"getpid": 39,', '"getpid": 39, "kill": 62,'),
        ('"getpid": 39,', '"getpid": 39, "newfstatat": 262,'),
        ("(22, 2, ctypes.addressof(program))", "(22, 99, ctypes.addressof(program))"),
        ('"x86_64")', '"riscv64")'),
    ],
)
def test_a_machine_that_cannot_isolate_runs_nothing(old, new, tmp_path, monkeypatch, results):
    changed(tmp_path, monkeypatch, old, new)
    assert not code.can_isolate()
    with pytest.raises(
        SystemExit, match=r"^evaluate\.py: this machine cannot isolate programs [^\n]* nothing was run$"
    ):
        call("--grade-code", results, "--run-model-code")
    assert not results.with_name("code.graded.jsonl").exists()


# Rows, result files, the command


def test_rows_of_humaneval_and_mbpp_become_problems_whose_answers_are_tests(tmp_path):
    humaneval, mbpp = programs_in(tmp_path, HUMANEVAL, MBPP)
    assert (humaneval.group, mbpp.group) == ("humaneval", "mbpp")
    assert humaneval.unit == mbpp.unit == code.TESTS
    assert HUMANEVAL["prompt"].strip() in humaneval.question
    assert "candidate" not in humaneval.question
    assert mbpp.question.startswith("Add 1.\nThe program must pass these tests.\n```python\nassert f(1) == 2\n")
    for problem, program in ((humaneval, "def add(x): return x + 1"), (mbpp, RIGHT)):
        assert code.grade(RESPONSE.format(program), problem.answer)["correct"]
    renamed = {"prompt": MBPP["text"], "test_list": MBPP["test_list"], "test_imports": ["two = 2"]}  # MBPP, sanitized
    assert code.grade(RESPONSE.format(RIGHT), programs_in(tmp_path, renamed)[0].answer)["correct"]
    assert programs_in(tmp_path, dict(question="1+1", answer="2"), HUMANEVAL) == []
    with pytest.raises(DataError, match=r"--data: .*rows\.jsonl, line 2: has no tests like the first row"):
        programs_in(tmp_path, MBPP, dict(question="1+1", answer="2"))
    with pytest.raises(DataError, match=r"line 1: test_list and test_imports must be lists"):
        programs_in(tmp_path, MBPP | dict(test_list="assert f(1)"))


def test_an_evaluation_stores_programs_with_their_tests_and_runs_none(tmp_path, monkeypatch, capsys):
    programs_in(tmp_path, MBPP | dict(test_list=["assert f(1) == 2"], test_setup_code=None))
    monkeypatch.setattr(code.subprocess, "Popen", None)
    out, model = tmp_path / "a.jsonl", str(builtin.build_base("arithmetic-smoke"))
    flags = [model, "--data", tmp_path / "rows.jsonl", "--max-new-tokens", 4, "--out", out]
    call(*flags)
    assert f"--grade-code {out} --run-model-code" in capsys.readouterr().out
    header, record = lines(out)
    assert header["header"]["grader"] == code.VERSION
    assert {name: record[name] for name in code.UNGRADED} == code.UNGRADED
    assert json.loads(record["answer"]) == ["", "assert f(1) == 2", []]
    call(*flags)  # continues
    assert len(lines(out)) == 2
    for flags in (("--regrade", out), ("--table", out)):
        with pytest.raises(SystemExit, match=r"a\.jsonl holds programs[^\n]*--grade-code"):
            call(*flags)


@pytest.fixture
def results(tmp_path):
    """A result file of two problems with two programs each, three of them right."""
    header = dict(sampling=dict(temperature=0.6, samples=dict(mbpp=2)), data=dict(mbpp=dict(problems=2, sha256="x")))
    answer = json.dumps(["", TESTS, []])
    records = [
        dict(group="mbpp", id=i, sample=j, labels=[], answer=answer, tolerance=None, unit=code.TESTS, tokens=5,
             finish_reason="stop", response=RESPONSE.format(RIGHT if i or j else "f = 1"), **code.UNGRADED)
        for i in range(2) for j in range(2)
    ]  # fmt: skip
    write_results(tmp_path / "code.jsonl", header, records)
    return tmp_path / "code.jsonl"


def test_grading_without_the_explicit_flag_warns_and_runs_nothing(results, monkeypatch, capsys):
    monkeypatch.setattr(code.subprocess, "Popen", None)
    with pytest.raises(SystemExit, match="2"):
        call("--grade-code", results)
    assert capsys.readouterr().out.startswith("Nothing was run. --grade-code runs the Python programs")
    assert [path.name for path in results.parent.iterdir()] == ["code.jsonl"]
    with pytest.raises(SystemExit):
        call("model", "--run-model-code")


def test_graded_programs_are_reported_like_other_answers(results, capsys):
    call("--grade-code", results, "--run-model-code")
    graded = results.with_name("code.graded.jsonl")
    printed = capsys.readouterr().out
    assert "| mbpp | 2 | 2 | 75.0 [" in printed
    assert "| 100.0 [34.2, 100.0] |  | 0.0 |" in printed, "pass@2, and no majority of programs"
    header, *records = lines(graded)
    assert header["header"]["grader"] == code.VERSION
    assert [r["correct"] for r in records] == [False, True, True, True]
    assert [r["reason"] for r in records] == ["tests failed", *["tests passed"] * 3]
    assert records[1]["extracted"] == RIGHT + "\n"
    call("--table", graded, graded)
    assert "75.0" in capsys.readouterr().out


def test_a_file_without_programs_or_with_damaged_tests_ends_in_one_line(results):
    text = results.read_text()
    results.write_text(text.replace(f'"{code.TESTS}"', "null").replace('"correct": null', '"correct": true'))
    with pytest.raises(SystemExit, match=r"^evaluate\.py: \S*code\.jsonl holds no programs: use --regrade$"):
        call("--grade-code", results, "--run-model-code")
    results.write_text(text.replace(f'"{code.TESTS}"', "null"))
    with pytest.raises(
        SystemExit, match=r"line 2: no answer to a problem of the header; wrong or missing: \['correct'\]"
    ):
        call("--grade-code", results, "--run-model-code")
    results.write_text(text.replace(json.dumps(json.dumps(["", TESTS, []])), '"[1]"'))
    with pytest.raises(SystemExit, match=r"^evaluate\.py: an answer holds no tests \([^\n]*$"):
        call("--grade-code", results, "--run-model-code")
