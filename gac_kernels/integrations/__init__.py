"""The package inside trainers that people already have; each module imports its host only when it is used.

Every integration answers ``gac-kernels doctor`` through one function of its module::

    from .checks import Check, check_host

    def check() -> Check:
        return check_host(
            "verl", "0.9", "0.10",  # distribution, oldest supported version, first one that is not
            {  # "module:name" -> parameters that it must take
                "verl.trainer.ppo.core_algos:register_policy_loss": ("name",),
                "verl.workers.engine_workers:TrainingWorker.set_loss_fn": ("loss_fn",),
            },
        )

It may look further, and may let exceptions out: the caller reports their text. It must be quick: importing a host takes
seconds, and ``check_host`` reads its source instead. Its module stands in ``checks.HOSTS`` beside the distribution's
name.
"""

from .checks import Check, check_host

__all__ = ["Check", "check_host"]
