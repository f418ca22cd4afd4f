"""Benchmarks: a case knows its inputs, its bytes and what is right; providers compute it; one function measures them.

* ``cases``: the work, e.g. the token-level loss of 64 x 2048 tokens;
* ``check``: comparison with float64;
* ``eager``: the work written by hand in PyTorch, the baseline;
* ``providers``: this package's backends, the baselines, torch.compile of them, and the peers that are installed;
* ``measure``: the measuring function;
* ``session``: check, then time, then records.
"""
