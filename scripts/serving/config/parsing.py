"""From the YAML a person wrote to a checked `Config`.

Reading is strict: an unknown key is an error that names the nearest known one. This module knows
no processes and no paths beyond those in the YAML.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec
import msgspec.inspect
from msgspec import Struct

from serving.config.cluster import ClusterConfig, NetworkConfig, SlurmConfig
from serving.config.control import EtcdConfig, NatsConfig, check_ports
from serving.config.deployment import ContainerConfig, DeploymentConfig
from serving.config.engine import EngineConfig, MockConfig, TensorRtLlmConfig, check_engine
from serving.config.frontend import DeadlinesConfig, FrontendConfig, check_tls
from serving.config.kv_transfer import KvTransferConfig, check_transport
from serving.config.model import ModelConfig, check_tokenizer
from serving.config.router import RouterConfig
from serving.config.workers import WorkersConfig, check_workers
from serving.config.workload import BenchConfig, PlanConfig
from serving.errors import ConfigError
from serving.protocol import Role

_DOTTED = re.compile(r"[.-]")
_UNKNOWN = re.compile(r"unknown field `(.+?)`(?: - at `\$\.?(.*?)`)?$")
_UNKNOWN_ROLE = re.compile(r"^Invalid enum value '(.+?)' - at `key` in `\$\.(.+?)`$")
_INVALID = re.compile(r"^(.*?)(?: - at `\$\.?(.*?)`)?$", re.DOTALL)


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything in `config/config.yaml`."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    tensorrt_llm: TensorRtLlmConfig = TensorRtLlmConfig()
    mock: MockConfig = MockConfig()
    router: RouterConfig = RouterConfig()
    frontend: FrontendConfig = FrontendConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    kv_transfer: KvTransferConfig = KvTransferConfig()
    etcd: EtcdConfig = EtcdConfig()
    nats: NatsConfig = NatsConfig()
    network: NetworkConfig = NetworkConfig()
    cluster: ClusterConfig = ClusterConfig()
    slurm: SlurmConfig = SlurmConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    container: ContainerConfig = ContainerConfig()
    plan: PlanConfig = PlanConfig()
    bench: BenchConfig = BenchConfig()


def parse(raw: Mapping[str, Any]) -> Config:
    """Check the content of the YAML and give it types.

    Raises ConfigError that names the key and the remedy: unknown key, wrong type, value out of
    range, settings that contradict each other.
    """
    raw = nest(raw)
    try:
        # Not strict: nested values given by `--config section='{key: 1}'` reach us as strings.
        config = msgspec.convert(raw, Config, strict=False)
    except msgspec.ValidationError as exc:
        raise _explain(str(exc), raw) from None
    if config.engine.backend == "mock":  # it needs a model's shape and tokenizer, never its weights
        engine = msgspec.structs.replace(config.engine, weights="dummy")
        config = msgspec.structs.replace(config, engine=engine)
    _check(config)
    return config


def _check(config: Config) -> None:
    check_ports(
        {
            "frontend.port": config.frontend.port,
            "etcd.port": config.etcd.port,
            "etcd.peer_port": config.etcd.peer_port,
            "nats.port": config.nats.port,
        }
    )
    check_tls(config.frontend)
    check_transport(config.kv_transfer.transport, config.engine.backend)
    check_workers(config.workers, config.engine)
    check_engine(config.engine)
    check_tokenizer(config.model, config.engine.weights)


def nest(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`--config router-policy=x` means `{"router": {"policy": x}}`; so does a dotted key in YAML.

    Snakemake refuses dots in `--config` keys, hence the dash; no section has one in its name.
    """
    for key in raw:
        if not isinstance(key, str):
            raise ConfigError(
                str(key), "is no section", remedy="a section is a word, such as `router`"
            )
    nested = {
        k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items() if not _DOTTED.search(k)
    }
    for dotted, value in raw.items():
        if _DOTTED.search(dotted):
            section, key = _DOTTED.split(dotted, maxsplit=1)
            target = nested.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    section, "must be a section with keys", remedy="see config/README.md"
                )
            target[key] = value
    return {k: v for k, v in nested.items() if v is not None}


def as_plain(config: Config) -> dict[str, Any]:
    """Plain data again, for files and for Snakemake."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return plain


def _explain(message: str, raw: Mapping[str, Any]) -> ConfigError:
    if match := _UNKNOWN.search(message):
        key, section = match.group(1), match.group(2) or ""
        owner: Any = Config
        if section:
            owner = {f.name: f.type for f in msgspec.structs.fields(Config)}[section]
        return _no_such_key(section, key, [f.name for f in msgspec.structs.fields(owner)])
    if match := _UNKNOWN_ROLE.search(message):
        return _no_such_key(match.group(2), match.group(1), list(get_args(Role)))
    match = _INVALID.match(message)
    problem, key = (match.group(1), match.group(2) or "") if match else (message, "")
    if " - at `key` in `$." in message:
        key = message.rpartition("`$.")[2].rstrip("`")
        return ConfigError(
            key, "has a key that is no word", remedy="put keys that are numbers into quotes"
        )
    path = [part for part in re.split(r"[.\[\]]+", key) if part and part != "..."]
    value: Any = raw
    for part in path:  # msgspec does not say which value of a map it refused
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit():
            value = value[int(part)]
    problem = problem[:1].lower() + problem[1:]
    return ConfigError(
        key.removesuffix("[...]"),
        f"{_in_words_of_yaml(problem)}, got {value!r}",
        remedy=_remedy(path, value, problem),
    )


def _in_words_of_yaml(problem: str) -> str:
    for theirs, ours in (("`object`", "a section with keys"), ("`array`", "a list")):
        problem = problem.replace(theirs, ours)
    return re.sub(r"invalid enum value '.*'", "no such choice", problem)


def _remedy(path: Sequence[str], value: Any, problem: str) -> str:
    """What to write instead: a choice, a list, a section, quotes."""
    if choices := _choices(path):
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        return f"{hint}choose one of: {', '.join(choices)}"
    if "`str" in problem and isinstance(value, bool | int | float):
        return "put it into quotes: YAML reads it as a number, or as yes or no"
    if "expected `array`" in problem:
        return f"write a list: [{value}]"
    if "expected `object`" in problem:
        return "write its keys below it, indented by two spaces; config/README.md lists them"
    return "config/README.md lists the values it takes"


def _choices(path: Sequence[str]) -> list[str]:
    """The words that the key at `path` takes; empty when it takes others, too."""
    kind: Any = msgspec.inspect.type_info(Config)
    for part in path:
        if isinstance(kind, msgspec.inspect.StructType):
            fields = {field.encode_name: field.type for field in kind.fields}
            kind = _bare(fields.get(part))
        elif isinstance(kind, msgspec.inspect.DictType):
            kind = _bare(kind.value_type)
        elif isinstance(kind, msgspec.inspect.CollectionType):
            kind = _bare(kind.item_type)
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    others = [
        each
        for each in kinds
        if not isinstance(each, msgspec.inspect.LiteralType | msgspec.inspect.NoneType)
    ]
    words = [
        str(value)
        for each in kinds
        if isinstance(each, msgspec.inspect.LiteralType)
        for value in each.values
    ]
    return [] if others else words


def _bare(kind: Any) -> Any:
    """A type without its description and bounds."""
    while isinstance(kind, msgspec.inspect.Metadata):
        kind = kind.type
    return kind


def _no_such_key(section: str, key: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    dotted = f"{section}.{key}" if section else key
    return ConfigError(dotted, "no such key", remedy=f"{hint}known here: {', '.join(known)}")
