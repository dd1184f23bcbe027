"""The house rules, read from the source: who may import whom, what stays behind which door, how large a room may be.

Every failure names the file, what it does and the rule. A rule is changed here, on purpose, or not at all.
"""

from __future__ import annotations

import ast
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("hico_jax", "data_pipeline", "configs")
MAX_LINES = 450

_CONTRACT = ("hico_jax.shapes", "hico_jax.batch")
_BRICKS = (
    *_CONTRACT, "hico_jax.kernels", "hico_jax.parallel", "hico_jax.convert.rules",
    "hico_jax.models.layers", "hico_jax.models.attention",
)  # fmt: skip
_TRAINING = (
    *_CONTRACT, "hico_jax.parallel", "hico_jax.config", "hico_jax.losses", "hico_jax.optim", "hico_jax.checkpoint",
    "hico_jax.metrics", "hico_jax.start", "hico_jax.lora",
)  # fmt: skip

# room -> what it may import of ours, besides itself. The longest name that fits a module is its room.
RULES: dict[str, tuple[str, ...]] = {
    "hico_jax.shapes": (),
    "hico_jax.batch": ("hico_jax.shapes",),
    "hico_jax.parallel": ("hico_jax.shapes",),
    "hico_jax.kernels": ("hico_jax.shapes",),
    "hico_jax.convert.rules": (),
    "hico_jax.convert.safetensors_io": (),
    "hico_jax.models": (),
    "hico_jax.models.layers": ("hico_jax.shapes", "hico_jax.kernels", "hico_jax.parallel.sharding"),
    "hico_jax.models.attention": ("hico_jax.shapes", "hico_jax.kernels", "hico_jax.parallel"),
    "hico_jax.models.projector": _BRICKS,
    "hico_jax.models.vision": _BRICKS,
    "hico_jax.models.compress": _BRICKS,
    "hico_jax.models.llm": (*_BRICKS, "hico_jax.models.compress.progressive", "hico_jax.models.compress.sharded"),
    "hico_jax.models.hico": (*_BRICKS, "hico_jax.models.projector", "hico_jax.models.llm.decoder"),
    "hico_jax.registry": ("hico_jax.batch", "hico_jax.models"),
    "hico_jax.losses": (*_CONTRACT, "hico_jax.parallel"),
    "hico_jax.optim": (*_CONTRACT, "hico_jax.losses", "hico_jax.parallel"),
    "hico_jax.metrics": (*_CONTRACT, "hico_jax.parallel", "hico_jax.config"),
    "hico_jax.checkpoint": (*_CONTRACT, "hico_jax.parallel", "hico_jax.config"),
    "hico_jax.config": (
        "hico_jax.registry", "hico_jax.models.hico", "hico_jax.optim", "hico_jax.parallel.mesh",
        "data_pipeline.options",
    ),
    "hico_jax.convert": (
        *_CONTRACT, "hico_jax.config", "hico_jax.registry", "hico_jax.models", "hico_jax.parallel.sharding",
        "hico_jax.checkpoint", "hico_jax.lora", "hico_jax.weights",
    ),
    "hico_jax.weights": (),
    "hico_jax.convert.command": ("hico_jax", "data_pipeline"),
    "hico_jax.generate": (*_CONTRACT, "hico_jax.models", "hico_jax.parallel"),
    "hico_jax.start": (*_TRAINING, "hico_jax.convert.load"),
    "hico_jax.preempt": (),
    "hico_jax.first_batch": ("hico_jax.batch",),
    "hico_jax.overview": (*_TRAINING, "hico_jax.step"),
    "hico_jax.lora": (
        "hico_jax.checkpoint", "hico_jax.optim", "hico_jax.convert.rules", "hico_jax.convert.safetensors_io",
        "hico_jax.models.layers",
    ),
    "hico_jax.quantize": ("hico_jax.kernels.packed", "hico_jax.models.layers"),
    "hico_jax.samples": ("hico_jax.batch", "hico_jax.generate"),
    "hico_jax.step": _TRAINING,
    "hico_jax.train": (
        *_TRAINING, "hico_jax.convert.load", "hico_jax.models.hico", "hico_jax.preempt", "hico_jax.samples",
        "hico_jax.step", "hico_jax.first_batch", "hico_jax.overview", "data_pipeline.loader", "data_pipeline.together",
    ),
    "hico_jax.film": (*_CONTRACT, "hico_jax.models.hico", "hico_jax.generate", "data_pipeline"),
    "hico_jax.serve": ("hico_jax", "data_pipeline"),
    "hico_jax.evals": (
        *_CONTRACT, "hico_jax.parallel", "hico_jax.film", "hico_jax.generate", "hico_jax.ask", "hico_jax.models",
        "hico_jax.quantize", "hico_jax.registry", "hico_jax.report", "hico_jax.options", "hico_jax.weights",
        "data_pipeline",
    ),
    "hico_jax.plan": ("hico_jax", "configs"),
    "hico_jax.report": (),
    "hico_jax.doctor": (),
    "hico_jax.catalog": ("hico_jax.registry", "hico_jax.models.layers", "hico_jax.weights"),
    "hico_jax.data": ("hico_jax.registry", "data_pipeline"),
    "hico_jax.world": ("hico_jax.report.progress", "data_pipeline.world"),
    "hico_jax.ask": ("hico_jax", "data_pipeline"),
    "hico_jax.api": ("hico_jax", "data_pipeline"),
    "hico_jax.demo": ("hico_jax", "data_pipeline", "configs"),
    "hico_jax.options": (),
    "hico_jax.cli": ("hico_jax.options",),  # it names its targets as text, so that help costs nothing
    "hico_jax.__main__": ("hico_jax.cli",),
    "hico_jax.__init__": ("hico_jax.api",),  # inside `load`, so that importing the package stays free
    "data_pipeline": _CONTRACT,
    # Only the demo, a user like any other, asks where the configurations are.
    "configs": ("hico_jax.config", "hico_jax.registry", "hico_jax.batch"),
}  # fmt: skip

