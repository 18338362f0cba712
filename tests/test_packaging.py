"""The two links, the missing `__init__.py` files and what a wheel holds.

`passes/` and `kernels/` are top-level folders and packages of clsa_compile at once. Each way
this can break shows only in a fresh process, so most of these tests start one.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "kernels")
PACKAGED = ("clsa_compile", *LINKED, "pyproject.toml", "README.md", "LICENSE")


def link_problems(root: Path) -> list[str]:
    """Lists which of the two links are missing, absolute or point elsewhere."""
    found = []
    for name in LINKED:
        link = root / "clsa_compile" / name
        if not link.is_symlink():
            found.append(f"{name}: not a link")
        elif os.readlink(link) != f"../{name}":
            found.append(f"{name}: points to {os.readlink(link)}")
        elif not link.is_dir():
            found.append(f"{name}: points to nothing")
    return found


def stray_init_files(root: Path) -> list[Path]:
    """Lists the `__init__.py` files in folders that must not be packages by themselves."""
    return sorted(path for name in (*LINKED, "tests") for path in (root / name).rglob("__init__.py"))


def run_python(code: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh process in `cwd`, which Python puts first on its path."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    environment.pop("PYTHONSAFEPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """Gives the last line a successful process printed."""
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def module_names(folder: str) -> list[str]:
    """Lists the dotted names of a linked folder's modules (namespace folders included)."""
    return sorted(
        ".".join(("clsa_compile", *path.relative_to(ROOT).with_suffix("").parts))
        for path in (ROOT / folder).rglob("*.py")
    )


def test_the_links_point_to_the_folders() -> None:
    assert link_problems(ROOT) == []


def test_git_keeps_them_as_links() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "--stage", "clsa_compile/passes", "clsa_compile/kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [line.split()[0] for line in listing] == ["120000", "120000"]


def test_no_init_files() -> None:
    assert stray_init_files(ROOT) == []


def test_a_wrong_link_and_a_stray_init_file_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "clsa_compile").mkdir()
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes/__init__.py").touch()
    (tmp_path / "clsa_compile/passes").symlink_to(tmp_path / "passes")
    (tmp_path / "clsa_compile/kernels").symlink_to("../kernels")
    assert link_problems(tmp_path) == [
        f"passes: points to {tmp_path / 'passes'}",
        "kernels: points to nothing",
    ]
    assert stray_init_files(tmp_path) == [tmp_path / "passes/__init__.py"]


# Prints the files that ran under the top-level name `kernels` while transformers built a model.
USE_TRANSFORMERS = """
import sys, json
from transformers import LlamaConfig, LlamaForCausalLM
import torch
config = LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=16,
)
model = LlamaForCausalLM(config).eval()
assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 16)
files = [
    module.__file__ for name, module in sys.modules.items()
    if name.split(".")[0] == "kernels" and getattr(module, "__file__", None)
]
print(json.dumps(files))
"""


def test_transformers_does_not_run_our_kernels_folder() -> None:
    files = [Path(file) for file in json.loads(last_line(run_python(USE_TRANSFORMERS, ROOT)))]
    assert [file for file in files if ROOT in file.resolve().parents] == []


def test_a_kernels_package_would_be_noticed(tmp_path: Path) -> None:
    """What the test above guards against does happen: an `__init__.py` is enough."""
    (tmp_path / "kernels").mkdir()
    init = tmp_path / "kernels/__init__.py"
    init.touch()
    result = run_python(USE_TRANSFORMERS, tmp_path)
    assert result.returncode != 0 or str(init) in json.loads(last_line(result))


def test_passes_import_without_triton_and_jinja() -> None:
    names = module_names("passes")
    assert "clsa_compile.passes.pipeline" in names
    code = f"""
import importlib, json, sys
sys.modules["triton"] = sys.modules["jinja2"] = None
for name in {names!r}:
    importlib.import_module(name)
print(json.dumps([name for name in sys.modules if name.startswith("clsa_compile.kernels")]))
"""
    assert json.loads(last_line(run_python(code, ROOT))) == []


def test_importing_clsa_compile_needs_no_triton() -> None:
    code = 'import sys; sys.modules["triton"] = None; import clsa_compile; print("fine")'
    assert last_line(run_python(code, ROOT)) == "fine"


@pytest.mark.parametrize("folder", LINKED)
def test_the_folders_import_from_elsewhere(folder: str, tmp_path: Path) -> None:
    """The installed package finds its linked parts when the root is not on the path."""
    code = f"import clsa_compile.{folder} as part; print(list(part.__path__)[0])"
    assert Path(last_line(run_python(code, tmp_path))).resolve() == ROOT / folder


def test_torch_finds_the_backend_by_its_entry_point(tmp_path: Path) -> None:
    code = """
import torch
from torch._dynamo import list_backends, lookup_backend
assert "clsa" in list_backends(exclude_tags=()), list_backends(exclude_tags=())
print(lookup_backend("clsa").__module__)
"""
    assert last_line(run_python(code, tmp_path)).startswith("clsa_compile")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Builds a wheel from a copy of the sources and lists what is in it."""
    copy = tmp_path_factory.mktemp("sources")
    for name in PACKAGED:
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(source, copy / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(copy / "dist"), str(copy)], check=True)
    (wheel,) = (copy / "dist").glob("clsa-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_every_module_and_template(wheel_names: list[str]) -> None:
    expected = {
        f"clsa_compile/{path.relative_to(ROOT).as_posix()}"
        for folder in LINKED
        for pattern in ("*.py", "*.jinja")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert any(name.endswith(".jinja") for name in expected)
    expected |= {
        path.relative_to(ROOT).as_posix()
        for folder in ("calibration", "html")
        for pattern in ("*.py", "*.jinja", "*.css", "*.js")
        for path in (ROOT / "clsa_compile" / folder).rglob(pattern)
    }
    assert "clsa_compile/calibration/report.html.jinja" in expected
    assert {f"clsa_compile/html/page.{end}" for end in ("html.jinja", "css", "js")} <= expected
    assert expected | {"clsa_compile/py.typed"} <= set(wheel_names)


def test_the_wheel_installs_one_top_level_name(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"clsa_compile"}
