"""The import direction, the lightness of ``import edgemat``, and the size of files."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import edgemat

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edgemat"
MAX_LINES = 500
NATIVE = (".c", ".h", ".hpp", ".cpp")

# Which rooms a room may import, itself always included. Rooms are modules and packages right below edgemat/.
# A room that is missing here fails the test: new rooms get a line.
BOTTOM = {"errors", "formats", "narrowing", "signed_digits", "trits", "codes", "tensor", "op", "body"}
DOWN = {
    "errors": set(),
    "rounding": {"errors"},
    "fixed": {"errors", "rounding"},
    "formats": {"errors", "rounding", "fixed"},
    "body": BOTTOM,
    "narrowing": BOTTOM,
    "signed_digits": {"errors"},
    "trits": {"errors"},
    "codes": set(),
    "tensor": {"formats"},
    "op": BOTTOM,
    "recipe": BOTTOM,
    "ops": BOTTOM,
    "nn": BOTTOM | {"ops", "recipe"},
    "lower": BOTTOM | {"ops", "recipe", "nn"},  # nn from functions only: importing lower stays light
    "foreign": BOTTOM | {"ops", "lower"},
    "brevitas": BOTTOM | {"nn", "lower", "foreign"},
    "float_onnx": BOTTOM | {"foreign"},
    "sim": BOTTOM | {"ops", "lower"},
    "targets": BOTTOM | {"ops", "lower"},
    "report": BOTTOM | {"ops", "lower", "targets", "sim"},
    "exporting": BOTTOM | {"ops", "lower", "targets", "foreign"},
    "verification": BOTTOM | {"ops", "lower", "targets", "sim", "foreign"},
    "lightning": BOTTOM | {"nn", "recipe", "exporting", "verification", "lower", "sim", "report", ""},
    "demo": BOTTOM | {"nn", "recipe", "exporting", "verification", "lower", "sim", "report", "targets", ""},
    "cli": BOTTOM | {"demo", "exporting", "verification", "sim", "report", "targets", "lower", "foreign", ""},
    "__main__": {"cli"},
}
# Which files may name these at module level. torch anywhere else would make reading a file slow.
OUTSIDE = {
    "torch": ("nn/", "lightning/", "brevitas/", "lower/from_torch.py", "float_onnx.py"),
    "lightning": ("lightning/",),
    "brevitas": ("brevitas/quantisers.py",),
    "sklearn": (),
    "unicorn": ("targets/mcu/unicorn_process.py",),
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def python_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imported_names(path: Path) -> list[tuple[str, int, bool]]:
    """Every imported dotted name with its line and whether module import runs it."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    later = set()
    for node in ast.walk(tree):
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            later |= {id(inner) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) not in later) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.relative_to(ROOT).with_suffix("").parts[: -node.level]) if node.level else ""
            stem = ".".join(part for part in (base, node.module or "") if part)
            found += [(f"{stem}.{alias.name}", node.lineno, id(node) not in later) for alias in node.names]
    return found


