"""`info`: what this installation is and has. It imports little: it should answer in a blink."""

from __future__ import annotations

import platform
from typing import Any

from .options import Device, Json, echo_json


def info(device: Device = None, json: Json = False) -> None:
    """Version, device, and the learners, task families and backbones that there are."""
    facts = gather(device)
    if json:
        echo_json(facts)
        return
    mlx = facts["mlx"]
    lines = {
        "Status": facts["status"],
        "MLX": f"Available (version {mlx})" if mlx else f"Not available ({facts['problem']})",
        "Python": facts["python"],
        "Version": facts["version"],
    }
    if mlx:
        from ..devices import allocator

        at = facts["device"]
        memory = f", {at['memory_bytes'] / 2**30:.0f} GB" if at["memory_bytes"] else ""
        kind = {"metal": "Metal", "cuda": "CUDA", "cpu": "CPU"}[at["device"]]
        lines |= {
            "Device": f"{kind} ({at['name']}{memory}, {at['cores']} cores)",
            "BLAS": at["blas"],
            "Allocator": at["allocator"] if at["device"] != "cpu" else _with_advice(*allocator()),
            "mx.compile": f"{'compiles' if at['compiles'] else 'does not compile'} ({at['compiles_why']})",
        }
    for kind in ("learners", "families", "backbones"):
        lines[kind.capitalize()] = ", ".join(facts[kind])
    print("Meta-Learning PEFT System")
    for name, value in lines.items():
        print(f"{name}: {value}")


def gather(device: str | None = None) -> dict[str, Any]:
    """The same as plain JSON."""
    from .. import __version__
    from ..backbones import BACKBONES
    from ..devices import device_info, select_device
    from ..learners import LEARNERS
    from ..tasks import FAMILIES

    facts: dict[str, Any] = {
        "system": "Meta-Learning PEFT System",
        "status": "ready",
        "version": __version__,
        "python": platform.python_version(),
        "mlx": None,
    }
    try:
        import mlx.core as mx
    except ImportError as error:
        facts |= {"status": "MLX is missing", "problem": str(error)}
    else:
        select_device(device)
        facts |= {"mlx": getattr(mx, "__version__", "unknown"), "device": device_info()}
    return facts | {
        "learners": sorted(LEARNERS),
        "families": sorted(FAMILIES),
        "backbones": sorted(BACKBONES),
    }


def _with_advice(what: str, advice: str | None) -> str:
    return f"{what}; {advice}" if advice else what
