"""`validate`: does this installation work? Every check is really run; what fails comes with its remedy."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from ..errors import ToolkitError
from .options import DataDir, Device, Json, echo_json

# Importable module → what to install where it is missing, and whether it is needed.
_MODULES = {
    "numpy": ("numpy", True),
    "yaml": ("pyyaml", True),
    "pydantic": ("pydantic", True),
    "rich": ("rich", True),
    "matplotlib": ("matplotlib", True),
    "PIL": ("pillow", True),
    "tensorboardX": ("tensorboardX", True),
    "tokenizers": ("efficientai-toolkit[text]", False),
    "mlx_lm": ("efficientai-toolkit[lm]", False),
    "wandb": ("efficientai-toolkit[wandb]", False),
}
# MLX's parts for Linux, each a package with a `libmlx.so` of its own at the same place.
_BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
# What a user may have: data set → files, any one of which shows that it is there.
_DATA = {
    "omniglot": ("omniglot/images_background.zip",),
    "mnist": ("mnist",),
    "mini_imagenet": ("mini-imagenet/images", "mini-imagenet/mini-imagenet-cache-train.pkl"),
    "cifar_fs, fc100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "clinc150": ("clinc150",),
    "banking77": ("banking77",),
    "glue": ("glue",),
    "superglue": ("superglue",),
}


class Check(NamedTuple):
    group: str
    name: str
    ok: bool
    detail: str = ""
    remedy: str = ""
    needed: bool = True


def validate(
    configs: Annotated[Path, typer.Option("--configs", help="Folder of configuration files.")] = Path("configs"),
    data_dir: DataDir = None,
    tests: Annotated[bool, typer.Option("--tests", help="Also run the test suite (of a source checkout).")] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Check MLX on this device, the dependencies, every configuration file, and the data sets."""
    from ..devices import select_device

    select_device(device)
    checks = [*mlx_checks(), *backend_checks(), *module_checks(), *config_checks(configs), *data_checks(data_dir)]
    if tests:
        checks.append(suite())
    ok = all(check.ok for check in checks if check.needed)
    if json:
        echo_json({"ok": ok, "checks": [check._asdict() for check in checks]})
    else:
        show(checks, ok)
    if not ok:
        raise SystemExit(1)


def mlx_checks() -> Iterator[Check]:
    """Each transformation on the default device, against what it must give."""
    import mlx.core as mx

    from ..devices import allocator, blas, compiles

    def close(value: mx.array, expected: list[float]) -> bool:
        return bool(mx.allclose(value, mx.array(expected), rtol=1e-5, atol=1e-5))

    x = mx.array([1.0, 2.0, 3.0])
    cube = lambda x: mx.sum(x**3)  # noqa: E731
    works: dict[str, Callable[[], bool]] = {
        "gradient": lambda: close(mx.grad(cube)(x), [3.0, 12.0, 27.0]),
        "second-order gradient": lambda: close(mx.grad(lambda x: mx.sum(mx.grad(cube)(x)))(x), [6.0, 12.0, 18.0]),
        "compile": lambda: close(mx.compile(lambda x: mx.exp(mx.log(x)) + x)(x), [2.0, 4.0, 6.0]),
        "vmap": lambda: close(mx.vmap(mx.grad(cube))(x[:, None]).squeeze(-1), [3.0, 12.0, 27.0]),
    }
    where = "GPU" if mx.default_device() == mx.gpu else "CPU"
    for name, run in works.items():
        try:
            ok, said = run(), "a wrong result"
        except Exception as error:  # whatever MLX or its compiler raises is the finding
            ok, said = False, str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        detail = f"on the {where}" if ok else said
        yield Check("MLX", name, ok, detail, "" if ok else "reinstall mlx (Linux: `mlx[cpu]` or `mlx[cuda13]`)")
    ok, why = compiles()
    yield Check("MLX", "mx.compile compiles", ok, why, "" if ok else "training works, but slower", needed=False)
    library, faster = blas()
    yield Check("MLX", "fast BLAS", faster is None, library, faster or "", needed=False)
    if mx.default_device() == mx.cpu:
        library, faster = allocator()
        yield Check("MLX", "fast allocator", faster is None, library, faster or "", needed=False)