def wrong_imports(path: Path) -> list[str]:
    here, below = room(path), path.relative_to(PACKAGE).as_posix()
    complaints = []
    for name, line, at_import in imported_names(path):
        top, _, rest = name.partition(".")
        place = f"{path.relative_to(ROOT)}:{line}: {name}"
        if top == "edgemat":
            other = rest.partition(".")[0]
            if not ((PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").is_file()) or not other:
                other = ""  # a public name of the package itself
            if other not in DOWN[here] | {here} and rest not in ("", "__version__"):
                complaints.append(f"{place}: {here} may not import {other or 'the public API'}")
        elif top in OUTSIDE and at_import and not below.startswith(OUTSIDE[top]):
            complaints.append(f"{place}: {here} may import {top} only inside a function")
    return complaints


def test_every_room_has_its_line() -> None:
    assert {room(path) for path in python_files()} <= set(DOWN)


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    if room(path) not in DOWN:
        pytest.fail(f"{room(path)} has no line in DOWN")
    assert wrong_imports(path) == []


def test_the_import_check_sees_what_is_forbidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The control: each forbidden spelling in a file of ``ops`` is reported, each allowed one is not."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "edgemat")
    for name in ("ops", "targets", "formats"):
        (tmp_path / "edgemat" / name).mkdir(parents=True)
    path = tmp_path / "edgemat" / "ops" / "linear.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "from edgemat.formats import Fixed\n"
        "from edgemat.targets.hls import top\n"
        "from edgemat import export\n"
        "from ..targets import mcu\n"
        "import torch.nn\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def late():\n    import torch\n    import edgemat.targets.mcu\n"
    )
    assert [complaint.split(":")[1] for complaint in wrong_imports(path)] == ["3", "4", "5", "6", "11"]


LIGHT = "import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
HEAVY = {"torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich.console", "sklearn", "lightning"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("edgemat", HEAVY | {"numpy"}),
        ("edgemat.cli", HEAVY | {"numpy"}),
        ("edgemat.targets.toolchain", HEAVY),
        ("edgemat.formats", HEAVY),
        ("edgemat.recipe", HEAVY),
        ("edgemat.ops", {"torch", "sklearn"}),
        ("edgemat.lower", {"torch", "sklearn"}),
        ("edgemat.sim", {"torch", "sklearn"}),
        ("edgemat.exporting", {"torch", "sklearn"}),
        ("edgemat.verification", {"torch", "sklearn"}),
        ("edgemat.report", {"torch", "sklearn"}),
    ],
)
def test_importing_stays_light(module: str, heavy: set[str]) -> None:
    program = LIGHT.format(module=module, heavy=sorted(heavy)).replace("['", "{'").replace("']", "'}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", edgemat.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(edgemat, name) is not None
    assert name in dir(edgemat)
    assert edgemat.__all__ == sorted(edgemat.__all__)


def test_an_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="module 'edgemat' has no attribute 'nothing'"):
        _ = edgemat.nothing


def source_files() -> list[Path]:
    folders = [ROOT / name for name in ("edgemat", "hls_templates", "tests", "examples")]
    suffixes = (".py", *NATIVE)
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in suffixes]


def test_no_file_is_longer_than_a_room() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MAX_LINES} == {}


def test_modules_are_named_after_what_they_hold() -> None:
    vague = {"utils", "util", "misc", "common", "helpers", "helper", "manager"}
    assert [path for path in source_files() if path.stem in vague or path.parent.name in vague] == []


def test_no_shell_strings_and_no_unsafe_loading() -> None:
    """Read from the syntax tree, so that no comment or string is mistaken for a call."""
    bad = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            called = ast.unparse(node.func)
            if (
                words.get("shell", "False") != "False"
                or words.get("allow_pickle", "False") != "False"
                or words.get("weights_only", "True") != "True"
                or called in {"os.system", "os.popen", "eval", "exec", "pickle.load", "pickle.loads"}
                or (called == "torch.load" and "weights_only" not in words)
            ):
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called}")
    assert bad == []


def test_the_top_level_holds_what_it_should() -> None:
    allowed = {"pyproject.toml", "edgemat", "hls_templates", "tests", "examples", "docs"}
    allowed |= {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"}
    made = {"build", "dist", "edgemat.egg-info"}
    assert {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - made <= allowed


def test_packages_are_all_listed() -> None:
    """pyproject.toml lists packages by hand (hls_templates/ travels inside edgemat); the disk decides."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        settings = tomllib.load(file)
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert listed == found | {"edgemat._hls_templates"}
    assert settings["project"]["version"] == edgemat.__version__


def super_properties(text: str) -> list[str]:
    """What a source reads from `super()` without calling it."""
    tree = ast.parse(text)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in called]
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found if ast.unparse(node.value) == "super()"]


def test_no_layer_reads_a_property_through_super() -> None:
    """torch.compile takes ``super().name`` of a property for true, whatever it holds: it computed other bits."""
    assert super_properties("class A(B):\n    def f(self):\n        return super().x or super().f()") == [
        "3: super().x"
    ]
    nn = {path.relative_to(ROOT): super_properties(path.read_text("utf-8")) for path in python_files()}
    assert {str(path): found for path, found in nn.items() if found and room(ROOT / path) == "nn"} == {}
