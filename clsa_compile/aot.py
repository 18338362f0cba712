"""AOTInductor: a lowered module as files of native code, and such code as something that runs.

The one place that knows AOTInductor's private parts, as `backend.py` is for Inductor's.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from clsa_compile.errors import ExportError, PackageError

__all__ = ["UNBOUND", "Runner", "compile_module"]

_STANDARD = "libstdc++.so.6"

UNBOUND = (
    "the package has no weights yet: they were left out when it was exported; bind them before the first "
    "run, as package.bind('model.safetensors')"
)


def compile_module(
    module: GraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    metadata: Mapping[str, str],
    settings: Mapping[str, Any],
) -> list[Path]:
    """Compiles a module for its device; returns the files that belong into a package.

    Weights are left out. Triton kernels become machine code inside of the shared library. `metadata` are
    texts that the library keeps, `settings` Inductor's own options. Raises ExportError.
    """
    # Imported here: who only loads a package does not wait for Inductor.
    from torch._inductor import aot_compile
    from torch._inductor.utils import clear_caches

    options = {
        **settings,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.embed_kernel_binary": True,
        "aot_inductor.metadata": dict(metadata),
    }
    # Inductor keeps kernels' machine code by name, and names start anew with each graph.
    clear_caches()
    try:
        with torch.no_grad(), _linking() as libraries:
            given = options.get("aot_inductor.custom_op_libs") or []
            options["aot_inductor.custom_op_libs"] = [*given, *libraries]
            files = aot_compile(module, args, dict(kwargs), options=options)
    except Exception as error:  # compilers fail in many ways
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(f"AOTInductor failed: {type(error).__name__}: {reason}") from error
    return [Path(file) for file in files if isinstance(file, str) and file]


@contextmanager
def _linking() -> Iterator[list[str]]:
    """Shows the linker libraries that it may not find, or find otherwise; yields those to be named to it.

    CUDA's driver may be there as a stub only, or under its versioned name only. C++'s own library must be the
    one that torch uses, also where the compiler would link its static form: the locales of two of them in one
    process do not know each other, and torch's first regular expression would end the process.
    """
    from torch.utils import cpp_extension

    home, named = cpp_extension.CUDA_HOME, []
    with tempfile.TemporaryDirectory(prefix="clsa_") as folder:
        paths = [folder, *filter(None, [os.environ.get("LIBRARY_PATH")])]
        changed = {"LIBRARY_PATH": os.pathsep.join(paths)}
        standard = _loaded(_STANDARD)
        if standard is not None:
            (Path(folder) / _STANDARD).symlink_to(standard)
            named.append(f":{_STANDARD}")
        if torch.cuda.is_available() and home is not None:
            driver = next((path for path in _drivers(Path(home)) if path.exists()), None)
            if driver is not None:
                (Path(folder) / "libcuda.so").symlink_to(driver)
            changed["CUDA_HOME"] = os.environ.get("CUDA_HOME", home)
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            yield named
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _loaded(name: str) -> Path | None:
    """Returns the file that this process has loaded a library from."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None  # no Linux
    files = (Path(line.split(maxsplit=5)[-1]) for line in lines if "/" in line)
    return next((file for file in files if file.name.startswith(name) and file.exists()), None)


def _drivers(home: Path) -> Iterator[Path]:
    """Yields where CUDA's driver library may lie, its stub first: that links for any machine."""
    for folder in ("lib64/stubs", "lib/stubs", "targets/x86_64-linux/lib/stubs"):
        yield home / folder / "libcuda.so"
    for root in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib"):
        yield from (Path(root) / name for name in ("libcuda.so", "libcuda.so.1"))


class Runner:
    """One program's native code, loaded. Running it before its weights are bound is an error, not a crash."""

    def __init__(self, path: str | os.PathLike[str], name: str, device: torch.device) -> None:
        """Loads the program `name` of an archive. Raises PackageError.

        torch reads the archive here: it must have been verified before.
        """
        index = -1 if device.index is None else device.index
        try:
            # Without the locks and events by which threads share a model: CUDA graphs cannot hold them.
            self._loader = torch._C._aoti.AOTIModelPackageLoader(os.fspath(path), name, True, 1, index)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise PackageError(f"the program {name!r} cannot be loaded by this torch: {reason}") from error
        self.name = name
        self._lock = threading.Lock()
        self._kept: Mapping[str, Tensor] = {}
        self._is_bound = not self.constants()

    def constants(self) -> list[str]:
        """Returns the names of the tensors that the program needs besides its inputs."""
        return list(self._loader.get_constant_fqns())

    def metadata(self) -> dict[str, str]:
        """Returns the texts that were kept in the library when it was compiled."""
        return dict(self._loader.get_metadata())

    def specs(self) -> tuple[str, str]:
        """Returns how inputs and outputs are nested, as torch.utils._pytree writes it."""
        inputs, outputs = self._loader.get_call_spec()
        return inputs, outputs

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors that the program needs, without copies. Raises PackageError for a missing one."""
        missing = [name for name in self.constants() if name not in tensors]
        if missing:
            raise PackageError(
                f"the program {self.name!r} needs {len(missing)} more tensors, as {missing[0]!r}"
            )
        wanted = {name: tensors[name] for name in self.constants()}
        if wanted:
            self._loader.load_constants(wanted, False, True, True)
        self._kept, self._is_bound = wanted, True

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Runs the program on flat inputs, which are not checked. Raises PackageError without weights."""
        if not self._is_bound:
            raise PackageError(UNBOUND)
        with self._lock:
            outputs: list[Tensor] = self._loader.boxed_run(list(inputs))
        return outputs
