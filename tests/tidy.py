"""What `make lint` finds beyond single lines: code that nothing uses, dependencies that are not declared or not used,
and code that is written twice.

    python -m tests.tidy

Below are the exceptions, each with its reason; `tests/unit/test_tidy.py` fails when one is not needed any more.
"""

from __future__ import annotations

import configparser
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "hpc_supcon"
OTHERS = ("tests", "benchmarks", "docs", "examples")

DECORATORS = {
    "@*.command*": "typer calls it",
    "@*.callback*": "typer calls it",
    "@field_validator*": "pydantic calls it",
    "@model_validator*": "pydantic calls it",
    "@*.register_fake": "PyTorch calls it",
    "@pytest.fixture*": "pytest calls it",
}
NAMES = {
    "__getattr__": "Python calls it for names of a module",
    "__dir__": "Python calls it for the names of a module",
    "__class__": "set on modules of PyTorch",
    "out_features": "set on layers of PyTorch",
    "yaml_implicit_resolvers": "set on classes of PyYAML",
    "model_config": "pydantic reads it",
    "extra_repr": "PyTorch calls it",
    "_repr_*_": "Jupyter calls it",
    "writelines": "of a stream, which any library may call",
    "do_*": "http.server calls it",
    "log_message": "http.server calls it",
    "debug": "the option of every command; main reads it from the arguments, for it counts before they are parsed",
    "logistic": "settings of a probe, which are found by its name",
    "mlp": "settings of a probe, which are found by its name",
    "on_*": "a callback's method, which is found by the name of its event",
    "show": "of Run in the Python API",
    "to_arrow": "of Table in the Python API",
    "closed": "a template reads it",
    "has_map": "a template reads it",
    "sortable": "a template reads it",
    "prose": "a template reads it",
    "*_worst": "a column of a benchmark's results",
    "forward_s": "a column of a benchmark's results",
    "backward_s": "a column of a benchmark's results",
    "host_s": "a column of a benchmark's results",
    "gradient_error": "a column of a benchmark's results",
    "M_BUCKET": "Triton tunes anew where it differs",
    "BRIGHTNESS": "the first of the numbers of operations, of which the others are compared",
    "multi_crop": "names.MultiCropName says it without PyTorch; a test compares the two",
}
NAMES_OF_OTHERS = {
    "pytest_*": "pytest calls it",
    "pytestmark": "pytest reads it",
    "own_code": "a fixture that another one needs",
    "without_locks": "a fixture that a test needs",
    "daemon_threads": "socketserver reads it",
    "handle_*": "html.parser calls it",
    "simsiam": "tests find the formula by the loss's name",
    "byol": "tests find the formula by the loss's name",
    "not_a_module": "tests name it as a setting does",
    "Noise": "tests name it as a setting does",
    "Erase": "tests name it as a setting does",
    "Means": "tests name it as a setting does",
    "Darken": "tests name it as a setting does",
    "set_layout_engine": "set on a class of Matplotlib",
    "check_*": "what a notebook must have done, which is found by the notebook's name",
    "launcher_cls": "Triton calls it",
    "get_current_*": "Triton calls it",
    "get_benchmarker": "Triton calls it",
}
MODULES = {"nvidia-dali-cuda130": "nvidia", "mlflow-skinny": "mlflow"}
"""Package -> its module, where they differ and the package is not installed with dev."""
UNUSED = {
    "hpc-supcon": "an extra of its own in another",
    "tensorboard": "PyTorch's SummaryWriter imports it",
    "onnx": "PyTorch's export imports it",
    "onnxscript": "PyTorch's export imports it",
    "ffcv": "its C library is loaded, and none of its Python",
}
TRANSITIVE = {
    "IPython": "comes with Jupyter, in which a notebook runs",
    "triton": "comes with PyTorch, where there is one for the platform",
    "numba": "comes with FFCV, whose loader alone uses it",
}
NOT_FOR_USERS = {
    "pytorch_metric_learning": "a rival in a benchmark, which is left out without it",
}


def run(root: Path, *command: str | Path) -> str:
    """What a tool says in `root` where it finds something; else nothing."""
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def dead_code(root: Path, names: Mapping[str, str], *folders: str) -> str:
    """Code in the folders that none of them uses."""
    given = ("--ignore-names", ",".join(names), "--ignore-decorators", ",".join(DECORATORS))
    return run(root, sys.executable, "-m", "vulture", *given, *folders)


def dependencies(root: Path, package: str, others: tuple[str, ...]) -> str:
    """Imports of the package, and of the others, that setup.cfg does not declare; what it declares for no import.

    deptry reads no setup.cfg: it gets the same lists in files.
    """
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    extras = dict(setup["options.extras_require"])
    dev = extras.pop("dev")
    modules = ",".join(f"{name}={module}" for name, module in MODULES.items())
    ignored = {"DEP002": UNUSED, "DEP003": TRANSITIVE, "DEP004": NOT_FOR_USERS}
    rules = ",".join(f"{code}={'|'.join(found)}" for code, found in ignored.items())
    command = (sys.executable, "-m", "deptry", "--no-ansi", "--package-module-name-map", modules)
    with tempfile.TemporaryDirectory() as folder:
        main, develop = Path(folder, "main.txt"), Path(folder, "dev.txt")
        own = f"{package.replace('_', '-')}["  # an extra that names other extras
        for file, lists in ((main, [setup["options"]["install_requires"], *extras.values()]), (develop, [dev])):
            lines = "\n".join(lists).splitlines()
            file.write_text("".join(f"{line}\n" for line in lines if not line.strip().startswith(own)))
        files = ("--requirements-files", str(main), "--requirements-files-dev", str(develop))
        of_package = run(root, *command, "--per-rule-ignores", rules, *files, package)
        first_party = ("--known-first-party", package, "--known-first-party", "tests", "--exclude", "^$")
        files = ("--requirements-files", f"{main},{develop}", "--ignore", "DEP002")
        return of_package + run(root, *command, "--per-rule-ignores", rules, *first_party, *files, *others)


def duplicates(root: Path, package: str, others: tuple[str, ...]) -> str:
    """Runs of six and more lines that stand in two places, in the package also with other names."""
    common = ("--format", "python", "--mode", "weak", "--min-lines", "6", "--exit-code", "1", "--fail-on-empty")
    command = (Path(sys.executable).parent / "jscpd", *common, "--no-colors", "--no-tips", "--reporters", "console")
    same = run(root, *command, "--min-tokens", "60", package, *others)
    return same + run(root, *command, "--min-tokens", "70", "--ignore-identifiers", package)


def findings(root: Path, package: str = PACKAGE, others: tuple[str, ...] = OTHERS) -> dict[str, str]:
    """What -> what a tool says about it; empty where they find nothing. The last of `others` is for users to run."""
    found = {
        "code of the package that the package does not use": dead_code(root, NAMES, package),
        "code that nothing uses": dead_code(root, NAMES | NAMES_OF_OTHERS, package, *others[:-1]),
        "dependencies": dependencies(root, package, others),
        "code that is written twice": duplicates(root, package, others),
    }
    return {what: text for what, text in found.items() if text}


if __name__ == "__main__":
    found = findings(ROOT)
    for what, text in found.items():
        print(f"{what}:\n{text}")
    sys.exit(1 if found else 0)
