"""New code restarts the programs that use it, and no others."""

from typing import Any

from serving.deploy.planning.source_digest import source_digest
from unit.deploy.resolved import CODE


def test_source_digest_ignores_modules_that_the_program_does_not_import(tmp_path: Any) -> None:
    for name in ("rpc.py", "worker/decode.py", "frontend/app.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    before = {name: source_digest(name, tmp_path) for name in CODE}
    (tmp_path / "frontend/app.py").write_text("2")
    after = {name: source_digest(name, tmp_path) for name in CODE}
    assert after["worker"] == before["worker"]
    assert after["frontend"] != before["frontend"]
    (tmp_path / "rpc.py").write_text("2")
    assert source_digest("worker", tmp_path) != before["worker"]
