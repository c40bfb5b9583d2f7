"""``kvatlas info``: what is installed and what it would run on. Whatever is missing is a line, not an error."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from kvatlas.cli.options import examples
from kvatlas.core.errors import ConfigError
from kvatlas.core.units import format_bytes
from kvatlas.records.manifest import collect_manifest


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("info", epilog=examples("kvatlas info"))(info)


def info() -> None:
    """Show versions, devices, memory, the active kernel path and the bundled model."""
    manifest = collect_manifest("kvatlas info", seed=0)
    commit = f"{manifest.commit}{' and uncommitted changes' if manifest.commit_dirty else ''}"
    table = Table(show_header=False, box=None)
    for name, version in manifest.versions.items():
        table.add_row(name, version)
    table.add_row("commit", commit if manifest.commit else "not a checkout")
    for name, text in (*_processor(manifest.hardware), *_accelerators(), *_dtype(), *_kernels(), *_bundled()):
        table.add_row(name, text)
    Console().print(table, markup=False)


def _processor(hardware: dict[str, Any]) -> list[tuple[str, str]]:
    memory = psutil.virtual_memory()
    return [
        ("cpu", f"{hardware['cpu_model']}, {hardware['usable_threads']} of {hardware['threads']} threads usable"),
        ("cpu features", str(hardware["cpu_features"]) or "none of those looked for"),
        ("memory", f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}"),
    ]


def _accelerators() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("cuda", f"unknown: torch cannot be imported ({error})")]
    threads = ("torch threads", str(torch.get_num_threads()))
    if not torch.cuda.is_available():
        return [threads, ("cuda", "none that torch finds")]
    return [threads, *(("cuda", _accelerator(index)) for index in range(torch.cuda.device_count()))]


def _accelerator(index: int) -> str:
    import torch

    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return f"cuda:{index} cannot be used: {str(error).splitlines()[0]}"
    return f"cuda:{index} {torch.cuda.get_device_name(index)}, {format_bytes(free)} free of {format_bytes(total)}"


def _dtype() -> list[tuple[str, str]]:
    """Name what ``--dtype auto`` computes in on the CPU, and why."""
    try:
        from kvatlas.models.precision import fastest_on_cpu
    except ImportError as error:
        return [("dtype auto on cpu", f"unknown: {error}")]
    return [("dtype auto on cpu", str(fastest_on_cpu()))]


def _kernels() -> list[tuple[str, str]]:
    """Name the form of each operation that runs on each device, and why."""
    try:
        import torch

        from kvatlas.kernels.dispatch import active_paths

        gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]
        return [
            (f"kernels on {device}" if first else "", f"{each.operation}: {each.path} ({each.why})")
            for device in devices
            for first, each in zip([True, *[False] * 9], active_paths(device), strict=False)
        ]
    except (ConfigError, ImportError) as error:
        return [("kernels", f"none: {error}")]


def _bundled() -> list[tuple[str, str]]:
    folder = files("kvatlas.models") / "bundled"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        about = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
        shape = f"{about['num_parameters']:,} parameters, {layers} layers, {heads} KV heads"
        return [("bundled model", f"{shape}, {config['max_position_embeddings']:,} positions"), ("", about["about"])]
    except (OSError, ValueError, KeyError) as error:
        return [("bundled model", f"missing or incomplete ({type(error).__name__}: {error})")]
