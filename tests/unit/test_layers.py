"""Imports point one way, and heavy packages are imported where they are used."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import hpc_supcon

ROOT = Path(hpc_supcon.__file__).parent
# Each part may import from those above it (and from itself). Parts on one line do not know each other.
LAYERS = [
    {"errors"},
    {"yaml12"},
    {"schema"},
    {"config"},
    {"allocator"},
    {"runtime"},
    {"phases"},
    {"collectives"},
    {"data", "models", "losses", "pruning"},
    {"training"},
    {"evaluation"},
    {"export", "grid"},
    {"bench"},
    {"cli_start", "cli_progress"},
    {"cli_bench", "cli_checkpoints", "cli_export", "cli_grid", "cli_prune"},
    {"cli"},
    {"__main__"},
]
NEVER_SEE_A_CONFIG = {"data", "models", "losses", "pruning", "collectives", "phases", "runtime", "allocator"}
OPTIONAL = {"ffcv", "nvidia", "deepspeed", "submitit", "triton", "plotly", "onnx", "onnxruntime", "onnxscript"}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path: Path):
    """Parts of this package that a file imports, anywhere in it."""
    package = ("hpc_supcon", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [module] if len(module) > 1 else [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == "hpc_supcon" and len(name) > 1)


def test_imports_point_one_way():
    level = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        own = part_of(path)
        if own == "__init__":
            continue
        assert own in level, f"{own} is a new part: give it a place in LAYERS"
        for part in imported_parts(path):
            if part in level and part != own and level[part] >= level[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {part}")
            if own in NEVER_SEE_A_CONFIG and part in ("config", "schema"):
                wrong.append(f"{path.relative_to(ROOT)} sees the configuration")
    assert not wrong


def test_optional_packages_are_not_imported_at_the_top_of_a_module():
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            used_only_by_itself = path.name in ("triton_kernels.py", "views_triton.py")
            if OPTIONAL & {n.split(".")[0] for n in names} and not used_only_by_itself:
                wrong.append(str(path.relative_to(ROOT)))
    assert not wrong


def test_the_command_line_answers_help_and_config_without_torch(python):
    code = "import sys; from hpc_supcon import cli; assert 'torch' not in sys.modules"
    subprocess.run([python, "-c", code], check=True)
