"""Importing this has verl's workers train with the hybrid loss where ``policy_loss.hybrid`` is set.

    VERL_USE_EXTERNAL_MODULES=gac_kernels.integrations.verl_hybrid

See :func:`gac_kernels.integrations.verl.patch_worker`, which it calls.
"""

from .verl import patch_worker, register

register()
patch_worker()