def backend_checks() -> Iterator[Check]:
    """Of MLX's CPU and CUDA parts installed beside each other, the one that was unpacked last is in use, by chance."""
    found = {}
    for name in _BACKENDS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if len(found) > 1:
        kept = max(found)
        surplus = " ".join(name for name in found if name != kept)
        mend = f"pip install --force-reinstall --no-deps {kept}=={found[kept]}"
        detail = f"{' and '.join(found)} overwrite each other's libmlx.so"
        yield Check("MLX", "one backend", False, detail, f"pip uninstall -y {surplus} && {mend}", needed=False)


def module_checks() -> Iterator[Check]:
    owners = packages_distributions()
    for module, (package, needed) in _MODULES.items():
        try:
            if needed:
                importlib.import_module(module)
            elif importlib.util.find_spec(module) is None:  # importing what is optional may take seconds
                raise ImportError("not installed")
            distributions = owners.get(module, [])
            yield Check("packages", module, True, version(distributions[0]) if distributions else "", needed=needed)
        except ImportError as error:
            yield Check("packages", module, False, str(error), f"uv pip install '{package}'", needed=needed)


def config_checks(folder: Path) -> Iterator[Check]:
    """Every file parses, and names a learner, families and a backbone that there are."""
    from ..backbones import backbone_class
    from ..config import MetaLearningConfig
    from ..learners import learner_class
    from ..tasks import family

    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        yield Check("configurations", str(folder), False, "no YAML files", "name their folder: --configs", needed=False)
    for path in files:
        try:
            config = MetaLearningConfig.from_yaml(path)
            learner_class(config.algorithm)
            backbone_class(config.model.backbone)
            for name in config.task_distribution.task_families:
                family(name)
            families = ", ".join(config.task_distribution.task_families)
            yield Check("configurations", path.name, True, f"{config.algorithm} on {families}")
        except ToolkitError as error:
            yield Check("configurations", path.name, False, str(error), "correct the file")


def data_checks(data_dir: Path | None) -> Iterator[Check]:
    from ..tasks.storage import data_root

    try:
        root = data_root(data_dir)
    except ToolkitError as error:
        yield Check(
            "data sets", "data folder", False, str(error), "name it with --data-dir", needed=data_dir is not None
        )
        return
    for name, marks in _DATA.items():
        found = next((root / mark for mark in marks if (root / mark).exists()), None)
        remedy = "" if found else "--data-dir names the folder that has it"
        detail = str(found or f"no {root / marks[0]}")
        yield Check("data sets", name, found is not None, detail, remedy, needed=False)


def suite() -> Check:
    """The test suite of the checkout that this package is imported from, or that one stands in."""
    places = [Path.cwd(), Path(__file__).parents[3]]
    root = next((p for p in places if (p / "tests").is_dir() and (p / "pyproject.toml").is_file()), None)
    if root is None:
        return Check("tests", "pytest", False, "there is no tests/ here", "run it in a source checkout")
    if importlib.util.find_spec("pytest") is None:
        return Check("tests", "pytest", False, "pytest is not installed", "uv sync --group dev")
    done = subprocess.run([sys.executable, "-m", "pytest"], cwd=root, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return Check(
        "tests", "pytest", done.returncode == 0, last, "" if done.returncode == 0 else f"see `pytest` in {root}"
    )


def show(checks: list[Check], ok: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("", "check"):
        table.add_column(title, no_wrap=True)
    table.add_column("found", overflow="fold")
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            table.add_row("", f"[bold]{group}[/bold]")
        mark = "[green]✓[/green]" if check.ok else "[red]✗[/red]" if check.needed else "[yellow]✗[/yellow]"
        table.add_row(mark, check.name, escape(check.detail))
        if check.remedy:
            remedy = check.remedy if check.needed else f"optional: {check.remedy}"
            table.add_row("", "", escape(f"→ {remedy}"))
    console.print(table)
    console.print("Everything needed works." if ok else "Something needed does not work: see ✗ above.")
