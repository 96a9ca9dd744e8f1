"""Scripts that start worker processes: which of them need a guard, and what those without one are told."""

import subprocess
import sys

import pytest

from ntkdask.execution.main_guard import require_guard


def test_a_script_without_guard_is_told_what_to_do_before_anything_starts(tmp_path):
    """Also where the call is not on the script's own lines, and in a few lines."""
    script = tmp_path / "script.py"
    script.write_text(
        "from ntkdask.execution.cluster import connect\n"
        "def go():\n    return connect(n_workers=1, cuda=False)\n\nwith go():\n    pass\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert len(lines) < 20
    assert "UserError: connect was called from line 5 of script.py" in lines[-1]
    assert "__name__ == '__main__'" in lines[-1]


def module_run(tmp_path, name, text):
    """A module of this text that is being run as `name`, up to the function that it calls."""
    path = tmp_path / "script.py"
    path.write_text(text)
    exec(
        compile(text, path, "exec"), {"__name__": name, "__file__": str(path), "call": require_guard, "__spec__": None}
    )


@pytest.mark.parametrize(
    "text",
    [
        'if __name__ == "__main__":\n    call()',
        "import sys\nif sys.argv:\n    call()\n",
        "def f():\n    call()\nif True:\n    f()",
    ],
)
def test_below_an_if_a_script_may_connect(tmp_path, text):
    module_run(tmp_path, "__main__", text)
    module_run(tmp_path, "elsewhere", "call()")


def test_a_worker_process_that_imports_the_script_leaves_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"worker process that is importing this script.*__main__"):
        module_run(tmp_path, "__mp_main__", "call()")
