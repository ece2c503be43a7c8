"""The command line: what is printed, what is loaded, and how it ends."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from ctypes.util import find_library
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from efficientai_toolkit import __version__, devices
from efficientai_toolkit.backbones import BACKBONES
from efficientai_toolkit.cli import COMMANDS, PREFIX, app
from efficientai_toolkit.cli.validate import backend_checks
from efficientai_toolkit.learners import LEARNERS
from efficientai_toolkit.runs.experiment import ExperimentManager
from efficientai_toolkit.tasks import FAMILIES

ROOT = Path(__file__).parents[1]
QUICK = ["--config", str(ROOT / "configs" / "quick.yaml"), "--set", "logging.tensorboard_enabled=false", "--no-report"]


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def process(*arguments: str, cwd: Path | None = None, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "efficientai_toolkit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, **kwargs)


def test_info_begins_as_it_should(cli):
    lines = cli("meta-learning-peft:info").stdout.splitlines()
    assert lines[0] == "Meta-Learning PEFT System"
    assert lines[1].startswith("Status: ready")
    assert lines[2] == f"MLX: Available (version {mx.__version__})"
    assert lines[3] == f"Python: {sys.version.split()[0]}"
    assert f"Version: {__version__}" in lines
    named = dict(line.split(": ", 1) for line in lines[1:])
    assert named["Learners"].split(", ") == sorted(LEARNERS)
    assert named["Families"].split(", ") == sorted(FAMILIES)
    assert named["Backbones"].split(", ") == sorted(BACKBONES)
    assert {"Device", "BLAS", "Allocator", "mx.compile"} <= named.keys()


def test_info_json(cli):
    facts = json.loads(cli("meta-learning-peft:info", "--json").stdout)
    assert (facts["status"], facts["mlx"]) == ("ready", mx.__version__)
    assert facts["learners"] == sorted(LEARNERS)


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
def test_info_knows_another_allocator_and_recommends_one():
    library = next((name for name in ("jemalloc", "tcmalloc_minimal") if find_library(name)), None)
    plain = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    assert "LD_PRELOAD=libjemalloc.so.2" in process("info", "--device", "cpu", env=plain).stdout
    if library is None:
        pytest.skip("neither jemalloc nor tcmalloc is installed")
    done = process("info", "--device", "cpu", env={**plain, "LD_PRELOAD": find_library(library)})
    assert f"Allocator: {library.partition('_')[0]}\n" in done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_kept_unless_the_user_has_settings_of_his_own():
    code = (
        "import efficientai_toolkit, resource, mlx.core as mx; mx.set_default_device(mx.cpu)\n"
        "for i in range(22):\n"
        "    if i == 2: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    mx.eval(mx.ones(8 << 20))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )

    def page_faults(**settings: str) -> int:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("LD_PRELOAD", "MALLOC_"))}
        done = subprocess.run([sys.executable, "-c", code], env=env | settings, capture_output=True, check=True)
        return int(done.stdout)

    assert 10 * page_faults() < page_faults(MALLOC_TRIM_THRESHOLD_="131072")


def test_info_without_options_is_the_same_by_the_short_way():
    """The entry point answers it without Typer's option parsing; the output is the same."""
    short = process("meta-learning-peft:info").stdout
    assert short == process("meta-learning-peft:info", "--device", "gpu" if devices.gpu_kind() else "cpu").stdout
    assert json.loads(process("meta-learning-peft:info", "--json").stdout)["status"] == "ready"