NNX_DOOR = {"Module", "Param", "Variable", "Rngs", "List", "split", "merge", "state", "to_pure_dict", "eval_shape"}
NNX_TYPES = {"State"}  # named in annotations only
FORBIDDEN = {"torch", "tensorflow", "keras", "transformers", "decord", "cv2", "flax.linen"}

# The way of a video to an answer; each file's docstring names the next.
MAIN_PATH = (
    "data_pipeline/video.py",
    "data_pipeline/chat.py",
    "data_pipeline/layout.py",
    "hico_jax/batch.py",
    "hico_jax/models/hico.py",
    "hico_jax/models/vision/umt.py",
    "hico_jax/models/compress/tome.py",
    "hico_jax/models/projector.py",
    "hico_jax/models/llm/qwen2.py",
    "hico_jax/models/llm/decoder.py",
    "hico_jax/models/compress/progressive.py",
    "hico_jax/generate.py",
)

# Source files without a test module of the mirrored name, and what tests them.
TESTED_ELSEWHERE = {
    "hico_jax/cli.py": "tests/test_cli.py",
    "hico_jax/options.py": "tests/test_cli.py",
    "hico_jax/__main__.py": "tests/test_cli.py",
    "hico_jax/shapes.py": "tests/test_architecture.py",
    "hico_jax/preempt.py": "tests/hico_jax/test_train.py",
    "hico_jax/samples.py": "tests/hico_jax/test_train.py",
    "hico_jax/step.py": "tests/hico_jax/test_train.py",
    "hico_jax/data.py": "tests/data_pipeline/test_check.py",
    "data_pipeline/cache.py": "tests/data_pipeline/test_loader.py",
    "data_pipeline/prepare.py": "tests/data_pipeline/test_records.py",
    "hico_jax/models/vision/patches.py": "tests/hico_jax/models/vision/test_umt.py",
    "hico_jax/serve/prompts.py": "tests/hico_jax/serve/test_session.py",
    "hico_jax/serve/saved.py": "tests/hico_jax/serve/test_session.py",
    "hico_jax/serve/pool.py": "tests/hico_jax/serve/test_engine.py",
    "hico_jax/serve/programs.py": "tests/hico_jax/serve/test_warming.py",
    "hico_jax/serve/protocol.py": "tests/hico_jax/serve/test_app.py",
    "hico_jax/serve/bodies.py": "tests/hico_jax/serve/test_app.py",
    "hico_jax/serve/replies.py": "tests/hico_jax/serve/test_app.py",
    "hico_jax/serve/meters.py": "tests/hico_jax/serve/test_app.py",
    "hico_jax/serve/timed.py": "tests/hico_jax/serve/test_app.py",
    "hico_jax/serve/sampling.py": "tests/hico_jax/serve/test_engine.py",
    "hico_jax/report/style.py": "tests/hico_jax/report/test_page.py",
}


