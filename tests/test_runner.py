"""Every script runs under plain python and under the runner, and must not tell them apart."""

from __future__ import annotations

import os
import py_compile
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import IO

import pytest

from divergence_probe import runner
from divergence_probe.runner import Target, TargetError, check

from .command_line import interruptible

ROOT = str(Path(runner.__file__).parents[1])

# Stands for the probe's own command: it finds the package whatever the interpreter's flags are,
# and leaves sys.path as it was.
DRIVER = f"""
import contextlib, os, sys
path = sys.path[:]
sys.path.append({ROOT!r})
from divergence_probe.runner import Target, run
sys.path[:] = path
log = os.environ.get("AROUND_LOG")
def note(line):
    if log:
        with open(log, "a") as file:
            file.write(line + "\\n")
@contextlib.contextmanager
def around():
    note("enter")
    try:
        yield
    except BaseException as error:
        note("exit " + repr(error))
        raise
    else:
        note("exit")
arguments = sys.argv[1:]
target = Target(arguments[0], None, tuple(arguments[1:]))
if arguments[0] == "-m":
    target = Target(None, arguments[1], tuple(arguments[2:]))
outcome = run(target, around=around)
note(f"outcome {{outcome.exit_code}} {{outcome.exception!r}}")
sys.exit(outcome.exit_code)
"""


class Bench:
    """A folder with scripts, run side by side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.log = folder / "around.log"
        self.driver = folder / "own" / "driver.py"
        self.driver.parent.mkdir()
        self.driver.write_text(DRIVER)
        self.files: dict[Path, bytes] = {}

    def write(self, name: str, source: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.files[path] = source if isinstance(source, bytes) else textwrap.dedent(source).encode()
        path.write_bytes(self.files[path])
        return path

    def start(
        self,
        *arguments: str | Path,
        flags: tuple[str, ...] = (),
        probed: bool,
        output: IO[bytes] | int = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        command = [sys.executable, *flags, *([self.driver] if probed else []), *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment | ({"AROUND_LOG": str(self.log)} if probed else {}),
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            text=True,
            errors="surrogateescape",
            preexec_fn=interruptible,  # noqa: PLW1509
        )

    def same(
        self, *arguments: str | Path, flags: tuple[str, ...] = (), stdin: str = ""
    ) -> tuple[int, str, str]:
        """Run under both and compare; return exit code, stdout and stderr."""
        ended = []
        for probed in (False, True):
            for path, content in self.files.items():  # the first run may have changed its own
                path.write_bytes(content)
            process = self.start(*arguments, flags=flags, probed=probed)
            try:
                out, err = process.communicate(stdin, timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            code = 128 - process.returncode if process.returncode < 0 else process.returncode
            ended.append((code, out, err))
        assert ended[1] == ended[0]
        return ended[0]

    @property
    def around(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


SURROUNDINGS = """
    '''A docstring.'''
    from __future__ import annotations
    import os, sys, inspect, threading, warnings
    print(sys.argv, sys.path, sys.flags, os.getcwd(), input())
    print(list(globals()), vars(sys.modules["__main__"]) is globals())
    for name in ("name", "file", "package", "cached", "doc", "annotations", "builtins"):
        print(name, repr(globals()[f"__{name}__"]))
    print(type(__loader__), getattr(__loader__, "path", None), getattr(__loader__, "name", None))
    print(__spec__ and (__spec__.name, __spec__.origin, __spec__.cached))
    class Local:
        number: int
    if sys.argv[1:] != ["zip"]:
        print(inspect.getsource(Local))
    print(Local.__annotations__, sys.getrecursionlimit(), sys.gettrace(), sys.getprofile())
    print(warnings.filters, threading.current_thread() is threading.main_thread())
    print(sys.stdout.line_buffering, sys.stdout.encoding, sys.stderr.line_buffering)
