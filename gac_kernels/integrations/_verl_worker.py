"""What an optimizer step of verl's needs around the hybrid loss: the counts, the controller, and its state kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from ..config import ConstantPrior, ControllerConfig, CosinePrior, KLTarget
from ..controller import GuidedAdaptiveController
from ._verl_hybrid import count_branches, device_of_ranks, hybrid_loss, settings_of
from ._verl_loss import check_version


def controller_config(settings: Mapping[str, Any] | None) -> ControllerConfig:
    """``policy_loss.controller`` of a YAML file as a ControllerConfig: its fields, ``prior`` a number, a mapping of
    CosinePrior's fields, or null."""
    fields = dict(settings or {})
    prior = fields.get("prior", CosinePrior())
    if isinstance(prior, (int, float)) and not isinstance(prior, bool):
        fields["prior"] = ConstantPrior(float(prior))
    elif isinstance(prior, Mapping):  # a DictConfig too
        fields["prior"] = CosinePrior(**prior)
    return ControllerConfig(**fields)


def attach(worker: Any, controller: GuidedAdaptiveController | None = None) -> GuidedAdaptiveController | None:
    """Give a ``TrainingWorker`` that holds ``ppo_loss`` the hybrid loss, in the worker's own process.

    Its engine's ``train_batch`` is one optimizer step: the branches are counted before it and the controller takes its
    step after it. The controller's state goes into the engine's checkpoints, one file a rank.

    Args:
        worker: its ``loss_fn`` is ``partial(..., config=ActorConfig)``, as verl's ActorRolloutRefWorker sets it.
        controller: None makes one from ``policy_loss.controller``, on the engine's ranks; or none at all where
            ``policy_loss.mu`` is a number.

    Returns:
        The controller, or None with a fixed mu.
    """
    from verl.utils import tensordict_utils as tu

    config = getattr(worker.loss_fn, "keywords", {}).get("config")
    settings, engine = settings_of(config), worker.engine
    if controller is not None and settings.mu is not None:
        raise ValueError("controller and policy_loss.mu exclude each other, got both")
    if controller is None and settings.mu is None:
        controller = GuidedAdaptiveController(
            controller_config(settings.controller),
            device=device_of_ranks(),
            process_group=engine.get_data_parallel_group(),
        )
    if controller is not None:
        if controller.config.estimator == "hidden":
            raise ValueError("controller's estimator must be 'coefficient' or 'logit' in verl, got 'hidden'")
        if isinstance(controller.config.alpha, KLTarget):
            raise ValueError("controller's alpha must be a number in verl, got a KLTarget, which is not supported here")
    worker.loss_fn = partial(hybrid_loss, config=config, controller=controller)
    train_batch = engine.train_batch

    def one_step(data: Any, loss_function: Any) -> Any:
        count_branches(data, engine.get_data_parallel_group(), settings.expert_key)
        if controller is not None and controller.config.estimator == "logit":
            tu.assign_non_tensor(data, calculate_sum_pi_squared=True)
        outputs = train_batch(data, loss_function)
        if controller is not None:
            controller.step()
            _report(controller, outputs)
        return outputs

    engine.train_batch = one_step
    if controller is not None:
        _keep_state(engine, controller)
    return controller


def patch_worker() -> None:
    """Have verl's ActorRolloutRefWorker call :func:`attach` where ``policy_loss.hybrid`` is set, in this process.

    To be done in the driver and in every worker before the model is built, which
    ``VERL_USE_EXTERNAL_MODULES=gac_kernels.integrations.verl_hybrid`` does. Again is harmless.

    Raises:
        ImportError: verl is missing or of a version whose hooks are not known.
    """
    check_version()
    from verl.workers.engine_workers import ActorRolloutRefWorker

    original = ActorRolloutRefWorker.init_model
    if getattr(original, "of_gac_kernels", False):
        return

    @wraps(original)  # and what verl's driver reads off its workers' methods
    def init_model(self: Any) -> Any:
        result = original(self)
        config = None if self.actor is None else getattr(self.actor.loss_fn, "keywords", {}).get("config")
        if getattr(getattr(config, "policy_loss", None), "hybrid", False):
            attach(self.actor)
        return result

    init_model.of_gac_kernels = True  # type: ignore[attr-defined]
    ActorRolloutRefWorker.init_model = init_model


def _report(controller: GuidedAdaptiveController, outputs: Any) -> None:
    """The controller's numbers among the step's metrics, one value as of one micro-batch; mu is there already."""
    if not outputs.get("metrics"):
        return
    metrics = {name: value for name, value in controller.metrics().items() if name != "gac/mu"}
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    outputs["metrics"].update({name: [value] for name, value in zip(metrics, values, strict=True)})


def _keep_state(engine: Any, controller: GuidedAdaptiveController) -> None:
    """Save and load the controller where the engine saves and loads."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def path_in(folder: Any) -> Path:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return Path(folder) / f"gac_controller_rank_{rank}.pt"

    def save_checkpoint(local_path: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(local_path, *args, **kwargs)
        path = path_in(local_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        torch.save(controller.state_dict(), temporary)
        os.replace(temporary, path)  # whole or not at all
        return result

    def load_checkpoint(local_path: Any, *args: Any, **kwargs: Any) -> Any:
        path = None if local_path is None else path_in(local_path)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"expected {path.name} in {local_path}: the controller's state, for this rank")
        state = None if path is None else torch.load(path, map_location="cpu", weights_only=True)
        result = load(local_path, *args, **kwargs)  # may delete the folder
        if state is not None:
            controller.load_state_dict(state)
        return result

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
