"""What `/ready` answers: whether each model could serve a request now, and its instances."""

from __future__ import annotations

from typing import Any

from serving.errors import ServingError
from serving.frontend.served.model import ServedModel, ServedModels


async def readiness(models: ServedModels, name: str | None = None) -> dict[str, Any]:
    """The content of the answer. `name` asks for one model. Raises ModelNotFound.

    Of several models, all must be ready: `models` has the rows of each, and beside it are the
    instances of all.
    """
    model = models.only if name is None else models.find(name)
    if model is not None:
        return await _of_model(model)
    rows = {model.name: await _of_model(model) for model in models}
    missing = [f"{name}: {row['reason']}" for name, row in rows.items() if not row["ready"]]
    first = next(iter(rows.values()))
    return {
        "ready": not missing,
        "reason": "; ".join(missing),
        "topology": first["topology"],
        "model": models.title,
        "policy": first["policy"],
        "missing_roles": sorted({role for row in rows.values() for role in row["missing_roles"]}),
        "instances": [
            {**instance, "model": name}
            for name, row in rows.items()
            for instance in row["instances"]
        ],
        "refused": {key: why for row in rows.values() for key, why in row["refused"].items()},
        "models": rows,
    }


async def _of_model(model: ServedModel) -> dict[str, Any]:
    answers: dict[str, str] = {}
    try:
        is_ready, reason, answers = await model.ready()
    except ServingError as exc:
        is_ready, reason = False, str(exc)
    return {"ready": is_ready, "reason": reason, **model.pipeline.describe(), "answers": answers}
