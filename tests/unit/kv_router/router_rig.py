"""A router with a few instances, prompts, and load reports."""

from random import Random

from serving.config import RouterConfig
from serving.kv_router.router import KvRouter
from serving.load_report import LoadReport
from serving.protocol import BlocksStored, InstanceInfo, KvEventBatch, ModelCard

BLOCK_SIZE = 16
CARD = ModelCard("m", "/tokenizer", 4096, BLOCK_SIZE, "salt", "fp", 0)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def info(instance_id: str, role="agg", epoch: int = 1, card: ModelCard = CARD) -> InstanceInfo:
    return InstanceInfo(instance_id, epoch, role, [], "", card, 1000, 16, 1, "localhost")


def load_report(instance_id: str, queued_tokens: int = 0, active_blocks: int = 0, epoch: int = 1):
    return LoadReport(instance_id, epoch, 1, 0, queued_tokens, active_blocks, 0, 1000)


def make_router(*instances: InstanceInfo, policy="kv", seed=0, clock=None, **options) -> KvRouter:
    config = RouterConfig(policy=policy, **options)
    router = KvRouter(config, rng=Random(seed), clock=clock or Clock())
    for one in instances:
        router.add_instance(one)
    return router


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(50_000) for _ in range(num_tokens)]


def store(router: KvRouter, instance_id: str, token_ids: list[int], seq=1, epoch=1) -> bool:
    hashes = router.hash(token_ids).block_hashes
    return router.on_kv(KvEventBatch(instance_id, epoch, seq, [BlocksStored(None, hashes)]))


def chosen(router: KvRouter, token_ids: list[int], role="agg", **options) -> str:
    with router.route(token_ids, role, request_id="r", **options) as route:
        return route.instance_id
