"""Models whose LM head is not read: a checkpoint may lack it, and a model in memory may be the base model alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qeff_ir.frontend.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qeff_ir.frontend.checkpoint.weights import Weights


def with_head(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The model, or, for a base model, the class of a task around it; its head has the weight of the embeddings."""
    from qeff_ir.frontend.checkpoint.skeleton import empty_model

    if model.get_output_embeddings() is not None:
        return model
    made = empty_model(model.config, auto=task.auto_class())
    setattr(made, made.base_model_prefix, model)
    head, table = made.get_output_embeddings(), model.get_input_embeddings()
    if head is not None:
        head.weight = table.weight
    return made


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The base model of one with an LM head, whose hidden states are pooled; any other model as it is."""
    read, base = getattr(model, "get_output_embeddings", None), getattr(model, "base_model", model)
    return model if read is None or read() is None else base


def fill_head(model: PreTrainedModel, weights: Weights) -> Weights:
    """The weights, with those of the embeddings in the place of an LM head that a checkpoint lacks.

    Both have the same shape, so that the model can be traced; a pass drops the head.
    """
    modules: dict[Any, str] = {module: name for name, module in model.named_modules()}
    head, table = (
        f"{modules.get(module)}.weight" for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    return weights if head in weights or table not in weights else {**weights, head: weights[table]}
