"""Imports point one way, none goes in a circle, and heavy packages are imported where they are used."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hpc_supcon

ROOT = Path(hpc_supcon.__file__).parent
# From the bottom up: each part may import those above it in this list (and itself). Parts on one line do not know
# each other.
LAYERS = [
    {"errors", "renamed", "environment", "process"},
    {"terminal", "notebook", "plugins", "hub_names", "known_names", "old_names"},
    {"files", "parts"},
    {"run_lock", "metric_file"},
    {"config"},
    {"run_folder"},
    {"pages", "tracking"},
    {"allocator", "phases", "seeding"},
    {"distributed"},
    {"checkpoint"},
    {"data", "models", "losses", "pruning"},
    {"training"},
    {"evaluation"},
    {"stages", "export", "bench"},
    {"grid"},
    {"cli", "api"},
    {"__main__"},
]
NEVER_SEE_A_CONFIG = {
    "data", "models", "losses", "pruning", "checkpoint", "distributed", "phases", "allocator", "files", "seeding",
}  # fmt: skip
OPTIONAL = {
    "ffcv", "nvidia", "deepspeed", "submitit", "triton", "pyarrow", "onnx", "onnxruntime", "onnxscript",
    "openTSNE", "umap", "wandb", "mlflow", "datasets", "webdataset", "peft", "transformers", "huggingface_hub",
}  # fmt: skip


def module_of(path: Path) -> tuple[str, ...]:
    parts = ("hpc_supcon", *path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(node: ast.ImportFrom | ast.Import, path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of this package that one statement imports."""
    if isinstance(node, ast.Import):
        names = [tuple(alias.name.split(".")) for alias in node.names]
    else:
        package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = (*base, *(node.module.split(".") if node.module else ()))
        names = [(*module, alias.name) if (*module, alias.name) in MODULES else module for alias in node.names]
    yield from (name for name in names if name in MODULES)


def imports_of(path: Path, body: list[ast.stmt] | None = None) -> Iterator[tuple[str, ...]]:
    """Imported anywhere in the file or, with `body`, when it is imported itself."""
    for node in ast.walk(ast.parse(path.read_text())) if body is None else body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(node, path)
        elif body is not None and isinstance(node, ast.Try):
            yield from imports_of(path, node.body)


def part_of(module: tuple[str, ...]) -> str:
    return module[1] if len(module) > 1 else "__init__"


def test_imports_point_one_way():
    level = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    wrong = []
    for module, path in MODULES.items():
        own = part_of(module)
        if own == "__init__":
            continue
        assert own in level, f"{own} is a new part: give it a place in LAYERS"
        for part in map(part_of, imports_of(path)):
            if part in level and part != own and level[part] >= level[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {part}")
            if own in NEVER_SEE_A_CONFIG and part == "config":
                wrong.append(f"{path.relative_to(ROOT)} sees the configuration")
    assert not wrong


def test_no_module_imports_itself_through_others():
    graph = {module: set(imports_of(path, ast.parse(path.read_text()).body)) for module, path in MODULES.items()}
    done: set[tuple[str, ...]] = set()

    def follow(module: tuple[str, ...], trail: list[tuple[str, ...]]) -> None:
        assert module not in trail, " -> ".join(".".join(m) for m in [*trail[trail.index(module) :], module])
        if module not in done:
            for other in graph[module]:
                follow(other, [*trail, module])
            done.add(module)

    for module in graph:
        follow(module, [])


def test_optional_packages_are_not_imported_at_the_top_of_a_module():
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            used_only_by_itself = path.name.startswith("triton")
            if OPTIONAL & {n.split(".")[0] for n in names} and not used_only_by_itself:
                wrong.append(str(path.relative_to(ROOT)))
    assert not wrong


def test_one_module_alone_imports_by_a_name_that_others_give():
    """So that its refusal of what the user did not allow holds for everything."""
    may = {"parts.py", "bench/gpu/__main__.py"}  # the stages of the benchmark: a list of this package
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            imports = name in ("import_module", "__import__", "exec_module", "load_module", "run_path", "run_module")
            executes = isinstance(node.func, ast.Name) and name in ("eval", "exec", "compile")
            is_constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if (imports and not is_constant) or executes:
                found.add(str(path.relative_to(ROOT)))
    assert found == may


def test_the_command_line_answers_help_and_config_without_torch(python):
    code = "import sys; from hpc_supcon import cli; assert 'torch' not in sys.modules"
    subprocess.run([python, "-c", code], check=True)
