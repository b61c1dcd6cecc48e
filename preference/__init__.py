"""Learning from preferences: pairs, reward model, DPO, PPO."""

if __name__ != "trueup.preference":  # `import preference` from the repository's root would be a second copy
    raise ImportError("import trueup.preference, not preference: the root's folders are packages of trueup")
