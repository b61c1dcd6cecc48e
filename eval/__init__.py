"""Instruments: scorers, sampled KL, statistics, lm-eval, the comparison report."""

if __name__ != "trueup.eval":  # `import eval` from the repository's root would be a second copy
    raise ImportError("import trueup.eval, not eval: the root's folders are packages of trueup")