@pytest.mark.parametrize("form", [["info"], ["info", "--json"]])
def test_info_loads_nothing_heavy(form):
    code = (
        "import sys; sys.argv = ['x', *sys.argv[1:]]\n"
        "from efficientai_toolkit.cli import main; main()\n"
        "heavy = {'pydantic', 'numpy', 'rich', 'matplotlib', 'yaml', 'mlx.nn', 'tensorboardX'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *form], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_shows_every_command_in_its_group(cli):
    text = cli("--help").stdout
    for name, (_, group) in COMMANDS.items():
        assert PREFIX + name in text
        assert group in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(cli, name):
    assert "Usage" in cli(PREFIX + name, "--help").stdout
    assert "Usage" in cli(name, "-h").stdout


def test_an_unknown_command_is_named_with_the_nearest(cli):
    result = cli("meta-learning-peft:trian", code=2)
    assert "meta-learning-peft:train" in result.stderr


def test_validate(cli):
    checks = json.loads(cli("validate", "--configs", ROOT / "configs", "--json").stdout)["checks"]
    ok = {check["name"] for check in checks if check["ok"]}
    assert {"gradient", "second-order gradient", "compile", "vmap", "numpy", "default.yaml", "omniglot.yaml"} <= ok
    text = cli("validate", "--configs", ROOT / "configs").stdout
    assert "✓" in text
    assert "banking77" in text
    assert "Everything needed works" in text


def test_validate_fails_where_something_needed_fails(cli, tmp_path):
    (tmp_path / "bad.yaml").write_text("meta_learning:\n  algorithm: mmal\n")
    (tmp_path / "worse.yaml").write_text("meta_learning: [")
    result = cli("validate", "--configs", tmp_path, code=1)
    assert "✗" in result.stdout
    assert "→ correct the file" in result.stdout
    assert "'maml'" in result.stdout
    assert "does not work" in result.stdout


def test_validate_finds_a_wrong_gradient(cli, monkeypatch):
    monkeypatch.setattr(mx, "grad", lambda function: lambda x: x)
    report = json.loads(cli("validate", "--json", code=1).stdout)
    failed = {check["name"] for check in report["checks"] if check["needed"] and not check["ok"]}
    assert {"gradient", "second-order gradient", "vmap"} <= failed


def test_validate_says_how_to_keep_one_of_two_backends(cli, monkeypatch):
    installed = {"mlx-cpu": "0.32.4", "mlx-cuda-13": "0.32.4"}

    def version(name: str) -> str:
        if name.startswith("mlx-") and name not in installed:
            raise PackageNotFoundError(name)
        return installed.get(name, "1")

    monkeypatch.setattr("efficientai_toolkit.cli.validate.version", version)
    checks = json.loads(cli("validate", "--configs", ROOT / "configs", "--json").stdout)["checks"]
    (both,) = (check for check in checks if check["name"] == "one backend")
    assert not both["ok"]
    assert both["detail"] == "mlx-cpu and mlx-cuda-13 overwrite each other's libmlx.so"
    expected = "pip uninstall -y mlx-cpu && pip install --force-reinstall --no-deps mlx-cuda-13==0.32.4"
    assert both["remedy"] == expected
    del installed["mlx-cpu"]
    assert not list(backend_checks())


@pytest.mark.parametrize(
    ("system", "place", "works", "compiles", "advice"),
    [
        ("linux", "/usr/bin/g++", {"g++"}, True, ""),
        ("linux", "/usr/bin/g++", set(), False, "apt-get install g++"),
        ("linux", None, {"c++", "clang++"}, False, "apt-get install g++"),
        ("darwin", "/usr/bin/g++", {"g++", "xcode-select"}, True, ""),
        ("darwin", "/usr/bin/g++", {"g++"}, False, "xcode-select --install"),  # nor is Apple's stand-in run
        ("darwin", "/opt/bin/g++", {"g++"}, True, ""),
    ],
)
def test_mlx_compiles_where_g_plus_plus_runs(on_cpu, monkeypatch, system, place, works, compiles, advice):
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(devices.shutil, "which", lambda name: place if name == "g++" else f"/usr/bin/{name}")
    monkeypatch.setattr(devices, "_succeeds", lambda command, *_: command in works)
    devices._has_compiler.cache_clear()
    found, why = devices.compiles()
    devices._has_compiler.cache_clear()
    assert found is compiles
    assert advice in why


def test_a_command_succeeds_or_not():
    assert devices._succeeds(sys.executable, "--version")
    assert not devices._succeeds(sys.executable, "--no-such-option")
    assert not devices._succeeds("no-such-command-anywhere")


def test_validate_finds_data(cli, tmp_path):
    (tmp_path / "mnist").mkdir()
    checks = json.loads(cli("validate", "--data-dir", tmp_path, "--json").stdout)["checks"]
    found = {check["name"]: check["ok"] for check in checks if check["group"] == "data sets"}
    assert found["mnist"]
    assert not found["omniglot"]


def test_train_then_resume(cli, tmp_path):
    result = cli("meta-learning-peft:train", *QUICK, "--output", "out")
    assert "iteration 60/60  validation: loss" in result.stdout
    assert (tmp_path / "checkpoints" / "best.npz").is_file()
    (run,) = (tmp_path / "out").iterdir()
    assert run.name.startswith("Reptile_Linear_")
    assert str(run.relative_to(tmp_path)) in result.stdout
    longer = json.loads(cli("train", "--resume", run, "--iterations", "80", "--no-report", "--json").stdout)
    assert (longer["iterations"], longer["stopped"]) == (80, "completed")


def test_train_json_is_one_line_on_standard_output(cli):
    result = cli("train", *QUICK, "--seed", "5", "--name", "mine", "--json")
    report = json.loads(result.stdout)
    assert "validation: loss" in result.stderr
    assert Path(report["run"]).name.startswith("mine_")
    config = ExperimentManager.open(report["run"]).config
    assert config["meta_learning"]["seed"] == 5


def test_train_ends_with_plots_and_a_report(cli):
    done = json.loads(cli("train", *QUICK[:-1], "-n", "20", "--json").stdout)
    assert Path(done["report"]).read_text().startswith("<!doctype html>")
    plots = {path.name for path in (Path(done["run"]) / "plots").iterdir()}
    assert {"training_curves.png", "decision_regions.png"} <= plots


def test_flags_beat_the_file(cli):
    report = json.loads(
        cli("train", *QUICK, "--algorithm", "fomaml", "-n", "5", "--set", "model.hidden_dim=4", "--json").stdout
    )
    assert (report["algorithm"], report["iterations"]) == ("fomaml", 5)
    assert report["trainable_parameters"] == 4 * 2 + 4 + 4 * 4 + 4 + 2 * 4 + 2


def test_an_adapter_by_configuration(cli):
    adapter = ["adapter.method=lora", "adapter.rank=2", "adapter.train_head=true"]
    report = json.loads(cli("train", *QUICK, *(s for a in adapter for s in ("--set", a)), "-n", "5", "--json").stdout)
    assert report["trainable_parameters"] == 2 * (2 + 32) + 2 * (32 + 32) + 32 * 2 + 2


def test_an_interrupted_run_says_how_to_go_on(cli, monkeypatch):
    from efficientai_toolkit.cli.progress import LineWatch

    def interrupt(self, iteration, latest):
        if iteration == 13:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LineWatch, "step", interrupt)
    result = cli("train", *QUICK, code=130)
    assert "Stopped at iteration 13 of 60" in result.stdout
    command = result.stdout.splitlines()[-1].split()
    monkeypatch.undo()
    assert command[0] == "efficientai-toolkit"


def test_progress_is_live_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    import os

    main, child = pty.openpty()
    command = [sys.executable, "-m", "efficientai_toolkit", "train", *QUICK]
    done = subprocess.Popen(command, stdout=child, stderr=child, cwd=tmp_path, env={**os.environ, "TERM": "xterm"})
    os.close(child)
    text = b""
    while True:
        try:
            part = os.read(main, 1 << 14)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        text += part
    os.close(main)
    assert done.wait() == 0
    assert b"60/60" in text
    assert b"validation: loss" in text
    assert b"\x1b[" in text


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of Unix")
def test_standard_output_may_be_closed_from_the_start(tmp_path):
    words = [sys.executable, "-m", "efficientai_toolkit", "train", "--config", str(ROOT / "configs" / "quick.yaml")]
    line = f"{shlex.join([*words, '--no-report'])} >&-"
    done = subprocess.run(line, shell=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
