"""Downloads from a real HTTP server that speaks the hub's API, and everything that goes wrong."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session
from integration.hub_server import COMMIT, OTHER_COMMIT, Hub, serving
from serving.config import ModelConfig
from serving.deploy.model.hub import fetch_from_hub
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import ModelManifest, load_model
from serving.errors import ModelError

pytestmark = pytest.mark.integration

WEIGHTS = os.urandom(3_000_000)
CONFIG = b'{"model_type": "llama"}\n'


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {
        "config.json": CONFIG,
        "tokenizer.json": b"{}\n",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"never fetched",
        "README.md": b"never fetched",
        "onnx/model.onnx": b"never fetched",
    }
    hub = Hub(files={COMMIT: files})
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        close_session()  # the library keeps one client, and with it the proxies it saw first
        yield hub
        close_session()


def fetch(folder: Path, lines: list[str] | None = None, **config: object) -> ModelManifest:
    model = ModelConfig(id="org/tiny", **config)  # type: ignore[arg-type]
    return fetch_model(model, folder, report=[].append if lines is None else lines.append)


def fetch_quickly(folder: Path) -> None:
    """Straight to the hub part, which lets a test not wait between attempts."""
    fetch_from_hub(
        ModelConfig(id="org/tiny"), folder / "files", report=[].append, retry_after_s=0.01
    )


def test_download_fetches_only_needed_files_and_records_the_commit(
    hub: Hub, tmp_path: Path
) -> None:
    lines: list[str] = []
    manifest = fetch(tmp_path, lines)
    names = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == names
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == WEIGHTS
    assert (manifest.source, manifest.revision, manifest.commit) == ("hub", None, COMMIT)
    assert manifest == load_model(tmp_path / "model.json")
    assert any("model.safetensors: 100% of 3 MB" in line for line in lines)


def test_shards_are_those_that_the_index_names(hub: Hub, tmp_path: Path) -> None:
    files = hub.files[COMMIT]
    shard = "model.safetensors-00001-of-00001.safetensors"
    index = "model.safetensors.index.json"
    files[shard] = files.pop("model.safetensors")
    files[index] = json.dumps({"weight_map": {"weight": shard}}).encode()
    fetch(tmp_path)
    assert {shard, index} <= {path.name for path in (tmp_path / "files").iterdir()}
    assert len(hub.fetched(index)) == 1


def test_second_download_transfers_nothing(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path)
    hub.requests.clear()
    fetch(tmp_path)
    assert not any("resolve" in path for _, path, _ in hub.requests)


def test_another_revision_replaces_every_file(hub: Hub, tmp_path: Path) -> None:
    hub.revisions["v2"] = OTHER_COMMIT
    small = {"config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors": b"smaller"}
    hub.files[OTHER_COMMIT] = small
    fetch(tmp_path)
    manifest = fetch(tmp_path, revision="v2")
    assert (manifest.revision, manifest.commit) == ("v2", OTHER_COMMIT)
    names = sorted(path.name for path in (tmp_path / "files").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == b"smaller"


def test_dropped_connection_continues_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.break_after, hub.breaks = {"model.safetensors": 1_200_000}, 1
    fetch_quickly(tmp_path)
    assert hub.fetched("model.safetensors") == [None, "bytes=1200000-"]
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == WEIGHTS


def test_interrupted_download_resumes_on_the_next_run(hub: Hub, tmp_path: Path) -> None:
    hub.break_after, hub.breaks = {"model.safetensors": 1_200_000}, 10
    hub.ignore_ranges = True  # so that every attempt breaks at the same place
    with pytest.raises(ModelError, match=r"stopped at 1\.2 MB of 3 MB") as failure:
        fetch_quickly(tmp_path)
    assert "continues from there" in failure.value.remedy
    assert not (tmp_path / "files" / "model.safetensors").exists()
    assert not (tmp_path / "model.json").exists()
    hub.ignore_ranges, hub.breaks = False, 0
    hub.requests.clear()
    lines: list[str] = []
    fetch(tmp_path, lines)
    assert hub.fetched("model.safetensors") == ["bytes=1200000-"]
    assert "arrived earlier" in lines[0]
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == WEIGHTS
    assert not list((tmp_path / "files").glob(".*.partial"))


def test_server_that_ignores_ranges_starts_the_file_over(hub: Hub, tmp_path: Path) -> None:
    hub.break_after, hub.breaks = {"model.safetensors": 1_200_000}, 1
    hub.ignore_ranges = True
    fetch_quickly(tmp_path)
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_file_with_a_wrong_checksum_is_removed_and_reported(
    hub: Hub, tmp_path: Path, name: str
) -> None:
    hub.corrupt = {name}
    with pytest.raises(ModelError, match=f"{name} arrived with a wrong checksum"):
        fetch(tmp_path)
    assert not list((tmp_path / "files").glob(f"*{name}*"))
    hub.corrupt = set()
    fetch(tmp_path)
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == WEIGHTS


def test_file_damaged_on_disk_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path)
    (tmp_path / "files" / "model.safetensors").write_bytes(b"\0" * len(WEIGHTS))
    fetch(tmp_path)
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == WEIGHTS


def test_missing_model_without_token_names_both_causes(hub: Hub, tmp_path: Path) -> None:
    hub.model_id = "org/other"
    with pytest.raises(ModelError, match=r"no org/tiny .* or it is private and HF_TOKEN is not"):
        fetch(tmp_path)


def test_missing_model_with_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.model_id, hub.token = "org/other", "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(ModelError, match=r"no org/tiny .*HF_TOKEN has no access"):
        fetch(tmp_path)


def test_missing_revision_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no revision 'v9'"):
        fetch(tmp_path, revision="v9")


def test_invalid_token_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "stale")
    with pytest.raises(ModelError, match=r"refuses HF_TOKEN .*401"):
        fetch(tmp_path)


@pytest.mark.parametrize("token", [None, "secret"])
def test_gated_model_names_the_page_that_grants_access(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    hub.gated, hub.token = True, token
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelError, match="gated") as failure:
        fetch(tmp_path)
    assert f"{hub.url}/org/tiny" in failure.value.remedy
    assert "HF_TOKEN" in failure.value.remedy


def test_token_is_sent_and_written_nowhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_verysecret"
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    lines: list[str] = []
    fetch(tmp_path, lines)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hf_verysecret" in content for content in written)
    assert not any("hf_verysecret" in line for line in lines)


def test_unreachable_hub_names_the_endpoint(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:  # bound, not listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(ModelError, match=f"cannot reach {url}") as failure:
            fetch(tmp_path)
    assert "HF_ENDPOINT" in failure.value.remedy


def test_offline_mode_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids"):
        fetch(tmp_path)
    assert not hub.requests


def test_full_disk_is_noticed_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.pretend_size["model.safetensors"] = 10**18
    with pytest.raises(ModelError, match=r"needs 1e\+06 TB .* free"):
        fetch(tmp_path)
    assert not any("resolve" in path for _, path, _ in hub.requests)


def test_pickle_is_refused_unless_allowed(hub: Hub, tmp_path: Path) -> None:
    del hub.files[COMMIT]["model.safetensors"]
    with pytest.raises(ModelError, match="can run code") as failure:
        fetch(tmp_path)
    assert "allow_pickle" in failure.value.remedy
    manifest = fetch(tmp_path, allow_pickle=True)
    assert manifest.format == "pickle"
    assert "pytorch_model.bin" in [file.path for file in manifest.files]


def test_index_must_list_only_shards_that_exist(hub: Hub, tmp_path: Path) -> None:
    del hub.files[COMMIT]["model.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    hub.files[COMMIT] |= {
        "model.safetensors.index.json": json.dumps(index).encode(),
        shards[0]: b"first",
    }
    with pytest.raises(ModelError, match=f"1 missing files: {shards[1]}"):
        fetch(tmp_path)
    hub.files[COMMIT][shards[1]] = b"second"
    assert {*shards, "model.safetensors.index.json"} <= {f.path for f in fetch(tmp_path).files}


def test_endpoint_that_is_no_model_hub_is_recognised(hub: Hub, tmp_path: Path) -> None:
    hub.instead_of_listing = {"id": "x"}
    with pytest.raises(ModelError, match="does not answer like a model hub"):
        fetch(tmp_path)
