"""Learning from preferences: pairs, reward model, DPO, PPO."""

if __name__ != "trueup.preference":  # from the repository's root `import preference` would make a second copy of everything
    raise ImportError("import trueup.preference, not preference: the folders at the root are packages of trueup")
