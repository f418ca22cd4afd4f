"""Benchmarks: a case knows its inputs, its bytes and what is right; providers compute it; one function measures them.

* ``case``, ``cases``: the work: the token-level loss of e.g. 64 x 2048 tokens, the loss of 1024 x 32000 logits;
* ``check``: comparison with float64;
* ``eager``: the work written by hand in PyTorch, the baseline;
* ``provider``, ``providers``: this package's backends, the baselines, torch.compile of them;
* ``peers``: what others' installed code makes of the same inputs;
* ``measure``: the measuring function;
* ``session``: check, then time, then records.
"""
