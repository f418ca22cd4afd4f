"""Triton kernels: one source for NVIDIA and AMD GPUs and, under ``TRITON_INTERPRET=1``, for tests on a CPU.

``token_loss`` launches; ``first_look`` and ``token_pass`` loop over sequences and tokens; ``terms`` and ``math`` are
the formulas, one token a lane; ``memory`` is how a sequence is read and written, ``sums`` how it is reduced. Triton is
imported in this folder and nowhere else.
"""
