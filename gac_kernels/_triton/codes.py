"""Compile-time codes of the kernels; ``schemas.encode`` numbers the same things for the schema."""

import triton.language as tl

SIGMOID = tl.constexpr(0)
ERF = tl.constexpr(1)
ARCTAN = tl.constexpr(2)
SOFTSIGN = tl.constexpr(3)  # the gates of SAPO are the codes up to here
GRPO = tl.constexpr(4)
CISPO = tl.constexpr(5)
GSPO = tl.constexpr(6)  # from here on a token's term needs its whole sequence
DFPO = tl.constexpr(7)

MIN_REPLACE = tl.constexpr(0)
ADV_ORTHOGONAL = tl.constexpr(1)
GEOMETRIC_MEAN = tl.constexpr(0)
PRODUCT = tl.constexpr(1)

K1 = tl.constexpr(1)
K2 = tl.constexpr(2)
K3 = tl.constexpr(3)

TOKEN_MEAN = tl.constexpr(0)
SEQ_MEAN_TOKEN_MEAN = tl.constexpr(1)
SEQ_MEAN_TOKEN_SUM = tl.constexpr(2)
SEQ_MEAN_TOKEN_SUM_NORM = tl.constexpr(3)
