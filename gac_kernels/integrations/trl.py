"""TRL's GRPOTrainer with our head, and with demonstrations mixed in by a controller; its SFTTrainer with our losses.

    attach(trainer)                                   TRL's own losses, their log-probs and entropies from our head
    attach(trainer, demonstrations="demonstration")   and (1 - mu) RL + mu SFT, mu set by GAC
    attach_sft(sft_trainer, objective=NLL("phi"))     or GIFT: supervised losses from hidden states

``GACGRPOTrainer`` takes attach()'s arguments in its constructor, for those who subclass. None of them changes TRL
outside this one trainer, except while it runs a forward pass.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..controller import GuidedAdaptiveController, KLTarget
from ..objectives import HybridObjective
from ..types import SCALARS, HybridLoss
from . import _trl_head, _trl_loss, _trl_metrics
from ._trl_loss import COUNT, IDS, MASK
from ._trl_sft import SFTAttachment, attach_sft

__all__ = ["STATE_FILE", "Attachment", "GACGRPOTrainer", "SFTAttachment", "attach", "attach_sft"]  # noqa: F822

STATE_FILE = "gac_controller.pt"  # in TRL's checkpoint directory
_SUMMED = ("policy_loss", "supervised_loss")  # over micro-batches, which divide by the step's counts


def __getattr__(name: str) -> Any:
    if name == "GACGRPOTrainer":
        return _subclass()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _subclass() -> Any:
    _trl_head.check_version()
    from trl import GRPOTrainer

    class GACGRPOTrainer(GRPOTrainer):
        """A GRPOTrainer that is attached from the start: TRL's arguments, and those of :func:`attach`."""

        def __init__(
            self,
            *args: Any,
            head: bool = True,
            demonstrations: str | None = None,
            objective: HybridObjective | None = None,
            controller: GuidedAdaptiveController | None = None,
            mu: float | None = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(*args, **kwargs)
            self.gac = attach(
                self, head=head, demonstrations=demonstrations, objective=objective, controller=controller, mu=mu
            )

    GACGRPOTrainer.__module__, GACGRPOTrainer.__qualname__ = __name__, "GACGRPOTrainer"
    return GACGRPOTrainer


def attach(
    trainer: Any,
    *,
    head: bool = True,
    demonstrations: str | None = None,
    objective: HybridObjective | None = None,
    controller: GuidedAdaptiveController | None = None,
    mu: float | None = None,
) -> Attachment:
    """Plug this package into a trainer that exists and has not trained yet.

    With ``head`` alone TRL computes its own loss, of whatever type. Any other argument replaces it by the hybrid one:
    ``(1 - mu) * policy + mu * supervised``. Of every group of completions the first then brings its prompt's
    demonstration with it, in the same forward pass. Evaluation keeps TRL's own loss.

    The hybrid loss follows ``loss_type`` (all but VESPO), ``importance_sampling_level="sequence"`` with a clipped loss
    (GSPO), ``beta``, ``entropy_coef``, ``top_entropy_quantile``, ``off_policy_mask_threshold``, vLLM's correction and
    the auxiliary loss of a mixture of experts (``router_aux_loss_coef``), which mu does not scale and which balances
    all tokens of the forward pass, demonstrations included. TRL's metrics of the loss stay, of rollouts alone.
    What it does not support raises: images, ``use_adaptive_entropy``, DFPO (its groups are spread over micro-batches),
    GIFT (needs a base model's logits; see :func:`attach_sft`).

    Args:
        trainer: a ``trl.GRPOTrainer``.
        head: whether log-probs and entropies come from :func:`gac_kernels.token_logprobs_from_hidden`.
        demonstrations: the dataset's column of completions to imitate, text without the end token; None or "" where
            a prompt has none.
        objective: what to compute in place of the trainer's ``loss_type``; None takes that and NLL-phi.
        controller: sets mu, one step after each optimizer step; None makes one with its defaults.
        mu: a fixed mixing weight in [0, 1] in place of a controller.

    Returns:
        The attachment, whose ``mu`` and ``controller`` may be read.

    Raises:
        ImportError: TRL is missing or of a version whose hooks are not known.
        TypeError, ValueError: naming the argument or the trainer's option, what was expected and what came.
    """
    _trl_head.check_version()
    from trl import GRPOTrainer

    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(
            f"trainer must be a trl.GRPOTrainer (an SFTTrainer goes to attach_sft), got {type(trainer).__name__}"
        )
    if "_gac" in trainer.__dict__:
        raise ValueError("trainer is attached already: attach() once, with all its arguments")
    if head:
        _trl_head.check_head()
    hybrid = any(value is not None for value in (demonstrations, objective, controller, mu))
    if hybrid:
        objective, controller = _checked(trainer, demonstrations, objective, controller, mu)
    attachment = Attachment(trainer, demonstrations, objective, controller, mu)
    trainer._gac = attachment
    if head:
        trainer._get_per_token_logps_and_entropies = _Hook(trainer._get_per_token_logps_and_entropies)
    if hybrid:
        attachment.hook()
    return attachment


def _checked(
    trainer: Any,
    demonstrations: str | None,
    objective: HybridObjective | None,
    controller: GuidedAdaptiveController | None,
    mu: float | None,
) -> tuple[HybridObjective, GuidedAdaptiveController | None]:
    """The objective and the controller, defaults filled in, once nothing speaks against them."""
    if objective is None:
        objective = _trl_loss.objective_of(trainer)
    elif not isinstance(objective, HybridObjective):
        raise TypeError(f"objective must be a HybridObjective, got {type(objective).__name__}")
    _trl_loss.check_objective(trainer, objective)
    if mu is not None:
        if controller is not None:
            raise ValueError("mu and controller exclude each other, got both")
        if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0 <= mu <= 1:
            raise ValueError(f"mu must be a number in [0, 1], got {mu!r}")
    if demonstrations is None:
        if mu != 0:
            raise ValueError("demonstrations must name a column of the dataset, got None; without any, mu must be 0")
    else:
        columns = getattr(trainer.train_dataset, "column_names", None)
        if columns is not None and demonstrations not in columns:
            raise ValueError(f"demonstrations must be a column of the dataset ({columns}), got {demonstrations!r}")
    if mu is None and controller is None:
        controller = GuidedAdaptiveController(device=trainer.accelerator.device)
    if controller is not None:
        if not isinstance(controller, GuidedAdaptiveController):
            raise TypeError(f"controller must be a GuidedAdaptiveController, got {type(controller).__name__}")
        if controller.config.estimator != "coefficient":
            raise ValueError(
                f"controller's estimator must be 'coefficient' in TRL, which hands over log-probs only; "
                f"got {controller.config.estimator!r}"
            )
        if isinstance(controller.config.alpha, KLTarget):
            raise ValueError("controller's alpha must be a number in TRL, got a KLTarget, which is not supported here")
        device = torch.empty(0, device=trainer.accelerator.device).device  # "cpu:0" by its name on a tensor, "cpu"
        if controller.mu.device != device:
            raise ValueError(f"controller must be on {device}, got {controller.mu.device}")
    return objective, controller


class _Hook:
    """TRL's log-probs with our head below them."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _trl_head.our_head():
            return self.original(*args, **kwargs)


class Attachment:
    """What :func:`attach` put into a trainer.

    Attributes:
        controller: None with a fixed mu. objective: None where TRL's own loss is kept.
    """

    def __init__(
        self,
        trainer: Any,
        demonstrations: str | None,
        objective: HybridObjective | None,
        controller: GuidedAdaptiveController | None,
        mu: float | None,
    ) -> None:
        self.trainer, self.column = trainer, demonstrations
        self.objective, self.controller, self._fixed = objective, controller, mu
        self._parts: list[tuple[HybridLoss, Tensor]] = []

    @property
    def mu(self) -> float | Tensor | None:
        """The weight of the demonstrations in the next step; None where TRL's own loss is kept."""
        return self._fixed if self.controller is None else self.controller.mu

    def hook(self) -> None:
        """Replace the trainer's loss, and what must go with it. TRL calls each of these through the instance."""
        trainer = self.trainer
        self._loss, self._generate = trainer._compute_loss, trainer._generate_and_score_completions
        self._save, self._load = trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler
        trainer._compute_loss, trainer._generate_and_score_completions = self.compute_loss, self.generate
        trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler = self.save, self.load
        trainer.add_callback(_callback(self))

    def generate(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts with the demonstrations beside them, as more ``(B, .)`` tensors that TRL shuffles along."""
        batch: dict[str, Any] = self._generate(inputs)
        if self.column is None or not self.trainer.model.training:
            return batch
        trainer, rows = self.trainer, []
        first_row = trainer.accelerator.process_index * len(inputs)
        for index, example in enumerate(inputs):
            if self.column not in example:
                raise ValueError(
                    f"demonstrations: every example must have the column {self.column!r}, got one with {list(example)}"
                )
            of_group = (first_row + index) % trainer.num_generations == 0
            rows.append(self._tokens(example[self.column]) if of_group else [])
        device = batch["completion_ids"].device
        parts = [torch.tensor(row, dtype=torch.long) for row in rows]
        batch[IDS] = pad_sequence(parts, batch_first=True).to(device)
        batch[MASK] = pad_sequence([torch.ones_like(row) for row in parts], batch_first=True).to(device)
        assert self.objective is not None
        by_token = self.objective.supervised_aggregation == "token-mean"
        count = batch[MASK].sum() if by_token else batch[MASK].any(dim=1).sum()
        batch[COUNT] = trainer.accelerator.gather(count).sum()
        return batch

    def _tokens(self, text: object) -> list[int]:
        if text is None or text == "":
            return []
        if not isinstance(text, str):
            raise TypeError(f"demonstrations: column {self.column!r} must hold text or None, got {type(text).__name__}")
        tokenizer = getattr(self.trainer.processing_class, "tokenizer", self.trainer.processing_class)
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The hybrid loss in training; TRL's own in evaluation."""
        trainer = self.trainer
        if not trainer.model.training:
            own: Tensor = self._loss(model, inputs)
            return own
        assert self.objective is not None and self.mu is not None
        result, numbers = _trl_loss.micro_batch(trainer, model, inputs, self.objective, self.mu)
        if self.controller is not None:
            self.controller.observe(result.signals)
        self._parts.append((result, numbers))
        return result.loss

    def step(self) -> None:
        """After an optimizer step: the controller's turn, and the step's numbers into TRL's logs."""
        if not self._parts:
            return
        assert self.objective is not None
        trainer, (results, numbers) = self.trainer, zip(*self._parts, strict=True)
        self._parts = []
        _trl_metrics.log(trainer, self.objective, list(numbers))
        logs = trainer._metrics["train"]
        scalars = torch.stack([result.scalars.float() for result in results])
        sums, means, largest = scalars.sum(0), scalars.mean(0), scalars.amax(0)
        taken = [sums[SCALARS.index(name)] for name in _SUMMED]
        names = [name for name in results[0].applicable if name != "ratio_max"]
        taken += [means[SCALARS.index(name)] for name in names]
        values = trainer.accelerator.reduce(torch.stack(taken), reduction="mean").tolist()
        logged = dict(zip((*_SUMMED, *names), values, strict=True))
        logged["ratio_max"] = trainer.accelerator.gather(largest[SCALARS.index("ratio_max")]).max().item()
        counted = [result.batch.unscored().double() for result in results if result.batch is not None]
        if counted:  # of every micro-batch or of none, on all ranks
            logged["rollout_unscored"] = trainer.accelerator.reduce(torch.stack(counted).sum(), reduction="sum").item()
        for name, value in logged.items():
            logs[f"gac/{name}"].append(value)
        if trainer.entropy_coef:
            logs["entropy_coef"].append(trainer.entropy_coef)
        if self.controller is None:
            logs["gac/mu"].append(float(self._fixed or 0.0))
            return
        self.controller.step()
        metrics = self.controller.metrics()
        values = torch.stack([value.double() for value in metrics.values()]).tolist()
        for name, value in zip(metrics, values, strict=True):
            logs[name].append(value)

    def save(self, output_dir: str) -> None:
        """TRL's optimizer and scheduler, and the controller beside them: before the file that makes it a checkpoint."""
        self._save(output_dir)
        if self.controller is not None and self.trainer.args.should_save:
            _write(Path(output_dir) / STATE_FILE, self.controller.state_dict())

    def load(self, checkpoint: str | None) -> None:
        """TRL's optimizer and scheduler, and the controller's state where a run is resumed."""
        self._load(checkpoint)
        if checkpoint is None or self.controller is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"resume_from_checkpoint: expected {STATE_FILE} in {checkpoint}, which holds the controller's state; "
                "that checkpoint was not written by a trainer with a controller"
            )
        self.controller.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _write(path: Path, state: Mapping[str, Any]) -> None:
    """Whole or not at all, whenever the process dies."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _callback(attachment: Attachment) -> Any:
    from transformers import TrainerCallback

    class StepController(TrainerCallback):
        """Ends the controller's step with the trainer's."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            attachment.step()

    return StepController()
