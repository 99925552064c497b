"""The one-way import rule: what may know what."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "scripts" / "serving"

# From the top down. Units of one layer do not import each other; only the bottom layer's do.
LAYERS = [
    {"frontend", "worker", "deploy", "simulate"},
    {"kv_router", "kv_transfer", "engine", "discovery", "events", "rpc", "text"},
    {"block_hash", "kv_layout", "grammar"},
    {
        "protocol",
        "framing",
        "load_report",
        "config",
        "model_folder",
        "progress",
        "restarts",
        "console",
        "log_lines",
        "gpus",
        "host_cpus",
        "host_memory",
        "errors",
    },
]
LAYER_OF = {unit: depth for depth, units in enumerate(LAYERS) for unit in units}
FORBIDDEN = {("frontend", "engine"), ("frontend", "kv_transfer"), ("worker", "kv_router")}
VENDORS = {
    "ucxx": "kv_transfer/transports/ucx/context.py",
    "nats": "events/connection.py",
    "etcd3aio": "discovery/etcd.py",
    "tensorrt_llm": "engine",
    "llguidance": "grammar/",  # the folder
    "pynvml": "gpus",
}
INPUT_OUTPUT = {"asyncio", "socket", "subprocess", "httpx", "threading", "ssl", "selectors"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "serving":
                names |= {f"serving.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and any(map(_is_import_module, (node.func, *node.args))):
            names |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def _is_import_module(node: ast.expr) -> bool:
    return "import_module" in (getattr(node, "attr", ""), getattr(node, "id", ""))


@cache
def edges() -> set[tuple[str, str, str]]:
    """(file, its unit, unit it imports) for every import inside the package."""
    found = set()
    for path in modules():
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "serving" and len(parts) > 1:
                found.add((str(relative), own, parts[1]))
    return found


def test_every_module_has_a_place_in_the_layers() -> None:
    units = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in modules()}
    assert units - {"__init__"} <= set(LAYER_OF)


def test_imports_point_down_only() -> None:
    bottom = len(LAYERS) - 1
    wrong = [
        f"{path}: {own} imports {other}"
        for path, own, other in sorted(edges())
        if own != other
        and not LAYER_OF[own] < LAYER_OF[other]
        and not LAYER_OF[own] == LAYER_OF[other] == bottom
    ]
    assert not wrong


def test_frontend_and_worker_keep_out_of_each_others_business() -> None:
    assert not {(own, other) for _, own, other in edges()} & FORBIDDEN


def test_bottom_layer_has_no_cycle() -> None:
    graph = {(own, other) for _, own, other in edges() if {own, other} <= LAYERS[-1]}
    assert not {(a, b) for a, b in graph if a != b and (b, a) in graph}


@pytest.mark.parametrize(("vendor", "home"), VENDORS.items())
def test_vendor_library_appears_in_one_module_or_in_its_own_folder(vendor: str, home: str) -> None:
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if any(name.split(".")[0] == vendor for name in imported(path))
    ]
    assert len(users) == 1 or home.endswith("/"), users
    assert users
    assert all(user.startswith(home) for user in users), users


def test_only_the_torch_engine_knows_torch() -> None:
    users = {
        str(path.relative_to(PACKAGE).parent)
        for path in modules()
        if {"torch", "transformers"} & {name.split(".")[0] for name in imported(path)}
    }
    assert {user for user in users if not user.startswith("engine/torch")} == set()


def test_the_core_of_the_engines_knows_no_tensors_and_no_engine() -> None:
    """Torch, mock and the simulator share it."""
    tensors = {"torch", "transformers", "triton", "numpy"}
    for path in (PACKAGE / "engine" / "core").glob("*.py"):
        names = imported(path)
        assert not {name.split(".")[0] for name in names} & tensors, path
        engine = {name for name in names if name.startswith("serving.engine.")}
        assert {name for name in engine if not name.startswith("serving.engine.core.")} <= {
            "serving.engine.base"
        }, path


def test_router_does_no_input_or_output() -> None:
    for path in (PACKAGE / "kv_router").glob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & INPUT_OUTPUT, path


def test_package_never_imports_the_workflow() -> None:
    rule_scripts = {path.stem for path in PACKAGE.parent.glob("*.py")}
    for path in modules():
        assert not {name.split(".")[0] for name in imported(path)} & (rule_scripts), path