"""


@pytest.mark.parametrize("flags", [(), ("-P",), ("-I",), ("-O", "-W", "error"), ("-X", "dev")])
def test_script_sees_what_python_shows(bench: Bench, flags: tuple[str, ...]) -> None:
    script = bench.write("script.py", SURROUNDINGS)
    for name in ("script.py", "./script.py", "../work//script.py", script):
        bench.same(name, "-a", "--", "b c", flags=flags, stdin="typed")


@pytest.mark.parametrize("flags", [(), ("-P",), ("-I",)])
def test_directory_and_zip(bench: Bench, flags: tuple[str, ...]) -> None:
    bench.write("app/__main__.py", SURROUNDINGS + "    import beside\n")
    bench.write("app/beside.py", "print('imported')")
    for name in ("app", "./app/", bench.folder / "app"):
        assert "imported" in bench.same(name, "x", flags=flags, stdin="typed")[1]
    with zipfile.ZipFile(bench.folder / "app.pyz", "w") as archive:
        archive.write(bench.folder / "app/__main__.py", "__main__.py")
        archive.write(bench.folder / "app/beside.py", "beside.py")
    assert "imported" in bench.same("app.pyz", "zip", flags=flags, stdin="typed")[1]


def test_working_directory_as_target(bench: Bench) -> None:
    bench.write("__main__.py", SURROUNDINGS)
    bench.same(".", stdin="typed")


def test_module_and_package(bench: Bench) -> None:
    bench.write("pack/__init__.py", "import sys; print('package', sys.argv, __name__)")
    bench.write("pack/__main__.py", SURROUNDINGS)
    bench.write("pack/other.py", "NAME = __name__")
    bench.write("pack/part.py", SURROUNDINGS + "    from .other import NAME; print(NAME)\n")
    bench.write("alone.py", SURROUNDINGS)
    for module in ("pack", "pack.part", "alone"):
        assert bench.same("-m", module, "-x", "y", stdin="typed")[0] == 0
    bench.same("-m", "json.tool", stdin="[1,  2]")
    bench.same("-m", "site", flags=("-P",))


def test_symbolic_link_is_resolved_for_the_path(bench: Bench) -> None:
    bench.write("real/script.py", "import sys, beside; print(sys.path[0], sys.argv, __file__)")
    bench.write("real/beside.py", "")
    (bench.folder / "link.py").symlink_to("real/script.py")
    assert bench.same("link.py")[0] == 0


SOURCES = {
    "cookie": b"#!/usr/bin/python\n# -*- coding: latin-1 -*-\nprint(ascii('\xe9'))\n",
    "bom": b"\xef\xbb\xbfprint(ascii('\xc3\xa9'))\n",
    "crlf": b"print('''a\r\nb''')\r\n",
    "empty": b"",
    "future": b"def f(x: undefined): ...\n",  # our own annotations import would hide this error
    "warning": b"import warnings\nwarnings.warn('old', DeprecationWarning)\nx = '\\d'\nx is 1\n",
}


@pytest.mark.parametrize("name", SOURCES)
def test_source_forms(bench: Bench, name: str) -> None:
    bench.same(bench.write("script.py", SOURCES[name]))


def test_compiled_script(bench: Bench) -> None:
    script = bench.write("script.py", "print(__file__, type(__loader__), __cached__)")
    py_compile.compile(str(script), cfile=str(bench.folder / "script.pyc"))
    assert "Sourceless" in bench.same("script.pyc")[1]


@pytest.mark.parametrize("name", ["with space.py", os.fsdecode(b"caf\xe9.py"), "ünï.py", "bare"])
def test_odd_names(bench: Bench, name: str) -> None:
    bench.write(name, "import sys; print(ascii(sys.argv), ascii(__file__)); 1/0")
    bench.same(name)


ENDINGS = {
    "none": "sys.exit()",
    "zero": "sys.exit(0)",
    "number": "sys.exit(3)",
    "negative": "sys.exit(-1)",
    "large": "sys.exit(256 + 7)",
    "true": "sys.exit(True)",
    "text": "print('out'); sys.exit('why')",
    "tuple": "sys.exit((1, 2))",
    "float": "sys.exit(0.0)",
    "raised": "raise SystemExit",
    "no stderr": "sys.stderr = None; sys.exit('lost')",
    "error": "print('out'); 1/0",
    "nested": "def f(n):\n    1/0 if n == 0 else f(n - 1)\nf(2)",
    "chained": "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise KeyError(1) from e",
    "context": "try:\n    1/0\nexcept ZeroDivisionError:\n    undefined",
    "group": "raise ExceptionGroup('g', [ValueError(1), ExceptionGroup('h', [KeyError(2)])])",
    "base": "class Odd(BaseException): pass\nraise Odd('x')",
    "notes": "e = ValueError(1); e.add_note('a note'); raise e",
    "recursion": "def f(): f()\ntry:\n    f()\nexcept RecursionError as e:\n    raise OSError from None",
    "interrupt": "raise KeyboardInterrupt",
    "interrupt subclass": "class K(KeyboardInterrupt): pass\nraise K",
    "generator": "raise GeneratorExit",
    "stop": "raise StopIteration(3)",
    "syntax": "def f(:\n    pass",
    "indent": "if 1:\n    a\n  b",
    "unclosed": "x = (1,",
    "imported syntax": "import broken",
    "hook": "sys.excepthook = lambda t, e, b: print('hook', t, e, b.tb_lineno)\n1/0",
    "hook fails": "def h(*a): raise KeyError('h')\nsys.excepthook = h\n1/0",
    "hook exits": "def h(*a): sys.exit(9)\nsys.excepthook = h\n1/0",
    "last": "import atexit; atexit.register(lambda: print(repr(sys.last_value)))\n1/0",
    "abrupt": "import os; print('x', flush=True); os._exit(4)",
    "atexit": "import atexit; atexit.register(print, 'late'); print('early'); sys.exit(2)",
    "atexit globals": "import atexit; x = 5\natexit.register(lambda: print(x, __name__))",
    "closed stdout": "print('x', flush=True); sys.stdout.close()",
    "deleted": "import os; os.remove(__file__); 1/0",
    "edited": "open(__file__, 'w').write('# other\\n' * 9); 1/0",
    "moved": "import os; os.chdir('/'); 1/0",
    "main guard": "if __name__ == '__main__': print('main')",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)",
    "dataclass": "import dataclasses as d\n@d.dataclass\nclass A:\n    x: 'd.ClassVar[int]' = 1\nprint(A())",
}


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("form", ["script", "module"])
def test_endings(bench: Bench, name: str, form: str) -> None:
    bench.write("broken.py", "x = = 1")
    bench.write("script.py", f"import sys\n{ENDINGS[name]}\n")
    bench.same(*(("script.py",) if form == "script" else ("-m", "script")))


def test_around_sees_how_it_ended(bench: Bench) -> None:
    for source, exit_line, outcome in (
        ("x = 1", "exit", "outcome 0 None"),
        ("raise SystemExit(3)", "exit SystemExit(3)", "outcome 3 None"),
        ("raise SystemExit(256 + 7)", "exit SystemExit(263)", "outcome 7 None"),
        ("raise ValueError(4)", "exit ValueError(4)", "outcome 1 ValueError(4)"),
        ("raise KeyboardInterrupt", "exit KeyboardInterrupt()", "outcome 130 KeyboardInterrupt()"),
    ):
        bench.log.unlink(missing_ok=True)
        bench.same(bench.write("script.py", source))
        assert bench.around == ["enter", exit_line, outcome]


def test_threads_end_before_around(bench: Bench) -> None:
    bench.write(
        "script.py",
        """
        import atexit, os, threading, time
        from concurrent.futures import ThreadPoolExecutor
        atexit.register(print, "exit handler")
        def watch():
            threading.main_thread().join()  # ends only if the main thread counts as ended
            time.sleep(0.2)
            if "AROUND_LOG" in os.environ:
                open(os.environ["AROUND_LOG"], "a").write("thread\\n")
            print("thread", __name__)
        threading.Thread(target=watch).start()
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        pool = ThreadPoolExecutor()  # its idle workers are not daemons
        print(pool.submit(int, "3").result())
        """,
    )
    assert bench.same("script.py")[1] == "3\nthread __main__\nexit handler\n"
    assert bench.around == ["enter", "thread", "exit", "outcome 0 None"]


def test_a_report_may_import_after_the_threads_were_awaited(bench: Bench) -> None:
    script = bench.write("script.py", "")
    late = "from concurrent.futures import ThreadPoolExecutor as pool; print(pool)\nsys.exit("
    bench.driver.write_text(DRIVER.replace("sys.exit(", late))
    assert bench.start(script, probed=True).communicate()[0].startswith("<class")


@pytest.mark.parametrize("ending", ["", "sys.exit(5)", "1/0", "os._exit(6)"])
def test_forked_child_is_not_the_probe(bench: Bench, ending: str) -> None:
    bench.write(
        "script.py",
        f"""
        import atexit, os, sys, threading
        atexit.register(lambda: print("exit handler"))
        child = os.fork()
        if child == 0:
            threading.Thread(target=print, args=("child thread",)).start()
            {ending or "pass"}
        else:
            status = os.waitpid(child, 0)[1]
            print("child", os.waitstatus_to_exitcode(status), flush=True)
        """,
    )
    bench.same("script.py")
    assert bench.around == ["enter", "exit", "outcome 0 None"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("form", ["script", "module"])
def test_worker_processes_find_the_script(bench: Bench, method: str, form: str) -> None:
    bench.write("app/__init__.py", "")
    bench.write(
        "app/job.py",
        f"""
        import multiprocessing, sys
        class Item:
            def __init__(self, value): self.value = value
        def double(item):
            return Item(item.value * 2), sys.argv, __name__.strip("_")
        if __name__ == "__main__":
            with multiprocessing.get_context("{method}").Pool(1) as pool:
                (item, argv, name), = pool.map(double, [Item(21)])
            print(type(item) is Item, item.value, argv, name)
        """,
    )
    target = ("app/job.py",) if form == "script" else ("-m", "app.job")
    assert bench.same(*target, "arg")[1].startswith("True 42")
    assert bench.around == ["enter", "exit", "outcome 0 None"]


@pytest.mark.parametrize("source", ["time.sleep(30)", "T(target=time.sleep, args=(30,)).start()"])
def test_interrupt(bench: Bench, source: str) -> None:
    bench.write(
        "script.py",
        f"""
        import atexit, os, time
        from threading import Thread as T
        atexit.register(lambda: (print("late", flush=True), os._exit(77)))
        print("up", flush=True)
        {source}
        """,
    )
    process = bench.start("script.py", probed=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == ("late\n", 77)
    assert "KeyboardInterrupt" in err and "runner.py" not in err
    assert bench.around[-1].startswith("outcome 0" if "start" in source else "outcome 130")


def test_output_comes_before_the_traceback(bench: Bench) -> None:
    """Of a script; of a module it comes after, where the output is a file."""
    bench.write("script.py", "print('output'); 1/0")
    for form in (("script.py",), ("-m", "script")):
        shown = []
        for probed in (False, True):
            merged = bench.folder / "merged"
            with merged.open("wb") as file:
                bench.start(*form, probed=probed, output=file).wait(20)
            shown.append(merged.read_text())
        assert shown[1] == shown[0]


def test_broken_pipe(bench: Bench) -> None:
    bench.write("script.py", "input(); print('x' * 10)")  # not before the reader is gone
    codes = []
    for probed in (False, True):
        process = bench.start("script.py", probed=probed)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.close()
        codes.append(process.wait(20))
    assert codes == [120, 120]


def test_check_finds_what_can_run_without_importing_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write("pack/__init__.py", "raise RuntimeError('was imported')")
    bench.write("pack/part.py", "")
    bench.write("app/__main__.py", "")
    monkeypatch.chdir(bench.folder)
    before = sys.path[:]
    for target in (
        Target(None, "pack"),
        Target(None, "pack.part"),
        Target(None, "json.tool"),
        Target("pack/part.py", None),
        Target("app", None),
    ):
        check(target)
    assert sys.path == before


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("missing.py", None), "No such script: 'missing.py'.*Check the path"),
        (Target("folder", None), "No __main__.py in 'folder'.*Name the script"),
        (Target(None, "missing_module"), "No module named 'missing_module'.*Check the name"),
        (Target(None, "script.py"), None),
        (Target(None, "absent.py"), "No module named 'absent.py'.*Leave out -m"),
        (Target(None, ".relative"), "No module named '.relative'"),
        (Target(None, ""), "No module named ''"),
        (Target(None, None), "either a script or"),
        (Target("script.py", "json"), "either a script or"),
    ],
)
def test_check_refuses(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target: Target, message: str | None
) -> None:
    bench.write("folder/other.py", "")
    bench.write("script.py", "")
    monkeypatch.chdir(bench.folder)
    if message is None:  # the first name exists: python itself finds out about the rest
        check(target)
        return
    with pytest.raises(TargetError, match=message):
        check(target)


@pytest.mark.parametrize("module", ["script.py", "pack", "pack.nothing", "sys"])
def test_python_finds_no_such_module(bench: Bench, module: str) -> None:
    bench.write("pack/__init__.py", "")
    bench.write("script.py", "")
    process = bench.start("-m", module, probed=True)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "divergence_probe.runner.TargetError: " in err.splitlines()[-1]


def test_show_exception_replaces_the_traceback(bench: Bench) -> None:
    script = bench.write("script.py", "1/0")
    shown = "show_exception=lambda e: print('shown', repr(e), e.__traceback__.tb_lineno))"
    bench.driver.write_text(DRIVER.replace("around=around)", "around=around, " + shown))
    out, err = bench.start(script, probed=True).communicate(timeout=20)
    assert (out, err) == ("shown ZeroDivisionError('division by zero') 1\n", "")


@pytest.mark.parametrize("when", ["enter", "exit"])
def test_a_failing_probe_is_not_taken_for_the_script(bench: Bench, when: str) -> None:
    script = bench.write("script.py", "print('ran'); 1/0")
    failing = DRIVER.replace(f'note("{when}', f'raise OSError("probe"); note("{when}')
    bench.driver.write_text(failing)
    out, err = bench.start(script, probed=True).communicate(timeout=20)
    assert out == ("ran\n" if when == "exit" else "")
    assert err.splitlines()[-1] == "OSError: probe"
