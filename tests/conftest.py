"""Eight simulated devices, strict dtypes, full float32 products; recorded reference data when it is at hand."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from importlib.metadata import version
from typing import Any

# Most of the tests' time is XLA's. What one process of the session compiled (pytest's workers and every command they
# start) the others find here. It is set before JAX is imported, and the workers inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="hico_tests_xla_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Programs here run once or twice on small arrays: making them fast costs more than it gives. Of what is left of a
# compilation, fusions lowered through MLIR were three quarters: XLA's older emitter does without, where it is still
# there. The TPU compiler reads the flags too and does not know that one; an unknown flag ends the process. Both workers
# have a core each: no program is cut up for several threads. Commands inherit it.
os.environ["XLA_FLAGS"] = " ".join([
    "--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1", os.environ.get("XLA_FLAGS", ""),
]).strip()  # fmt: skip
if version("jaxlib").startswith("0.10.") and importlib.util.find_spec("libtpu") is None:
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false " + os.environ["XLA_FLAGS"]

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


class Golden:
    """Recorded inputs and outputs of the PyTorch reference."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.cases: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text())["cases"]

    def names(self, group: str) -> list[str]:
        """Case names of a group, for example `names("A_tome")`."""
        return [c["name"] for c in self.cases if c["group"] == group]

    def case(self, group: str, name: str) -> dict[str, Any]:
        """The manifest's entry of one case."""
        return next(c for c in self.cases if c["group"] == group and c["name"] == name)

    def tensors(self, file: str) -> dict[str, np.ndarray]:
        """All tensors of one recorded file."""
        from safetensors.numpy import load_file

        return load_file(self.folder / file)

    def json(self, file: str) -> Any:
        return json.loads((self.folder / file).read_text())


@pytest.fixture(scope="session")
def golden() -> Golden:
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("recorded reference data is not beside this checkout (../shared/golden)")
    return Golden(folder)


@pytest.fixture(scope="session")
def videos() -> pathlib.Path:
    folder = SHARED / "videos"
    if not folder.is_dir():
        pytest.skip("sample clips are not beside this checkout (../shared/videos)")
    return folder


def pytest_collection_finish() -> None:
    """What imports and collection made lives as long as the session: the collector need not walk over it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # tracing makes hundreds of thousands of objects, hardly any of them in cycles


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With -v: how far each test that asks `golden_rows.close` was from the recorded numbers."""
    from tests.golden_rows import ERRORS

    if ERRORS and config.get_verbosity() > 0:
        terminalreporter.section("largest error, relative to the largest recorded value")
        for name, error in ERRORS.items():
            terminalreporter.write_line(f"{error:.1e}  {name}")
