"""What is built, what each op will use here, and why: ``python -m cmoe_kernels``."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import cmoe_kernels
from cmoe_kernels import backends, native


def report() -> str:
    """The whole report as text."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    blocks = [_versions(), *(_ops(device) for device in devices), _settings()]
    if len(devices) == 1:
        blocks.append("No GPU that torch can use was found; GPU backends are listed on a machine that has one.")
    return "\n\n".join(blocks)


def _versions() -> str:
    library = f"{native.library}" if native.library else f"absent: {native.error}"
    rows = [
        ("cmoe_kernels", cmoe_kernels.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}, {torch.get_num_threads()} threads"),
        ("triton", _version("triton")),
        ("versions", tested_versions()),
        ("native library", library),
        ("instruction set", _instruction_set()),
        ("CUDA kernels", native.cuda_kernels().built or f"none: {native.cuda_kernels().error}"),
        ("processor", f"{_processor()}, torch runs at {torch.backends.cpu.get_cpu_capability()}"),
    ]
    if torch.cuda.is_available():
        rows += [
            ("gpu", f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}")
            for i in range(torch.cuda.device_count())
        ]
        if torch.cuda.get_device_capability() == (9, 0) and native.cuda_kernels().built:
            rows.append(("CUDA products", _products_of_sm90()))
    return _table(rows)


def tested_versions() -> str:
    """Which installed packages are outside the ranges that this version was tested with; the installed metadata holds the ranges."""
    try:
        distribution = importlib.metadata.distribution("cmoe-kernels")
    except importlib.metadata.PackageNotFoundError:
        return "tested versions unknown: cmoe-kernels is on the path and not installed"
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # transformers brings it, and with it each range that has an end
        return "none of the extras is installed"
    extras = [extra for extra in distribution.metadata.get_all("Provides-Extra") or [] if extra not in ("dev", "docs")]
    outside = {}
    for requirement in map(Requirement, distribution.requires or []):
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
        version = _installed_version(requirement.name) if wanted else None
        if version and not requirement.specifier.contains(version, prereleases=True):
            outside[requirement.name] = f"{requirement.name} {version} (tested: {requirement.specifier})"
    return f"not tested with: {'; '.join(outside.values())}" if outside else "within the tested ranges"


def _products_of_sm90() -> str:
    if os.environ.get("CMOE_CUDA_SM90") == "0":
        return "of sm_80: CMOE_CUDA_SM90=0"
    if "sm_90a" not in native.cuda_kernels().built:
        return "of sm_80: the library was built without sm_90a"
    return "of sm_90a where rows of bf16 or fp16 begin at multiples of 16 bytes; the others, and the router's first layer, of sm_80"


def _instruction_set() -> str:
    sets = native.instruction_sets()
    if sets is None:
        return "none: there is no native library"
    if not sets.used:
        return f"none: {sets.error}"
    left_out = f"; left out, failed the self-test: {sets.left_out}" if sets.left_out else ""
    return f"{sets.used} (CMOE_CPU_ISA chooses among {', '.join(sets.available)}){left_out}"


def _ops(device: str) -> str:
    rows = [("op", f"backend on {device}", "why")]
    for op in backends.OPS:
        try:
            chosen = backends.choose(op, device)
        except RuntimeError as error:
            rows.append((op, "error", str(error)))
            continue
        passed = backends.DEVICE_ORDER[device][: backends.DEVICE_ORDER[device].index(chosen)]
        reasons = [f"{name}: {backends.missing_reason(name)}" for name in passed]
        if backends.selected() != "auto":
            reasons = [f"chosen by {'CMOE_BACKEND' if os.environ.get('CMOE_BACKEND') else 'use_backend'}"]
        few = backends.choose(op, device, tokens=1)
        also = f"; {few} up to {backends.FEW} tokens" if few != chosen else ""
        rows.append((op, chosen, ("; ".join(reasons) or "first choice for this device") + also))
    return _table(rows)


def _settings() -> str:
    names = ("CMOE_BACKEND", "CMOE_CPU_ISA", "CMOE_SELF_TEST", "CMOE_CHECK", "CMOE_KEEP_PAGES", "CMOE_AUTOTUNE", "CMOE_CUDA_SM90")
    return _table([(name, os.environ.get(name, "not set")) for name in names])


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows)


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    return _installed_version(name) or "installed, version unknown"


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
