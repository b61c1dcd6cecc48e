"""Instruments: scorers, sampled KL, statistics, lm-eval, the comparison report."""

if __name__ != "trueup.eval":  # from the repository's root `import eval` would make a second copy of everything
    raise ImportError("import trueup.eval, not eval: the folders at the root are packages of trueup")
