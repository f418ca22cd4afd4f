"""Importing this puts our head into verl's fused path.

    VERL_USE_EXTERNAL_MODULES=gac_kernels.integrations.verl_head

See :func:`gac_kernels.integrations.verl.patch_head`, which it calls.
"""

from ._verl_head import patch_head

patch_head()