def sources(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, wherever in it; `from a import b` gives `a.b`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def room_of(module: str) -> str | None:
    """The longest key of RULES that fits. A package's own `__init__` belongs to the package."""
    module = module if module == "hico_jax.__init__" else module.removesuffix(".__init__")
    return max((room for room in RULES if within(module, room)), key=len, default=None)


def violations(path: pathlib.Path) -> Iterator[str]:
    module = module_of(path)
    room = room_of(module)
    if room is None:
        yield f"{name_of(path)} has no room: give {module} a line in RULES"
        return
    for line, name in imports(path):
        if not any(within(name, package) for package in PACKAGES) or name == "hico_jax.__version__":
            continue
        if not any(within(name, allowed) for allowed in (room, *RULES[room])):
            allowed = ", ".join(RULES[room]) or "nothing of ours"
            yield f"{name_of(path)}:{line} imports {name}; {room} may import {allowed}"


def test_imports_go_one_way() -> None:
    assert [v for path in sources(*PACKAGES) for v in violations(path)] == []


def test_no_module_needs_itself() -> None:
    modules = {module_of(path).removesuffix(".__init__"): path for path in sources(*PACKAGES)}

    def needs(module: str) -> set[str]:
        found = set()
        for _, name in imports(modules[module]):
            needed = name if name in modules else name.rsplit(".", 1)[0]
            found |= {needed} & modules.keys() - {module}
        return found

    graph = {module: needs(module) for module in modules}
    while ready := [m for m in graph if not graph[m] & graph.keys()]:
        for module in ready:
            del graph[module]
    assert sorted(graph) == [], f"these modules import each other in a circle (or depend on one): {sorted(graph)}"


def test_what_must_not_be_imported_is_imported_nowhere() -> None:
    found = [
        f"{name_of(path)}:{line} imports {name}"
        for path in sources(*PACKAGES, "tests", "benchmarks")
        for line, name in imports(path)
        if any(within(name, bad) for bad in FORBIDDEN)
    ]
    assert found == [], f"{sorted(FORBIDDEN)} are not among our requirements"


def nnx_names(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    for line, name in imports(path):
        if within(name, "flax.nnx") and name != "flax.nnx":
            yield line, name.split(".")[2]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nnx", "flax.nnx"):
            yield node.lineno, node.attr


def test_flax_nnx_is_used_through_its_narrow_door() -> None:
    found = [
        f"{name_of(path)}:{line} uses nnx.{name}"
        for path in sources(*PACKAGES, "tests", "benchmarks")
        for line, name in nnx_names(path)
        if name not in NNX_DOOR | NNX_TYPES
    ]
    assert found == [], f"only nnx.{', '.join(sorted(NNX_DOOR | NNX_TYPES))} are used; transformations are plain JAX"


def test_only_parallel_knows_partition_specs() -> None:
    found = [
        f"{name_of(path)}:{node.lineno} names PartitionSpec"
        for path in sources(*PACKAGES)
        if not within(module_of(path), "hico_jax.parallel")
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.alias) and node.name in ("PartitionSpec", "P"))
        or (isinstance(node, ast.Attribute) and node.attr == "PartitionSpec")
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("jax.P", "sharding.P", "jax.sharding.P"))
    ]
    assert found == [], "models name logical axes; the mesh is known in hico_jax/parallel only"


def test_no_file_is_too_long_to_hold() -> None:
    files = sources(*PACKAGES, "tests", "benchmarks")
    lengths = {name_of(path): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_every_module_has_its_test_module() -> None:
    missing = []
    for path in sources("hico_jax", "data_pipeline"):
        name = name_of(path)
        if path.name == "__init__.py" or name in TESTED_ELSEWHERE:
            continue
        folder = ROOT / "tests" / path.relative_to(ROOT).parent
        if not [*folder.glob(f"test_{path.stem}.py"), *folder.glob(f"test_{path.stem}_*.py")]:
            missing.append(f"{name} has no {name_of(folder)}/test_{path.stem}.py")
    assert missing == []


def test_what_is_tested_elsewhere_is() -> None:
    named = [name for pair in TESTED_ELSEWHERE.items() for name in pair]
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(("name", "following"), list(itertools.pairwise(MAIN_PATH)))
def test_the_main_path_leads_from_a_video_to_an_answer(name: str, following: str) -> None:
    doc = ast.get_docstring(tree_of(ROOT / name)) or ""
    found = re.findall(r"^Next: (\S+?)\.?$", doc.replace("`", ""), re.MULTILINE)
    assert found == [following], f"the docstring of {name} should end with `Next: {following}`; it has {found}"


def test_the_rules_are_alive() -> None:
    """A rule for a room that is gone is removed with it."""
    modules = [module_of(path) for path in sources(*PACKAGES)]
    assert [room for room in RULES if not any(within(module, room) for module in modules)] == []
